"""Pickles of weights as one safetensors file, made once: then no start unpickles gigabytes any more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from server.converted import SPARE_BYTES, NoRoom, whole_file
from server.converting import NotConvertible, Sources, write
from server.file_lock import folder_lock
from server.models.checkpoint import read_tensors

log = logging.getLogger(__name__)

# left free on the disk where nobody asked for the file: a full system drive is worse than a slow start
UNASKED_SPARE_BYTES = 10 * 10**9

Progress = Callable[[int, int], None]


def convert_once(folder: Path, files: Sequence[Path], least: int, progress: Progress | None = None) -> list[Path]:
    """The files to read: pickles of ``least`` bytes together are converted before, or read as they are if they cannot.

    Raises ModelError for a damaged one.
    """
    size = sum(path.stat().st_size for path in files)
    if files[0].suffix != ".bin" or size < least:
        return [*files]
    try:
        with folder_lock(folder) as is_ours:
            if not is_ours:
                log.info(
                    "另一个程序正在往 %s 里写，这次不转换 pickle 格式的权重。 / Another program is writing into that "
                    "folder, so the pickled weights are not converted this time.", folder,
                )  # fmt: skip
                return [*files]
            target = whole_file(folder)
            log.info("把 pickle 格式的权重转换成 %s（只做一次）…… / converting the pickled weights to that file, once",
                     target)  # fmt: skip
            convert(folder, files, spare=UNASKED_SPARE_BYTES, progress=progress)
    except NoRoom as error:
        log.info(
            "没有转换权重：磁盘要有 %.1f GB，只剩 %.1f GB；照样能用，只是每次启动都要读 pickle。 / The weights "
            "were not converted: that takes %.1f GB, %.1f GB are free; all works, but every start reads the pickles.",
            error.needed / 1e9, error.free / 1e9, error.needed / 1e9, error.free / 1e9,
        )  # fmt: skip
        return [*files]
    except (OSError, NotConvertible) as error:
        log.warning(
            "权重没有转换（%s）；照样能用，只是每次启动都要读 pickle。 / The weights were not converted (%s); all "
            "works, but every start reads the pickles.", error, error,
        )  # fmt: skip
        return [*files]
    log.info(
        "转换好了；原来的 pickle 文件（%.1f GB）不再需要，可以用 download --prune 删掉。 / Converted; the pickles "
        "(%.1f GB) are not needed any more, download --prune deletes them.", size / 1e9, size / 1e9,
    )  # fmt: skip
    return [target]


def convert(
    folder: Path, files: Sequence[Path], *, spare: int = SPARE_BYTES, progress: Progress | None = None
) -> Path:
    """Write all tensors of the pickles, each in its own dtype, to model.safetensors, whole or not at all.

    Within the folder's lock. Takes memory for one tensor, and where pickles cannot be mapped for one shard. Raises
    NoRoom, OSError, NotConvertible, and ModelError for a damaged pickle.
    """
    target, size = whole_file(folder), sum(path.stat().st_size for path in files)
    tensors = (pair for path in files for pair in read_tensors(path))
    with Sources(files) as sources:
        write(
            target,
            tensors,
            size,
            sources,
            spare=spare,
            more={"format": "pt"},  # transformers asks for it
            advance=lambda done: progress and progress(min(done, size), size),
        )
    return target
