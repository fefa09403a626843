import pytest

from server.api.streaming import Answer


@pytest.fixture
def unpaced(monkeypatch):
    """Every piece of text is an event of its own, however slow the machine."""
    monkeypatch.setitem(Answer.deltas.__kwdefaults__, "pace", 0)
