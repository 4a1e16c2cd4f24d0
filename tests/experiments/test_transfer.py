"""transfer.py: the same clients from starts that saw letters for longer and longer."""

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from helpers import SMALL_SETTINGS, small_settings

import fedmitr as fm
import fedmitr.experiments.transfer as module
from fedmitr.core.errors import BadInput
from fedmitr.experiments import clients, run
from fedmitr.experiments.pretrain import pretrain
from fedmitr.experiments.transfer import transfer

LENGTHS, METHODS, SEEDS = (2, 0), ("central", "local"), (0, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def table(folder):
    return transfer(
        SMALL_SETTINGS, "smoke", LENGTHS, METHODS, SEEDS, folder / "store", folder / "out" / "a.csv"
    )


def by_hand(models, split):
    """The share of images on which a model's largest logit is the label's, the mean over models."""
    with torch.no_grad():
        hits = [(model(split.images).argmax(1) == split.labels).sum().item() for model in models]
    return sum(hits) / len(hits) / len(split)


def test_a_row_is_the_validation_accuracy_of_a_run_from_that_start(table, folder, tmp_path):
    grid = [(steps, seed, method) for steps in LENGTHS for seed in SEEDS for method in METHODS]
    assert list(zip(table["steps"], table["seed"], table["method"], strict=True)) == grid
    weights = {0: fm.create_vit("vit_micro", 52), 2: pretrain("vit_micro", 2)}
    for steps, vit in weights.items():
        file = tmp_path / f"{steps}.safetensors"
        module.write_tensors(vit.state_dict(), file)
        start = {"model__name": "vit_micro_early", "model__checkpoint": str(file)}
        changes = {"model__pretrained": True, **start, "seed": 1}
        experiment = fm.Experiment(small_settings(**changes), tmp_path / "store")
        for method in METHODS:
            found = table.query("steps == @steps and seed == 1 and method == @method")["accuracy"].item()
            assert found == by_hand(experiment.models(method), experiment.task.validation), (steps, method)
    assert table["accuracy"].nunique() > 2  # else any mix-up would pass


def test_the_same_call_goes_on_from_the_store_and_writes_the_same_bytes(table, folder, forbid):
    forbid(module, "pretrain")
    forbid(clients, "train_client")
    forbid(run, "accuracy")
    file = folder / "out" / "b.csv"
    again = transfer(SMALL_SETTINGS, "smoke", LENGTHS, METHODS, SEEDS, folder / "store", file)
    assert again.equals(table)
    assert file.read_bytes() == (folder / "out" / "a.csv").read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(file), table, atol=1e-6, rtol=0)


def test_a_run_that_is_stopped_leaves_what_it_finished(table, folder, monkeypatch):
    def stop(store, pairs):
        if pairs[0][1].seed == 1:
            raise KeyboardInterrupt
        return [(method, 0.5) for method, _ in pairs]

    monkeypatch.setattr(module, "_accuracies", stop)
    file = folder / "out" / "c.csv"
    with pytest.raises(KeyboardInterrupt):
        transfer(SMALL_SETTINGS, "smoke", LENGTHS, METHODS, SEEDS, folder / "store", file)
    assert pd.read_csv(file)["method"].tolist() == list(METHODS)


def test_starts_that_ship_are_not_trained_again(forbid, monkeypatch, tmp_path):
    forbid(module, "pretrain")
    asked = []

    def record(store, pairs):
        ((method, settings),) = pairs
        asked.append((settings.model.name, settings.model.checkpoint, settings.seed))
        return [(method, 0.5)]

    monkeypatch.setattr(module, "_accuracies", record)
    lengths = [module.STEPS["vit_micro_early"], module.STEPS["vit_micro"]]
    transfer(SMALL_SETTINGS, "smoke", lengths, ("fedavg",), (3,), tmp_path)
    assert asked == [("vit_micro_early", None, 3), ("vit_micro", None, 3)]


def test_what_cannot_work_is_one_line_before_any_work(forbid, tmp_path, one_line):
    forbid(module, "pretrain")
    forbid(clients, "train_client")
    with pytest.raises(BadInput) as error:
        transfer(SMALL_SETTINGS, "smoke", LENGTHS, ("central", "fedprox"), SEEDS, tmp_path)
    one_line(error.value, "method='fedprox'")
    for words, told in (
        (["--seeds", "a-b"], "seeds='a-b'"),
        (["--lengths", "400,x"], "lengths='400,x'"),
        (["--lengths", "-1"], "lengths='-1'"),
        (["--set", "ensemble.anker=true"], "'ensemble.anker' is unknown"),
        (["--set", "distill.start=statistics"], "ensemble.anchor=true"),
    ):
        done = CliRunner().invoke(module.main, [*words, "--store", str(tmp_path)])
        assert done.exit_code == 1 and done.stdout == ""
        assert told in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_chosen_lengths_and_settings_are_printed_and_leave_the_stored_table(monkeypatch, tmp_path):
    asked = []

    def note(overrides, profile, lengths, methods, seeds, store, out):
        asked.append((overrides.get("statistics.views"), list(lengths), list(methods), list(seeds), out))
        return pd.DataFrame([(2, 0, "ridge", 0.5)], columns=list(module.COLUMNS))

    monkeypatch.setattr(module, "transfer", note)
    words = ["--lengths", "2", "--methods", "ridge", "--seeds", "0", "--set", "statistics.views=3"]
    done = CliRunner().invoke(module.main, words)
    assert done.exit_code == 0 and "0.500" in done.stdout
    file = tmp_path / "a.csv"
    assert CliRunner().invoke(module.main, [*words, "--out", str(file)]).exit_code == 0
    assert CliRunner().invoke(module.main, ["--seeds", "0"]).exit_code == 0
    stored = module.home() / "results" / "transfer.csv"
    assert [one[-1] for one in asked] == [None, file, stored]
    assert asked[0][:4] == (3, [2], ["ridge"], [0]) and asked[2][:2] == (None, list(module.LENGTHS))
