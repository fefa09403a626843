"""A real engine on a reference checkpoint, which has no tokenizer: prompts and answers are ids."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from server.engine.local import EngineSettings, LocalEngine
from tests.engine.doubles import PlainFamily
from tests.models.reference import Reference, load_reference


class AnyIds:
    def decode(self, ids):
        return ""

    def token_bytes(self, token_id):
        return b"%d" % token_id


@contextlib.contextmanager
def reference_engine(
    folder: Path, *, stop_ids: frozenset[int] = frozenset(), **settings
) -> Iterator[tuple[LocalEngine, Reference]]:
    """Two slots, no longer than needed, and chunks of five tokens; no id ends an answer unless ``stop_ids`` has it."""
    reference = load_reference(folder)
    family = PlainFamily()
    family.causal_prompt = reference.family.causal_prompt
    family.stop_ids = lambda tokenizer: stop_ids
    model = SimpleNamespace(
        name=folder.name,
        family=family,
        tokenizer=AnyIds(),
        network=reference.network,
        prefix=reference.prefix,
        dtype=torch.float32,
        kv_dtype=torch.float32,
        device="cpu",
    )
    defaults = {"max_length": reference.capacity, "slots": 2, "queue": 20, "prefill_chunk": 5}
    engine = LocalEngine(model, EngineSettings(**{**defaults, **settings}))
    try:
        yield engine, reference
    finally:
        engine.close()
