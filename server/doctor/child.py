"""``python -m server.doctor.child LOOK``: one look, whose result is a line of the output, as JSON."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import sys
from typing import Any

from server.doctor.children import MARK


def look_at_gpus() -> dict[str, Any]:
    """The driver's library is loaded into this process."""
    from server.hardware import find_gpus

    gpus, driver = find_gpus()
    return {"gpus": [dataclasses.asdict(gpu) for gpu in gpus], "driver": driver}


def look_at_torch() -> dict[str, Any]:
    """Imports PyTorch, computes a little with it, and starts CUDA where it is built for that."""
    import torch

    found = {"version": torch.__version__, "cuda": torch.version.cuda, "devices": 0, "architectures": []}
    if not torch.equal(torch.ones(8, 8) @ torch.ones(8, 8), torch.full((8, 8), 8.0)):
        found["error"] = "8 x 8 ones times 8 x 8 ones is not 8"
    if torch.version.cuda:
        found["architectures"] = torch.cuda.get_arch_list()
        try:
            torch.zeros(1, device="cuda")
            found["devices"] = torch.cuda.device_count()
        except Exception as error:  # RuntimeError or AssertionError, and what a broken driver makes of it
            found["cuda_error"] = str(error).splitlines()[0] if str(error) else type(error).__name__
    return found


def look_at_kernels() -> dict[str, Any]:
    """Loads the compiled library: a damaged one may end the process."""
    from server.kernels.build import find_library

    library = find_library()
    if library is None:
        return {"library": None}
    ctypes.CDLL(str(library))
    return {"library": str(library)}


LOOKS = {"gpus": look_at_gpus, "torch": look_at_torch, "kernels": look_at_kernels}


def main(look: str) -> None:
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    try:
        found = LOOKS[look]()
    except Exception as error:  # also OSError from a DLL that does not load
        found = {"error": f"{type(error).__name__}: {error}", "kind": type(error).__name__}
    print("\n" + MARK + json.dumps(found), flush=True)
    os._exit(0)  # what was looked at has its say no more: its threads may hang, its end may crash


if __name__ == "__main__":
    main(sys.argv[1])
