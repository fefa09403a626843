"""Back ends, and random inputs that are new in every run."""

import os
import secrets

import pytest
import torch

from server.kernels.build import VARIANTS, NoKernels
from server.kernels.cpu_ops import CpuOps
from server.kernels.torch_ops import TorchOps

SEED = "KERNEL_SEED"


def cpu_ops(variant: str, threads: int = 2) -> CpuOps:
    """A variant of the C kernels, or a skipped test: test_build.py fails where they cannot be compiled."""
    try:
        return CpuOps(threads, variant)
    except NoKernels as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=VARIANTS)
def cpu(request):
    return cpu_ops(request.param)


@pytest.fixture(scope="session", params=["torch", *VARIANTS])
def ops(request):
    return TorchOps() if request.param == "torch" else cpu_ops(request.param)


@pytest.fixture
def random():
    """random(*shape, dtype=float32): normally distributed; pytest shows the seed of a test that fails."""
    seed = int(os.environ.get(SEED) or secrets.randbelow(2**31))
    print(f"to see the same inputs again: {SEED}={seed}")
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype)
