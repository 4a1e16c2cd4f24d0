"""store.py: an artefact is whole or absent, made once, and found again by what made it."""

import signal
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedmitr.core.store as module
from fedmitr.core.errors import BadInput
from fedmitr.core.store import Store, fingerprint, read_tensors, write_json, write_tensors


def text(content):
    return lambda folder: (folder / "a.txt").write_text(content)


def everything(root):
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def test_what_is_put_is_there_whole(tmp_path):
    store = Store(tmp_path)
    assert not store.has("stage", "key")
    path = store.put("stage", "key", text("hello"))
    assert store.has("stage", "key") and path == store.path("stage", "key")
    assert everything(tmp_path) == {"stage/key/a.txt"}


def test_an_exception_inside_write_leaves_nothing(tmp_path):
    def fail(folder):
        text("half")(folder)
        raise RuntimeError("disk on fire")

    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="disk on fire"):
        store.put("stage", "key", fail)
    assert not store.has("stage", "key") and everything(tmp_path) == set()


def test_a_run_stopped_at_the_last_moment_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).put("stage", "key", text("whole"))
    assert not Store(tmp_path).has("stage", "key") and everything(tmp_path) == set()


def test_a_full_disk_is_not_swallowed(tmp_path):
    def fail(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Store(tmp_path).put("stage", "key", fail)


KILLED = """
import os, signal, sys
from fedmitr.core.store import Store

def write(folder):
    (folder / "a.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

Store(sys.argv[1]).put("stage", "key", write)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_run_killed_while_it_writes_leaves_no_artefact_and_the_next_run_works(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = Store(tmp_path)
    assert not store.has("stage", "key")
    store.put("stage", "key", text("whole"))
    assert (store.path("stage", "key") / "a.txt").read_text() == "whole"


def read(folder):
    return (folder / "a.txt").read_text()


def write(content, folder):
    (folder / "a.txt").write_text(content)


def test_get_makes_once_and_reads_ever_after(tmp_path):
    store, made = Store(tmp_path), []

    def make():
        made.append(1)
        return "costly"

    for _ in range(3):
        assert store.get("stage", "key", read, make, write) == "costly"
    assert Store(tmp_path).get("stage", "key", read, make, write) == "costly"
    assert len(made) == 1
    store.get("stage", "other", read, make, write)
    store.get("elsewhere", "key", read, make, write)
    assert len(made) == 3


def test_a_make_that_fails_is_made_again(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError):
        store.get("stage", "key", read, lambda: 1 / 0, write)
    assert store.get("stage", "key", read, lambda: "second try", write) == "second try"


def test_seconds_are_those_of_the_making(tmp_path, monkeypatch):
    clock = iter([100.0, 102.5])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    store = Store(tmp_path)
    store.get("stage", "key", read, lambda: "x", write)
    assert store.seconds("stage", "key") == 2.5


def test_two_runs_that_put_the_same_artefact_do_not_disturb_each_other(tmp_path):
    both, errors = threading.Barrier(2), []

    def put(content):
        def fill(folder):
            text(content)(folder)
            both.wait(timeout=30)  # neither moves into place before both have written

        try:
            Store(tmp_path).put("stage", "key", fill)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=put, args=(c,)) for c in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and everything(tmp_path) == {"stage/key/a.txt"}
    assert read(tmp_path / "stage" / "key") in ("one", "two")


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_store_that_cannot_be_written_is_one_line(tmp_path, below, one_line):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput) as error:
        Store(tmp_path / "file" / below)
    one_line(error.value, "store=", "file")


# Addresses.

PARTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(PARTS, PARTS)
def test_equal_parts_have_equal_addresses_and_others_do_not(one, two):
    assert fingerprint(one) == fingerprint(one)
    same = repr(one) == repr(two) or module.json.dumps(one, sort_keys=True) == module.json.dumps(
        two, sort_keys=True
    )
    assert (fingerprint(one) == fingerprint(two)) == same


def test_an_address_does_not_depend_on_the_order_of_names_but_on_that_of_parts():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint("a", "b") != fingerprint("b", "a")
    assert fingerprint([1], 2) != fingerprint([1, 2]) != fingerprint(1, 2)


@pytest.mark.parametrize(
    "what, value", [("torch.__version__", "9.9"), ("timm.__version__", "9"), ("FORMAT", -1)]
)
def test_an_address_changes_with_the_libraries_and_the_format(what, value, monkeypatch):
    before = fingerprint("x")
    monkeypatch.setattr(f"fedmitr.core.store.{what}", value)
    assert fingerprint("x") != before


def test_an_address_changes_with_what_rounds_differently(monkeypatch):
    before = fingerprint("x")
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 7)
    assert fingerprint("x") != before
    monkeypatch.undo()
    monkeypatch.setattr(module, "device", lambda: torch.device("cuda"))
    assert fingerprint("x") != before


def test_an_address_is_a_safe_file_name():
    assert len(fingerprint("/../x")) == 16 and fingerprint("/../x").isalnum()


def test_tensors_keep_values_and_types(tmp_path):
    tensors = {
        "bool": torch.tensor([True, False]),
        "int": torch.arange(3),
        "float": torch.randn(2, 3).T,
        "gradient": torch.ones(2, requires_grad=True),
    }
    write_tensors(tensors, tmp_path / "t.safetensors")
    back = read_tensors(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(back[name], value) and back[name].dtype == value.dtype


def test_json_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "x.json"
    for value in ({"b": 1, "a": [2.5]}, 3):
        write_json(path, value)
        assert module.json.loads(path.read_text()) == value
    assert everything(tmp_path) == {"x.json"}
