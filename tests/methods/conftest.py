"""What the pages on methods share: clients with small models, and what a function returned."""

import pytest
from helpers import make_upload, registrations_taken_back


@pytest.fixture(scope="session")
def clients():
    """Three clients with models of 12×12 images; nobody holds a 9."""
    counts = [(9, 8, 7, 0, 0, 0, 0, 0, 0, 0), (0, 2, 0, 4, 6, 8, 0, 0, 0, 0), (1, 0, 0, 0, 0, 3, 5, 2, 1, 0)]
    return [make_upload(k, c, side=12) for k, c in enumerate(counts)]


@pytest.fixture
def recorded(monkeypatch):
    """recorded(module, name): every result of a module's function from now on, in order."""

    def record(module, name):
        made, real = [], getattr(module, name)

        def call(*args, **options):
            made.append(real(*args, **options))
            return made[-1]

        monkeypatch.setattr(module, name, call)
        return made

    return record


@pytest.fixture
def registrations():
    """Methods that a test registers, and their blocks of settings, are taken back after it."""
    with registrations_taken_back():
        yield
