"""scaling.py: costs that grow with clients, computed, and with workers, measured."""

import importlib
import os

import pytest
import torch
from tiny_runs import tiny

from fedmitr.core.errors import BadInput
from fedmitr.core.processes import VARIABLE
from fedmitr.core.store import Store
from fedmitr.evaluation.plan import plan
from fedmitr.experiments.run import Experiment
from fedmitr.experiments.scaling import processes, profiles, projection, strong_scaling
from fedmitr.settings import PROFILES, Settings

pipeline = importlib.import_module("fedmitr.methods.fedmitr")


# Computed.


def test_a_row_for_each_profile_is_its_plan():
    table = profiles()
    assert list(table.index) == list(PROFILES)
    stages = plan("fedmitr_plus", Settings.load("gpu"))
    assert table.loc["gpu", "TFLOP"] == pytest.approx(sum(s.flops for s in stages) / 1e12)
    assert table.loc["paper", "iterations"] == 4000 and table["memory, GB"].is_monotonic_increasing


def test_labels_cost_in_proportion_to_the_clients_unless_few_are_drawn():
    table = projection(Settings.load("laptop"), counts=(50, 100, 200, 1000))
    at = table.set_index(["way", "clients"])["server, TFLOP"].unstack()
    everyone, few = at.loc["every client"], at.loc["one client a class"]
    slope = (everyone[1000] - everyone[200]) / 800
    assert (everyone[200] - everyone[100]) / 100 == pytest.approx(slope, rel=1e-6)
    assert few.nunique() == 1
    grouped = at.loc["groups of 100 clients"]
    assert grouped[100] == everyone[100] and grouped[1000] > everyone[1000]  # no less work, but in parts
    memory = table.set_index(["way", "clients"])["memory, GB"].unstack()
    assert memory.loc["groups of 100 clients", 1000] == pytest.approx(memory.loc["every client", 1000])
    stages = plan("fedmitr_plus", Settings.load("laptop", {"partition.clients": 100}))
    assert everyone[100] == pytest.approx(sum(s.flops for s in stages if s.stage != "clients") / 1e12)


@pytest.mark.parametrize("features", [960, 192, 0])
def test_memory_of_the_server_grows_by_one_model_and_its_sums_a_client(features):
    """In memory a Gram matrix is whole, and float64."""
    sums = {"fedmitr_plus.regions": features == 960, "fedmitr_plus.statistics": features > 0}
    settings = Settings.load("laptop", sums)
    table = projection(settings, counts=(100, 200)).groupby("clients")["memory, GB"].max()
    weights = Experiment(settings).initial.state_dict().values()
    wanted = sum(4 * w.numel() for w in weights) + 8 * features * (features + 10)
    assert (table[200] - table[100]) * 1e9 == pytest.approx(100 * wanted, rel=1e-6)


# Measured.


def test_every_number_of_workers_inverts_the_same_batches(tmp_path, monkeypatch):
    seen, real = [], pipeline.synthetic_set

    def record(uploads, settings, store):
        assert settings.inversion.teacher == "owners" and uploads[0].class_counts
        seen.append((os.environ[VARIABLE], real(uploads, settings, store).pixels))
        return real(uploads, settings, store)

    monkeypatch.setattr("fedmitr.experiments.scaling.synthetic_set", record)
    before = os.environ.get(VARIABLE)
    settings = tiny(client__epochs=1, task__validation=0.7, task__test=0.2, partition__alpha=1.0)
    table = strong_scaling(settings, [1, 2], Store(tmp_path), repeats=1)
    assert [jobs for jobs, _ in seen] == ["1", "1", "2", "2"] and os.environ.get(VARIABLE) == before
    assert all(torch.equal(pixels, seen[0][1]) for _, pixels in seen)
    assert list(table["workers"]) == [1, 2] and table["speed-up"][0] == 1 and (table["seconds"] > 0).all()
    assert not (tmp_path / "synthetic").exists()  # timed anew, and nothing of it kept


def test_more_workers_than_batches_is_one_line(tmp_path, one_line):
    with pytest.raises(BadInput) as error:
        strong_scaling(tiny(), [1, 3], Store(tmp_path))
    one_line(error.value, "workers", "2 batches")


@pytest.mark.parametrize("before", [None, "7"])
def test_the_number_of_processes_is_as_before_afterwards(before, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    if before:
        monkeypatch.setenv(VARIABLE, before)
    with pytest.raises(KeyError), processes(3):
        assert os.environ[VARIABLE] == "3"
        raise KeyError
    assert os.environ.get(VARIABLE) == before


# Drawn.


def test_a_plan_counts_a_group_by_its_clients():
    """Of five clients in groups of two the last, alone, is distilled by nobody."""
    stages = plan("fedmitr_plus", Settings.load("laptop", {"partition.clients": 5, "distill.group": 2}))
    (groups,) = (s for s in stages if s.stage == "groups")
    pair = plan("fedmitr_plus", Settings.load("laptop", {"partition.clients": 2}))
    assert groups.flops == pytest.approx(2 * sum(s.flops for s in pair if s.stage != "clients"))
    assert "by 3 clients" in next(s.what for s in stages if s.stage == "labels")
