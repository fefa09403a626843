"""What several checks look at, looked at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from server.adapters import with_prefix
from server.config import ROOT, Config
from server.converted import kept
from server.doctor.children import ChildFailed, ask
from server.doctor.port import look_at_port
from server.download.editions import SHAPES, choose_edition, find_editions
from server.download.folder import DEFAULT_MODEL, locate, missing_files
from server.download.pruned import choose_for, wants_originals
from server.errors import StartupError
from server.footprint import ModelShape
from server.hardware import GPU, Hardware, probe
from server.profiles import LaunchProfile

GPU_SECONDS = 20.0
TORCH_SECONDS = 100.0  # the first import after a download, from a slow disk under a virus scanner

T = TypeVar("T")


class Once(Generic[T]):
    """Calls ``look`` for whoever asks first; the others wait for it, and get the same value or exception."""

    def __init__(self, look: Callable[[], T]):
        self._look, self._lock = look, threading.Lock()
        self._value: T
        self._error: Exception | None = None
        self._done = False

    def __call__(self) -> T:
        with self._lock:
            if not self._done:
                try:
                    self._value = self._look()
                except Exception as error:
                    self._error = error
                self._done = True
        if self._error:
            raise self._error
        return self._value


class Gpus(NamedTuple):
    """All NVIDIA GPUs, the driver's version, and why the look at them failed, if it did."""

    gpus: tuple[GPU, ...]
    driver: str | None
    failure: ChildFailed | None = None


class Model(NamedTuple):
    """The folder that would be used, and whether everything is in it."""

    folder: Path
    missing: list[str]


class Machine:
    """This machine with what the user asked for; the looks are made when a check asks for them."""

    def __init__(self, config: Config, *, root: Path = ROOT, env: Mapping[str, str] = os.environ):
        self.config, self.root, self.env = config, root, env
        self.gpus = Once(self._find_gpus)
        self.hardware: Once[Hardware] = Once(lambda: probe(root, env, lambda: self.gpus()[:2]))
        self.torch: Once[dict[str, Any]] = Once(lambda: ask("torch", TORCH_SECONDS - 5))
        self.port = Once(lambda: look_at_port(config.host, config.port))
        self.model = Once(self._find_model)
        self.profile = Once(self._choose_profile)

    def _find_gpus(self) -> Gpus:
        try:
            found = ask("gpus", GPU_SECONDS - 5)
            if "error" in found:
                raise ChildFailed(found["error"])
        except ChildFailed as failure:
            return Gpus((), None, failure)
        gpus = [{**gpu, "capability": tuple(gpu["capability"]) if gpu["capability"] else None} for gpu in found["gpus"]]
        return Gpus(tuple(GPU(**gpu) for gpu in gpus), found["driver"])

    def _find_model(self) -> Model:
        """The full model where the memory is too small for either edition."""
        name = self.config.model or DEFAULT_MODEL
        if editions := find_editions(name, self.root):
            try:
                name = choose_edition(editions, self.hardware(), self.config).name
            except StartupError:
                name = editions.full
        folder = locate(name, self.root)
        originals = bool(kept(folder)) and wants_originals(folder, self.hardware(), self.config)
        return Model(folder, missing_files(folder, originals=originals))

    def _choose_profile(self) -> tuple[LaunchProfile, ModelShape]:
        """Raises StartupError where nothing fits or the model's shape is not known."""
        shape = self.shape()
        return choose_for(self.model().folder, self.hardware(), shape, self.config), shape

    def shape(self) -> ModelShape:
        """From the model's config.json, or as it is published."""
        folder = self.model().folder
        known = not (folder / "config.json").is_file() and SHAPES.get(folder.name)
        return with_prefix(known or ModelShape.from_folder(folder), self.config.ptuning)
