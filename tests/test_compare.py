"""compare.py: the table of runs and the paired interval, against scipy."""

import importlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedmitr.compare import summarise
from fedmitr.settings import PartitionSettings, Settings

module = importlib.import_module("fedmitr.compare")


@pytest.fixture
def runs():
    rng = np.random.default_rng(0)
    rows = [
        dict(method=m, task="digits", alpha=0.1, clients=5, seed=s, accuracy=rng.uniform(0.3, 0.8))
        for s in range(5)
        for m in ("fedavg", "fedmitr", "ensemble")
    ]
    return pd.DataFrame(rows)


def of(runs, method):
    return runs[runs["method"] == method].sort_values("seed")["accuracy"].to_numpy()


def test_the_paired_difference_and_its_interval_are_scipys(runs):
    table = summarise(runs)
    for method in ("fedavg", "ensemble"):
        paired = stats.ttest_rel(of(runs, method), of(runs, "fedmitr")).confidence_interval(0.95)
        row = table.loc[method]
        assert row["minus fedmitr"] == pytest.approx((paired.low + paired.high) / 2)
        assert row["± 95 %"] == pytest.approx((paired.high - paired.low) / 2)


def test_mean_and_deviation_are_over_the_seeds(runs):
    table = summarise(runs)
    assert list(table.index) == ["fedavg", "fedmitr", "ensemble"]
    for method in table.index:
        values = of(runs, method)
        assert table.loc[method, "mean"] == pytest.approx(values.mean())
        assert table.loc[method, "std"] == pytest.approx(values.std(ddof=1))
        assert table.loc[method, "seeds"] == 5
    assert table.loc["fedmitr", "minus fedmitr"] == 0


def test_the_order_of_the_rows_does_not_matter(runs):
    shuffled = runs.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(summarise(shuffled).sort_index(), summarise(runs).sort_index())


def test_without_fedmitr_or_with_one_seed_there_is_no_interval(runs):
    assert summarise(runs[runs["method"] != "fedmitr"])[["minus fedmitr", "± 95 %"]].isna().all(axis=None)
    one = summarise(runs[runs["seed"] == 0])
    assert one["± 95 %"].isna().all() and one["minus fedmitr"].notna().all()


def test_every_method_is_run_on_every_setting_and_written_as_it_goes(tmp_path, monkeypatch):
    out, written, calls = tmp_path / "deep" / "runs.csv", [], []

    def run(method, settings, store):
        written.append(len(pd.read_csv(out)) if out.exists() else 0)
        calls.append((settings.seed, method, store))
        return SimpleNamespace(
            method=method, task="digits", alpha=0.3, clients=4, seed=settings.seed, accuracy=1 / 3
        )

    monkeypatch.setattr(module, "run", run)
    settings = [Settings(seed=s, partition=PartitionSettings(clients=4)) for s in (0, 2)]
    table = module.compare(["fedmitr", "local"], settings, tmp_path, out)
    assert calls == [(s, m, tmp_path) for s in (0, 2) for m in ("fedmitr", "local")]
    assert written == [0, 1, 2, 3]
    assert list(table.columns) == ["method", "task", "alpha", "clients", "seed", "accuracy"]
    pd.testing.assert_frame_equal(pd.read_csv(out), table, rtol=1e-5)
    assert out.read_text().splitlines()[1] == "fedmitr,digits,0.300000,4,0,0.333333"
