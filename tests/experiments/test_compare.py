"""compare.py: the grid of runs, on clients and methods that do nothing but take notes, and its table."""

import importlib
from types import SimpleNamespace

import pandas as pd
import pytest
from helpers import registrations_taken_back, small_settings
from joblib.externals.loky import get_reusable_executor

from fedmitr.core.errors import BadInput
from fedmitr.experiments import clients as made
from fedmitr.experiments.compare import parse_seeds
from fedmitr.methods import Method, Outcome, register
from fedmitr.settings import Settings, SettingsBlock, setting
from fedmitr.settings.schema import PartitionSettings

module = importlib.import_module("fedmitr.experiments.compare")

ACCOUNT = ["exchanges", "upload_bytes", "download_bytes", "synthetic_images", "student_steps"]
COLUMNS = ["method", "task", "alpha", "clients", "seed", "accuracy", *ACCOUNT, "inference_flops"]
GRID = [(seed, method) for seed in (0, 2) for method in ("fedmitr", "local")]


@pytest.fixture
def notes(monkeypatch):
    """What was asked of experiments, in order; seed 13 is bad input."""
    asked = []

    class Experiment:
        def __init__(self, settings, store):
            self.settings, self.shards = settings, range(settings.partition.clients)
            self.store = SimpleNamespace(root=store)

        def check(self, methods):
            asked.append(("check", self.settings.seed, *methods))
            if self.settings.seed == 13:
                raise BadInput("seed=13 is unlucky")

        def upload_key(self, client):
            return f"{self.settings.seed} {client}"

        def train(self, client):
            asked.append(("train", self.settings.seed, client))

        def result(self, method):
            seed = self.settings.seed
            asked.append(("run", seed, method))
            account = {name: 7 for name in [*ACCOUNT, "inference_flops"]}
            seconds = {"clients": 2.5, "inversion": 1.25, "distillation": 0.5}
            known = dict(method=method, task="digits", alpha=0.3, clients=4, seed=seed, accuracy=1 / 3)
            return SimpleNamespace(**known, **account, seconds=seconds)

    monkeypatch.setattr(module, "Experiment", Experiment)
    monkeypatch.setenv("FEDMITR_JOBS", "1")
    return asked


def settings_of(*seeds):
    return [Settings(seed=s, partition=PartitionSettings(clients=4)) for s in seeds]


def test_everything_is_checked_then_every_client_trained_then_every_method_run(notes, tmp_path):
    module.compare(["fedmitr", "local"], settings_of(0, 2), tmp_path)
    clients = [("train", s, k) for s in (0, 2) for k in range(4)]
    checks = [("check", s, "fedmitr", "local") for s in (0, 2)]
    assert notes == [*checks, *clients, *(("run", s, m) for s, m in GRID)]


def test_clients_that_settings_share_are_trained_once(notes, tmp_path):
    (one,) = settings_of(0)
    module.compare(["local"], [one, one.model_copy(update={"budget": "own"}), *settings_of(2)], tmp_path)
    assert [n for n in notes if n[0] == "train"] == [("train", s, k) for s in (0, 2) for k in range(4)]
    assert [n for n in notes if n[0] == "run"] == [("run", s, "local") for s in (0, 0, 2)]


def test_clients_are_trained_only_where_some_method_needs_their_weights(notes, tmp_path):
    module.compare(["ridge", "central_ridge", "ncm"], settings_of(0), tmp_path)
    assert not [note for note in notes if note[0] == "train"]
    module.compare(["ridge", "fedavg"], settings_of(0), tmp_path)
    assert [note for note in notes if note[0] == "train"] == [("train", 0, k) for k in range(4)]


def test_methods_on_statistics_are_compared_on_clients_that_never_train(tmp_path, monkeypatch, forbid):
    monkeypatch.setenv("FEDMITR_JOBS", "1")
    forbid(made, "train_client")
    methods = ["ncm", "ridge", "lda", "fishermix", "central_ridge"]
    table = module.compare(methods, [small_settings(seed=seed) for seed in (0, 1)], tmp_path)
    assert list(table["method"]) == methods * 2 and not (tmp_path / "uploads").exists()
    ridge, central = (table[table["method"] == name] for name in ("ridge", "central_ridge"))
    assert list(ridge["accuracy"]) == list(central["accuracy"])
    assert (ridge["upload_bytes"] > 0).all() and (central["upload_bytes"] == 0).all()
    assert (table["client_seconds"][table["method"] == "ridge"] > 0).all()


def test_a_bad_setting_anywhere_stops_before_any_work(notes, tmp_path):
    with pytest.raises(BadInput, match="seed=13"):
        module.compare(["fedmitr"], settings_of(0, 13), tmp_path, tmp_path / "runs.csv")
    assert [kind for kind, *_ in notes] == ["check", "check"] and not (tmp_path / "runs.csv").exists()


@pytest.mark.parametrize(
    "method, change, name",
    [
        ("fedavg", {"partition.clients": 900}, "partition.clients=900"),
        ("fusefl", {"fusefl.stages": 9}, "fusefl.stages=9"),
        ("nobody", {}, "method='nobody'"),
    ],
)
def test_what_cannot_work_is_found_before_anything_is_trained(
    method, change, name, tmp_path, monkeypatch, forbid, one_line
):
    monkeypatch.setenv("FEDMITR_JOBS", "1")
    forbid(made, "train_client", "sent_statistics")
    settings = [Settings.load("smoke"), Settings.load("smoke", {"seed": 1, **change})]
    with pytest.raises(BadInput) as error:
        module.compare([method], settings, tmp_path)
    one_line(error.value, name)


def test_the_table_is_written_after_every_run_and_its_times_beside_it(notes, tmp_path, monkeypatch):
    out, written, write = tmp_path / "deep" / "runs.csv", [], module.write_table

    def record(table, out):
        write(table, out)
        written.append([len(pd.read_csv(p)) for p in (out, tmp_path / "deep" / "runs_seconds.csv")])

    monkeypatch.setattr(module, "write_table", record)
    table = module.compare(["fedmitr", "local"], settings_of(0, 2), tmp_path, out)
    assert written == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert list(table.columns) == [*COLUMNS, "client_seconds", "server_seconds"]
    found, seconds = pd.read_csv(out), pd.read_csv(tmp_path / "deep" / "runs_seconds.csv")
    pd.testing.assert_frame_equal(found, table[COLUMNS], rtol=1e-5)
    assert out.read_text().splitlines()[1] == "fedmitr,digits,0.300000,4,0,0.333333,7,7,7,7,7,7"
    assert list(seconds.columns) == ["method", "seed", "client_seconds", "server_seconds"]
    assert seconds.to_numpy()[:, 2:].tolist() == [[2.5, 1.75]] * 4


def test_rows_stand_in_the_grids_order_whatever_finishes_first(notes, tmp_path, monkeypatch):
    order, out, seen = [2, 0, 3, 1], tmp_path / "runs.csv", []

    def finish_in_another_order(function, items):
        for index in order if len(items) == 4 else range(len(items)):
            yield index, function(items[index])
            if out.exists():
                rows = pd.read_csv(out)
                seen.append(list(zip(rows["seed"], rows["method"], strict=True)))

    monkeypatch.setattr(module, "parallel", finish_in_another_order)
    table = module.compare(["fedmitr", "local"], settings_of(0, 2), tmp_path, out)
    assert list(zip(table["seed"], table["method"], strict=True)) == GRID
    assert seen == [[GRID[i] for i in sorted(order[:n])] for n in (1, 2, 3, 4)]


def test_an_out_that_cannot_be_written_is_one_line_before_any_work(notes, tmp_path, one_line):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput) as error:
        module.compare(["fedavg"], settings_of(0), tmp_path, tmp_path / "file" / "runs.csv")
    one_line(error.value, "out=")
    assert notes == []


@pytest.mark.parametrize(
    "text, seeds", [("0-4", [0, 1, 2, 3, 4]), ("1,3,5", [1, 3, 5]), ("7", [7]), ("0-1, 4", [0, 1, 4])]
)
def test_seeds_are_read(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-2-3", "1.5"])
def test_seeds_that_cannot_be_read_are_one_line(text, one_line):
    with pytest.raises(BadInput) as error:
        parse_seeds(text)
    one_line(error.value, f"seeds={text!r}")


# A method of the reader's own.


@pytest.fixture
def own():
    """The first client's model, registered in this process alone, with a block of settings."""

    class MineSettings(SettingsBlock):
        """Mine: whose model it is."""

        client: int = setting(0, "the client whose model is taken")

    def mine(uploads, settings, store):
        return Outcome([uploads[settings.mine.client].vit()])

    with registrations_taken_back():
        register(Method("mine", mine, label="Mine", family="average", settings=MineSettings))
        yield
    get_reusable_executor().shutdown(wait=True)  # its workers know the method


def test_a_method_of_your_own_is_compared_in_worker_processes_as_in_this_one(own, tmp_path, monkeypatch):
    tables = []
    for jobs in ("1", "2"):
        monkeypatch.setenv("FEDMITR_JOBS", jobs)
        settings = [small_settings(seed=seed, mine__client=1) for seed in (0, 1)]
        tables.append(module.compare(["fedavg", "mine"], settings, tmp_path / jobs)[COLUMNS])
    pd.testing.assert_frame_equal(*tables)
    assert list(tables[0]["method"]) == ["fedavg", "mine"] * 2
    assert tables[0]["upload_bytes"].nunique() == 1 and (tables[0]["exchanges"] == 1).all()
