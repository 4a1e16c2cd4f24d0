"""cost.py: accuracy against ε, from runs that protect all that is sent."""

import math

import pandas as pd
import pytest
from click.testing import CliRunner
from helpers import SMALL_SETTINGS, small_settings

import fedmitr as fm
import fedmitr.privacy.cost as module
from fedmitr.core.errors import BadInput
from fedmitr.experiments import clients
from fedmitr.privacy.cost import cost, half_of, parse_epsilons, protection

opacus = pytest.importorskip("opacus.accountants")
METHODS, EPSILONS, SEEDS = ("ridge", "fedavg"), (8.0,), (0, 1)
SMALL = {"profile": "smoke", "methods": METHODS, "epsilons": EPSILONS, "seeds": SEEDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cost")


@pytest.fixture(scope="module")
def table(folder):
    return cost(SMALL_SETTINGS, **SMALL, store=folder / "store", out=folder / "a.csv")


def test_there_is_a_row_for_each_run_with_its_spent_epsilon(table):
    grid = [(m, e, s) for s in SEEDS for m in METHODS for e in (math.inf, *EPSILONS)]
    assert list(zip(table["method"], table["epsilon"].fillna(math.inf), table["seed"], strict=True)) == grid
    assert table["spent"].isna().equals(table["epsilon"].isna())
    protected = table.dropna()
    assert (protected["spent"] <= protected["epsilon"]).all()
    assert (protected["spent"] >= 0.998 * protected["epsilon"]).all()
    assert set(table["delta"]) == {1e-5} and table["accuracy"].between(0, 1).all()


def test_a_row_is_that_of_a_run(table, tmp_path):
    changes = {"statistics.dp_epsilon": 8.0, "seed": 1}
    settings = fm.Settings.load("smoke", SMALL_SETTINGS | changes, "ridge")
    wanted = fm.Experiment(settings, tmp_path).result("ridge")
    (found,) = table.query("method == 'ridge' and epsilon == 8 and seed == 1").to_dict("records")
    assert (found["accuracy"], found["spent"]) == (wanted.accuracy, wanted.epsilon)


def test_the_same_call_goes_on_from_the_store_and_writes_the_same_bytes(table, folder, forbid):
    forbid(clients, "train_client", "sent_statistics")
    again = cost(SMALL_SETTINGS, **SMALL, store=folder / "store", out=folder / "b.csv")
    pd.testing.assert_frame_equal(again, table)
    assert (folder / "b.csv").read_bytes() == (folder / "a.csv").read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(folder / "a.csv"), table, atol=1e-6, rtol=0)


@pytest.mark.parametrize("target", [1.0, 3.0, 30.0])
def test_two_halves_spend_what_was_asked_for(target):
    each = opacus.utils.get_noise_multiplier(
        target_epsilon=half_of(target, 1e-5), target_delta=1e-5, sample_rate=1.0, steps=1, accountant="rdp"
    )
    accountant = opacus.RDPAccountant()
    for _ in range(2):
        accountant.step(noise_multiplier=each, sample_rate=1.0)
    assert accountant.get_epsilon(1e-5) == pytest.approx(target, rel=0.02)


def test_every_part_that_is_sent_is_protected():
    settings = small_settings()
    assert protection("fedmitr", settings, None) == {}
    names = {m: set(protection(m, settings, 3.0)) for m in ("ridge", "fedmitr", "fedmitr_plus")}
    weights = {"client.dp_epsilon", "client.dp_delta"}
    sums = {"statistics.dp_epsilon", "statistics.dp_delta"}
    assert names == {"ridge": sums, "fedmitr": weights, "fedmitr_plus": weights | sums}
    counted = settings.changed({"ensemble.mode": "class"})
    assert protection("fedmitr", counted, 3.0)["ensemble.mode"] == "size"
    both = protection("fedmitr_plus", settings, 3.0)
    assert both["client.dp_epsilon"] == both["statistics.dp_epsilon"] < 3.0


def test_what_cannot_work_is_one_line_before_any_work(forbid, tmp_path, one_line):
    forbid(clients, "train_client", "sent_statistics")
    with pytest.raises(BadInput) as error:
        cost(SMALL_SETTINGS, **SMALL | {"methods": ("ridge", "fusefl")}, store=tmp_path)
    one_line(error.value, "fusefl")
    for text in ("a", "1,0", "-1", "inf", ""):
        with pytest.raises(BadInput) as error:
            parse_epsilons(text)
        one_line(error.value, f"epsilons={text!r}")
    assert parse_epsilons("1,10,1") == [1.0, 10.0]
    done = CliRunner().invoke(module.main, ["--seeds", "x", "--store", str(tmp_path)])
    assert done.exit_code == 1 and "seeds='x'" in done.stderr and done.stdout == ""
