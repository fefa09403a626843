"""Engines that draft, and what they draft."""

import pytest

from benchmarks.speculation import Told
from server.engine import local
from tests.engine.doubles import make_engine


@pytest.fixture
def told(monkeypatch):
    """``told(answer_to, p)``: from now on an id is drafted rightly with probability p."""

    def tell(answer_to, p):
        monkeypatch.setattr(local, "PromptLookup", lambda ids: Told(ids, answer_to(list(ids)), p))

    return tell


@pytest.fixture
def hashing():
    """Engines on HashNetwork, whose answer betrays every mix-up of the cache."""
    engines = []

    def make(network=None, **settings):
        engines.append(make_engine(network, **{"speculate": None, "row_cost": 0.05, **settings}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
