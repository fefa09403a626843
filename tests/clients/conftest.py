"""Clients that nobody here wrote."""

import pytest

from tests.clients import node as node_clients
from tests.functional.program import Program

SLOTS, QUEUE = 4, 4
ADMITTED = SLOTS + QUEUE


@pytest.fixture(scope="session")
def node():
    """``node(file, function, *args)`` calls a function of tests/clients/node."""
    node_clients.install_packages()
    return node_clients.call


@pytest.fixture(scope="session")
def program():
    """The real program with the demo model, which admits ``ADMITTED`` requests at once."""
    with Program("--slots", str(SLOTS), "--queue", str(QUEUE), "--max-length", "1024") as running:
        yield running
