"""Folders of images that several pages of the data's tests read."""

import pytest
from helpers import registrations_taken_back
from photo_files import fill


@pytest.fixture
def folder(tmp_path):
    """Ten images of each of three classes, in folders."""
    return fill(tmp_path / "data")


@pytest.fixture
def registry():
    """Take back the data sets that a test registers."""
    with registrations_taken_back():
        yield
