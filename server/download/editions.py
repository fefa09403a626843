"""Which edition of a model is downloaded: a machine that computes with 4 bits needs no 16-bit files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from server.config import ROOT, Config
from server.converted import kept
from server.download.fetch import Origin, download_size, ensure_model
from server.download.folder import DEFAULT_MODEL, is_begun, is_published, locate, missing_files, repositories
from server.download.progress import readable
from server.download.pruned import check_can_be_had, choose_for, wants_originals
from server.download.sources import Source
from server.errors import StartupError
from server.footprint import ModelShape
from server.hardware import Hardware, probe
from server.profiles import LaunchProfile, Note, choose

# From the official config.json files, for the profile is chosen before anything is downloaded.
_CHATGLM = ModelShape.from_config({
    "num_layers": 28, "hidden_size": 4096, "inner_hidden_size": 16384, "num_attention_heads": 32,
    "vocab_size": 130528, "max_sequence_length": 2048,
})  # fmt: skip
_CHATGLM2 = ModelShape.from_config({
    "num_layers": 28, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_attention_heads": 32, "kv_channels": 128,
    "multi_query_attention": True, "multi_query_group_num": 2, "padded_vocab_size": 65024, "seq_length": 32768,
})  # fmt: skip
_SHORT = replace(_CHATGLM2, seq_length=8192)
SHAPES = {
    "chatglm-6b": _CHATGLM,
    "chatglm-6b-int8": replace(_CHATGLM, stored_bits=8),
    "chatglm-6b-int4": replace(_CHATGLM, stored_bits=4),
    "chatglm2-6b": _CHATGLM2,
    "chatglm2-6b-int4": replace(_CHATGLM2, stored_bits=4),
    "chatglm2-6b-32k": _CHATGLM2,
    "chatglm2-6b-32k-int4": replace(_CHATGLM2, stored_bits=4),
    "chatglm3-6b": _SHORT,
    "chatglm3-6b-32k": _CHATGLM2,
    "chatglm3-6b-128k": replace(_CHATGLM2, seq_length=131072),
    "codegeex2-6b": _SHORT,
    "codegeex2-6b-int4": replace(_SHORT, stored_bits=4),
}
# full model -> its official int4 edition
INT4 = {name: f"{name}-int4" for name in SHAPES if f"{name}-int4" in SHAPES}

# What the user is told of the edition that is not taken; a size is " (3.92 GB)", or empty while it is not known.
_TAKEN = Note("这里用 4 位运行，所以下载官方的 int4 版 {small}{small_size}，不下载完整版{full_size}；"
              "要完整版请加 --model {full}。",
              "4 bits are used here, so the official int4 edition {small}{small_size} is downloaded, not the full "
              "model{full_size}; for that one add --model {full}.")  # fmt: skip
_PRESENT = Note("没有 {full}，用已有的官方 int4 版 {small}；要下载完整版请加 --model {full}。",
                "{full} is not here, its official int4 edition {small} is, and is used; to download the full model "
                "add --model {full}.")  # fmt: skip
_POSSIBLE = Note("这里用 4 位运行，官方的 int4 版{small_size}就够了，比完整版{full_size}小；"
                 "要它请改用 --model {small}。",
                 "4 bits are used here: the official int4 edition{small_size} would do, smaller than the full "
                 "model{full_size}; for that one use --model {small}.")  # fmt: skip
_TOO_BIG = Note("官方的 int4 版{small_size}运行时多占一点内存，现在空闲的不够，所以下载完整版{full_size}，"
                "加载时再量化；可以关掉别的程序再启动，或者仍用 --model {small}。",
                "The official int4 edition{small_size} runs in a little more memory than is free, so the full "
                "model{full_size} is downloaded and quantized here; close other programs and start again, or use "
                "--model {small} all the same.")  # fmt: skip
_AGAIN = Note("原来的权重已经用 --prune 删掉，留下的不能这样运行，所以重新下载。",
              "The original weights were deleted with --prune, and what was kept cannot run like this, so they are "
              "downloaded again.")  # fmt: skip


class Editions(NamedTuple):
    """A known model that is not complete on this machine, and its official int4 edition."""

    full: str
    small: str
    shape: ModelShape  # of the full model
    has_small: bool  # on the disk, complete
    is_begun: bool  # some weights of the full model are on the disk


class Choice(NamedTuple):
    """The name of the model to run, and what is to be said about that."""

    name: str
    said: Note | None = None


def ensure_edition(config: Config, root: Path = ROOT, *, thorough: bool = False) -> Path:
    """The folder of the model that ``config`` asks for; if it has to be downloaded, in the edition that suits.

    ``thorough`` as for ``ensure_model``; a model that is named then need not run on this machine. Raises as
    ``ensure_model`` does, and before the download as ``choose``, where no edition can run as asked.
    """
    name, said = config.model or DEFAULT_MODEL, None
    editions = None
    try:
        if editions := find_editions(name, root):
            name, said = choose_edition(editions, probe(root), config)
        elif is_to_be_downloaded(name, root):
            choose(probe(root), SHAPES[locate(name, root).name], config)
    except StartupError:
        if not (thorough and config.model):
            raise
    if said is _PRESENT:
        print(_sentence(said, editions, {}, config), flush=True)

    def announce(size: int, source: Source) -> None:
        if said:
            other = editions.full if name == editions.small else editions.small
            sizes = {name: size, other: download_size(other, source, root=root)}
            print(_sentence(said, editions, sizes, config), flush=True)

    folder = locate(name, root, foreign=thorough)
    if originals := bool(kept(folder)) and wants_originals(folder, probe(root), config):
        check_can_be_had(folder, root, anywhere=thorough)
        print(_AGAIN.zh if config.language == "zh" else _AGAIN.en, flush=True)
    return ensure_model(
        name,
        origin=Origin(config.source, config.endpoint),
        root=root,
        language=config.language,
        announce=announce,
        thorough=thorough,
        originals=originals,
        converted=_converted_bytes(folder, root, config) if config.prune else None,
    )


def _converted_bytes(folder: Path, root: Path, config: Config) -> int | None:
    """Size of the file that ``--prune`` makes first: the quantized one, 0 for a copy of pickles, None: not known."""
    if not (shape := SHAPES.get(folder.name)):
        return None
    try:
        profile = choose_for(folder, probe(root), shape, config)
    except StartupError:
        return None
    return shape.weight_bytes(profile.bits, 2) if profile.kernels and config.lora is None else 0


def find_editions(name: str, root: Path) -> Editions | None:
    """None where there is nothing to choose: no int4 edition is known, or the model is there."""
    folder = locate(name, root)
    if folder.name not in INT4 or not is_to_be_downloaded(name, root):
        return None
    small, shape = INT4[folder.name], SHAPES[folder.name]
    return Editions(folder.name, small, shape, not missing_files(folder.with_name(small)), is_begun(folder))


def is_to_be_downloaded(name: str, root: Path) -> bool:
    """Whether it is a published model that is not complete on this machine."""
    folder = locate(name, root)
    return bool(is_published(folder) and repositories(folder, root) and missing_files(folder))


def choose_edition(editions: Editions, hardware: Hardware, config: Config) -> Choice:
    """The int4 edition if it is enough; where a model was named, is begun or takes a LoRA, it is only named.

    Enough: the profile uses 4 bits, or it is there and the bits were left open. A pure function; raises as ``choose``.
    """
    full, small, shape, has_small, begun = editions
    profile = choose(hardware, shape, config)
    # a LoRA adapter is merged into the weights, which should not have been rounded to 4 bits before
    is_open = config.model is None and config.lora is None and not begun
    if profile.bits != 4:
        any_bits = config.quantize is None and config.profile in ("auto", "cpu")
        return Choice(small, _PRESENT) if is_open and has_small and any_bits else Choice(full)
    if not _runs_as_well(profile, hardware, replace(shape, stored_bits=4), config):
        return Choice(full, _TOO_BIG if is_open else None)
    if is_open:
        return Choice(small, _PRESENT if has_small else _TAKEN)
    return Choice(full, None if config.lora else _POSSIBLE)


def _runs_as_well(full: LaunchProfile, hardware: Hardware, shape: ModelShape, config: Config) -> bool:
    """Whether the int4 edition runs where the full model would: its output matrix keeps 16 bits."""
    try:
        small = choose(hardware, shape, config)
    except StartupError:
        return False
    return small.device == full.device and len(small.warnings) <= len(full.warnings)


def _sentence(said: Note, editions: Editions, sizes: dict[str, int | None], config: Config) -> str:
    zh = config.language == "zh"

    def shown(name: str) -> str:
        size = sizes.get(name)
        return "" if size is None else f"（{readable(size)}）" if zh else f" ({readable(size)})"

    full, small = editions.full, editions.small
    text = said.zh if zh else said.en
    return text.format(full=full, small=small, full_size=shown(full), small_size=shown(small))
