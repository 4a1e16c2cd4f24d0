"""processes.py: every item once, in the given number of processes, and the same bytes with any number."""

import functools
import os
import signal
import sys

import pytest
import torch
from helpers import same
from hypothesis import given
from hypothesis import strategies as st

import fedmitr as fm
import fedmitr.core.processes as module
import fedmitr.experiments.clients as experiment
import fedmitr.methods.fedmitr as pipeline
from fedmitr import cli
from fedmitr.core.processes import in_workers, jobs, parallel
from fedmitr.experiments.compare import compare
from fedmitr.methods import METHODS, Method, register
from fedmitr.settings import Settings

RUN = Settings.load(
    "smoke",
    {
        "task.test": 0.04,
        "task.validation": 0.9,
        "model.image_size": 12,
        "partition.clients": 2,
        "partition.alpha": 10,
        "client.epochs": 1,
        "ensemble.mode": "mean_probs",
        "inversion.teacher": "ensemble",  # needs no histograms
        "inversion.images": 6,
        "inversion.batch_size": 3,
        "inversion.iterations": 2,
        "inversion.stop_at": [1],
        "inversion.stop_ratio": [0.5],
    },
)


# How many.


@pytest.mark.parametrize("text, wanted", [("1", 1), ("3", 3), ("40", 40)])
def test_the_environment_says_how_many_processes(text, wanted, monkeypatch):
    monkeypatch.setenv("FEDMITR_JOBS", text)
    assert jobs() == wanted


@pytest.mark.parametrize(
    "kind, cores, wanted", [("cpu", 1, 1), ("cpu", 4, 4), ("cpu", 64, 8), ("cuda", 64, 3)]
)
def test_else_there_is_one_per_core_up_to_eight_or_one_per_gpu(kind, cores, wanted, monkeypatch):
    monkeypatch.delenv("FEDMITR_JOBS", raising=False)
    monkeypatch.setattr(module, "device", lambda: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(module.joblib, "cpu_count", lambda: cores)
    assert jobs() == wanted


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "", " 2", "²"])
def test_what_is_no_number_of_processes_is_one_line(text, monkeypatch, one_line):
    monkeypatch.setenv("FEDMITR_JOBS", text)
    with pytest.raises(fm.BadInput) as error:
        jobs()
    one_line(error.value, f"FEDMITR_JOBS={text!r}", "1")


# One process.


@given(st.lists(st.integers(), max_size=6))
def test_one_process_takes_every_item_once_in_order(items):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMITR_JOBS", "1")
        assert list(parallel(str, items)) == [(i, str(item)) for i, item in enumerate(items)]


def test_one_process_computes_an_item_when_its_result_is_taken(monkeypatch):
    monkeypatch.setenv("FEDMITR_JOBS", "1")
    done = []
    parts = parallel(done.append, "abc")
    assert done == []
    next(parts)
    assert done == ["a"]


# Two processes. Starting them takes some seconds, so they are few.


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("FEDMITR_JOBS", "2")


def surroundings(item):
    """Return the item, the process and its environment; refuse one item."""
    if item == "bad":
        raise fm.BadInput("item='bad' is refused")
    return item, os.getpid(), os.environ.get("FEDMITR_JOBS"), os.environ.get("FEDMITR_STATIC")


def test_two_processes_take_every_item_once_and_start_no_more_of_their_own(two):
    found = list(parallel(surroundings, "abcde"))
    assert sorted((index, said[0]) for index, said in found) == list(enumerate("abcde"))
    processes = {pid for _, (_, pid, _, _) in found}
    assert len(processes) <= 2 and os.getpid() not in processes
    assert {(told, static) for _, (_, _, told, static) in found} == {("1", "1")}


def test_one_item_is_computed_here(two):
    ((index, (item, pid, told, _)),) = parallel(surroundings, ["only"])
    assert (index, item, pid, told) == (0, "only", os.getpid(), "2")


def test_bad_input_in_a_worker_arrives_as_bad_input(two, one_line):
    with pytest.raises(fm.BadInput) as error:
        list(parallel(surroundings, ["a", "bad", "c"]))
    one_line(error.value, "item='bad'")


NOTES: dict[str, int] = {}


def note(name, number):
    NOTES[name] = number


def read_note(name):
    """Return the note of a name in this process, and its number of processes as the call found it."""
    return NOTES.get(name), os.getpid(), os.environ.get("FEDMITR_JOBS")


def test_workers_are_told_what_is_registered_here(two, monkeypatch):
    monkeypatch.setattr(module, "_IN_WORKERS", [])
    in_workers(note, "one", 1)
    in_workers(note, "two", 2)
    in_workers(note, "one", 11)  # calls are made in their order
    found = dict(parallel(read_note, ["one", "two", "three"]))
    assert [found[k][0] for k in range(3)] == [11, 2, None] and NOTES == {}
    assert os.getpid() not in {pid for _, pid, _ in found.values()}


def test_a_call_is_made_in_the_worker_before_its_work(monkeypatch):
    for name in ("FEDMITR_JOBS", "FEDMITR_STATIC", "FEDMITR_BACKEND", "FEDMITR_CLUSTER"):
        monkeypatch.setenv(name, "2")  # restored after the test
    monkeypatch.setitem(NOTES, "one", 0)
    assert module._in_worker(0, [(note, ("one", 7))], read_note, 3, "one") == (3, (7, os.getpid(), "1"))
    assert module._in_worker(os.getpid(), [(note, ("one", 8))], read_note, 3, "one")[1][0] == 7  # no worker


def files(root):
    """Every file of tensors, by its address."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.safetensors")}


def test_clients_and_inversion_are_the_same_bytes_in_one_process_or_two(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMITR_JOBS", "1")
    alone = fm.Experiment(RUN, tmp_path / "alone")
    images = pipeline.synthetic_set(alone.uploads, RUN, alone.store)
    monkeypatch.setenv("FEDMITR_JOBS", "2")
    monkeypatch.setattr(experiment, "train_client", None)  # this process does none of the work
    monkeypatch.setattr(pipeline, "invert", None)
    spread = fm.Experiment(RUN, tmp_path / "spread")
    assert [u.digest for u in spread.uploads] == [u.digest for u in alone.uploads]
    assert same(pipeline.synthetic_set(spread.uploads, RUN, spread.store), images)
    assert files(tmp_path / "alone") == files(tmp_path / "spread") and len(files(tmp_path / "alone")) == 4


def test_compare_gives_the_same_table_in_one_process_or_two_with_methods_of_your_own_too(
    tmp_path, monkeypatch
):
    def mine(uploads, settings, store):
        return METHODS["fedavg"](uploads, settings, store)

    monkeypatch.setattr(module, "_IN_WORKERS", [])
    monkeypatch.setitem(METHODS, "mine", None)  # restored after the test
    register(Method("mine", mine))
    tables = []
    for processes in ("2", "1"):
        monkeypatch.setenv("FEDMITR_JOBS", processes)
        out = tmp_path / processes / "runs.csv"
        compare(["mine", "ensemble", "fedavg"], [RUN], tmp_path / processes, out)
        tables.append(out.read_text())
    assert tables[0] == tables[1]
    named = [row.split(",")[0] for row in tables[0].splitlines()]
    assert named == ["method", "mine", "ensemble", "fedavg"]


@pytest.mark.parametrize("limit, expected", [(2e9, 1), (4e9, 2), (64e9, 4), (0.5e9, 1)])
def test_processes_are_fewer_where_a_container_has_little_memory(limit, expected, tmp_path, monkeypatch):
    file = tmp_path / "memory.max"
    file.write_text(f"{int(limit)}\n")
    monkeypatch.delenv("FEDMITR_JOBS")
    monkeypatch.setattr(module, "MEMORY_LIMITS", (str(file), str(tmp_path / "none")))
    monkeypatch.setattr(module.os, "sysconf", lambda _: 10**6)  # plenty in the machine itself
    monkeypatch.setattr(module.joblib, "cpu_count", lambda: 4)
    monkeypatch.setattr(module, "device", lambda: torch.device("cpu"))
    assert jobs() == expected
    file.write_text("max\n")
    assert jobs() == 4


def die(item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line_and_status_1(monkeypatch, capsys):
    monkeypatch.setenv("FEDMITR_JOBS", "2")
    monkeypatch.setattr("fedmitr.experiments.compare.run_all", lambda *_: list(parallel(die, [1, 2])))
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--profile", "smoke", "--methods", "fedavg", "--seeds", "0"])
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("fedmitr: a worker process was killed")


# Clusters.


@pytest.fixture(scope="module")
def dask_cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture
def dask(dask_cluster, two, monkeypatch):
    dask_cluster.wait_for_workers(2, timeout=30)  # one that a test killed comes back
    monkeypatch.setenv("FEDMITR_BACKEND", "dask")
    monkeypatch.setenv("FEDMITR_CLUSTER", dask_cluster.scheduler_address)


def test_a_dask_cluster_takes_every_item_once_and_starts_no_more(dask):
    found = list(parallel(surroundings, "abcde"))
    assert sorted((index, said[0]) for index, said in found) == list(enumerate("abcde"))
    assert os.getpid() not in {pid for _, (_, pid, _, _) in found}
    assert {(told, static) for _, (_, _, told, static) in found} == {("1", "1")}


def die_once(mark, item):
    """Kills the worker that comes first."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return item * item
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_work_of_a_dask_worker_that_is_killed_is_done_by_another(dask, tmp_path):
    found = sorted(parallel(functools.partial(die_once, tmp_path / "mark"), range(6)))
    assert (tmp_path / "mark").exists() and found == [(i, i * i) for i in range(6)]


def test_compare_on_a_dask_cluster_is_the_same_table_as_alone(dask, tmp_path, monkeypatch):
    tables = []
    for backend, processes in (("dask", "2"), ("loky", "1")):
        monkeypatch.setenv("FEDMITR_BACKEND", backend)
        monkeypatch.setenv("FEDMITR_JOBS", processes)
        if backend == "loky":
            monkeypatch.delenv("FEDMITR_CLUSTER")
        compare(["ensemble", "fedavg"], [RUN], tmp_path / backend, tmp_path / backend / "runs.csv")
        tables.append((tmp_path / backend / "runs.csv").read_text())
    assert tables[0] == tables[1]
    assert files(tmp_path / "dask") == files(tmp_path / "loky")


def test_ray_takes_every_item_once(two, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("FEDMITR_BACKEND", "ray")
    monkeypatch.delenv("FEDMITR_CLUSTER", raising=False)
    made = parallel(abs, [3, -1, -4])  # a function that workers can import
    assert sorted(made) == [(0, 3), (1, 1), (2, 4)]


@pytest.mark.parametrize("name, reason", [("slurm", "loky, dask, ray"), ("dask", "fedmitr[dask]")])
def test_a_backend_that_is_unknown_or_missing_is_one_line(name, reason, monkeypatch, one_line):
    monkeypatch.setenv("FEDMITR_BACKEND", name)
    monkeypatch.setitem(sys.modules, "distributed", None)  # as where it is not installed
    with pytest.raises(fm.BadInput) as error:
        list(parallel(str, "ab"))
    one_line(error.value, f"FEDMITR_BACKEND={name!r}", reason)


def test_a_single_process_here_still_sends_a_runs_work_to_a_cluster(dask, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMITR_JOBS", "1")
    monkeypatch.setattr(experiment, "train_client", None)  # this process does none of the work
    monkeypatch.setattr(pipeline, "invert", None)
    there = fm.Experiment(RUN, tmp_path)
    assert len(there.uploads) == 2 and len(pipeline.synthetic_set(there.uploads, RUN, there.store)) == 6


@pytest.mark.parametrize(
    "backend, address", [("dask", "tcp://127.0.0.1:1"), ("dask", "nonsense"), ("loky", "x:1")]
)
def test_a_cluster_that_is_not_there_is_one_line(backend, address, monkeypatch, one_line):
    if backend == "dask":
        dask = pytest.importorskip("dask")
        dask.config.set({"distributed.comm.timeouts.connect": "1s"})
    monkeypatch.setenv("FEDMITR_BACKEND", backend)
    monkeypatch.setenv("FEDMITR_CLUSTER", address)
    with pytest.raises(fm.BadInput) as error:
        list(parallel(str, "ab"))
    one_line(error.value, f"FEDMITR_CLUSTER={address!r}", "dask")


@pytest.mark.parametrize("process, wanted", [("LokyProcess-3", 1), ("LokyProcess-4", 0)])
def test_every_worker_computes_on_a_gpu_of_its_own(process, wanted, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(module.multiprocessing.current_process(), "_name", process)
    for name in ("FEDMITR_JOBS", "FEDMITR_STATIC", "FEDMITR_BACKEND", "FEDMITR_CLUSTER"):
        monkeypatch.setenv(name, "1")  # restored after the test
    assert module._in_worker(0, [], str, 5, 7) == (5, "7") and chosen == [wanted]
    assert module._in_worker(os.getpid(), [], str, 5, 7) == (5, "7") and len(chosen) == 1  # no worker
