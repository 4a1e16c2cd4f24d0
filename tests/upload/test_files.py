"""upload.py: cards that are loosely typed, and files that are no files."""

import json
import os

import pytest

import fedmitr as fm
from fedmitr.upload import CARD, CARD_BYTES, WEIGHTS


def refused(folder, one_line, *words):
    with pytest.raises(fm.BadInput) as caught:
        fm.Upload.load(folder)
    one_line(caught.value, *words)
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("client", "1"),
        ("client", True),
        ("client", 10**400),
        ("size", "20"),
        ("size", 20.0),
        ("shape.num_classes", "10"),
        ("shape.num_classes", 10.0),
        ("shape.in_chans", True),
        ("class_counts", ["20", *[0] * 9]),
    ],
)
def test_numbers_are_whole_numbers_and_nothing_else(saved, one_line, name, value):
    card = json.loads((saved / CARD).read_text())
    *where, leaf = name.split(".")
    part = card[where[0]] if where else card
    part[leaf] = value
    (saved / CARD).write_text(json.dumps(card))
    refused(saved, one_line, "upload")


def test_a_card_that_is_too_large_is_said_once(saved, one_line):
    (saved / CARD).write_text(" " * (CARD_BYTES + 1))
    assert refused(saved, one_line, "larger").count("upload in") == 1


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
def test_a_file_that_is_a_pipe_or_a_device_is_refused_at_once(saved, one_line, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    refused(saved, one_line, name)
    (saved / name).unlink()
    (saved / name).symlink_to("/dev/zero")
    refused(saved, one_line, name)
