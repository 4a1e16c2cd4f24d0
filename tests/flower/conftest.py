"""Three clients of one run, as nodes of a Flower grid and as `fedmitr run` has them."""

import os

import pytest

import fedmitr as fm
from fedmitr.settings import parse_assignment

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Who writes the messages of this process; Flower's own processes set it."""
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(identity, name, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the stores of the clients, of the server and of `fedmitr run`."""
    return tmp_path_factory.mktemp("flower")


@pytest.fixture(scope="module")
def nodes(folder):
    """Three nodes, numbered otherwise than the clients they hold, each with its own store."""
    return {
        11 * (4 - k): {"partition-id": k, "num-partitions": 3, "store": str(folder / f"client{k}")}
        for k in range(3)
    }


@pytest.fixture(scope="module")
def experiment(folder):
    """The same clients as `fedmitr run` has them."""
    from flower_grid import SET

    settings = fm.Settings.load("smoke", dict(map(parse_assignment, SET.split())) | {"seed": 3})
    return fm.Experiment(settings, folder / "run")


@pytest.fixture
def config(tmp_path):
    """The run config; the server's store is new in every test."""
    from flower_grid import SET

    here = {"out": str(tmp_path / "global.safetensors"), "store": str(tmp_path / "store"), "wait": 0}
    return here | {"profile": "smoke", "seed": 3, "set": SET}
