"""tune.py: equally many trials, the same for any number of workers, scored on validation images."""

import json
from statistics import fmean

import pandas as pd
import pytest
import yaml
from helpers import SMALL_SETTINGS, registrations_taken_back

import fedmitr as fm
from fedmitr.core.errors import BadInput
from fedmitr.methods import METHODS, Method, Outcome, Range, dotted, register
from fedmitr.settings import Settings
from fedmitr.settings import load as loading
from fedmitr.study import tune as module
from fedmitr.study.tune import COMPLETE, FAILED, STOPPED, Plan, best_values, search, tune, write_tuned

PLAN = Plan(trials=4, seeds=(0, 1), profile="smoke", overrides=SMALL_SETTINGS)
CHOSEN = ("ncm", "ridge", "fusefl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def table(folder):
    return tune(PLAN, CHOSEN, ("vit_micro",), folder / "store", folder / "a.csv")


def test_every_method_gets_as_many_trials_or_all_its_choices(table):
    counts = table.groupby("method").size()
    assert counts.to_dict() == {"ncm": 3, "ridge": 4, "fusefl": 4}
    ncm = [json.loads(values)["statistics.tokens"] for values in table[table["method"] == "ncm"]["values"]]
    assert sorted(ncm) == ["both", "cls", "patches"]


def test_the_first_trial_is_the_profiles_own_values(table):
    for method, some in table.groupby("method"):
        values = json.loads(some[some["trial"] == 0]["values"].item())
        own = PLAN.settings("vit_micro", 0)
        assert values == {name: dotted(own, name) for name in METHODS[method].search}
        assert some["state"].iloc[0] == COMPLETE


def test_an_accuracy_is_that_on_validation_images(table, tmp_path):
    for row in table[table["method"] == "ridge"].itertuples():
        settings = PLAN.settings("vit_micro", 0, json.loads(row.values))
        experiment = fm.Experiment(settings, tmp_path / "store")
        (model,) = experiment.models("ridge")
        held = experiment.task.validation
        found = (model(held.images).argmax(1) == held.labels).double().mean().item()
        assert table.loc[row.Index, "seed 0"] == pytest.approx(found, abs=1e-6)


def test_a_mean_is_over_the_seeds_that_a_trial_ran_on(table):
    columns = [f"seed {seed}" for seed in PLAN.seeds]
    for _, row in table.iterrows():
        ran = row[columns].dropna()
        assert row["accuracy"] == pytest.approx(fmean(ran))
        assert (row["state"] == COMPLETE) == (len(ran) == 2)
        assert row["state"] == COMPLETE or len(ran) == 1


def test_the_same_call_goes_on_from_its_table_and_writes_the_same_bytes(table, folder, forbid, tmp_path):
    forbid(module, "_measure")
    out = tmp_path / "b.csv"
    out.write_bytes((folder / "a.csv").read_bytes())
    again = tune(PLAN, CHOSEN, ("vit_micro",), tmp_path / "other", out)
    pd.testing.assert_frame_equal(again, table, atol=1e-6)
    assert out.read_bytes() == (folder / "a.csv").read_bytes()


def test_another_number_of_workers_gives_the_same_table(table, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDMITR_JOBS", "2")
    again = tune(PLAN, ("ncm", "ridge"), ("vit_micro",), tmp_path / "store", tmp_path / "c.csv")
    pd.testing.assert_frame_equal(again, table[table["method"] != "fusefl"].reset_index(drop=True))


def test_a_part_of_the_methods_leaves_the_rows_of_the_others(table, folder, tmp_path):
    out = tmp_path / "d.csv"
    out.write_bytes((folder / "a.csv").read_bytes())
    tune(PLAN, ("ncm",), ("vit_micro",), folder / "store", out)
    columns = ["method", "trial"]
    pd.testing.assert_frame_equal(
        pd.read_csv(out).sort_values(columns, ignore_index=True),
        table.sort_values(columns, ignore_index=True),
    )


def test_trials_under_other_settings_are_not_overwritten(folder, tmp_path, forbid, one_line):
    forbid(module, "_measure")
    out = tmp_path / "e.csv"
    out.write_bytes((folder / "a.csv").read_bytes())
    other = Plan(4, (0, 1), "smoke", SMALL_SETTINGS | {"task.scenes": 2})
    with pytest.raises(BadInput) as error:
        tune(other, ("ridge",), ("vit_micro",), tmp_path / "store", out)
    one_line(error.value, "e.csv", "ridge")
    assert out.read_bytes() == (folder / "a.csv").read_bytes()


def test_a_search_over_what_is_not_allowed_is_refused_before_any_work(tmp_path, forbid, one_line):
    forbid(module, "_measure", "train_clients")
    with registrations_taken_back():
        register(Method("half", lambda *_: None, family="average", search={"distill.lr": (1e-3, -1.0)}))
        with pytest.raises(BadInput) as error:
            tune(PLAN, ("half",), ("vit_micro",), tmp_path / "store")
    one_line(error.value, "distill.lr")


def played(method, accuracy_of, count=12):
    """All trials of a search whose accuracy is a function of values and seed."""
    rows = []
    trials = search(Plan(trials=count), "vit_micro", method, {}, rows.append)
    sent = None
    try:
        while True:
            _, settings = trials.send(sent)
            values = {name: dotted(settings, name) for name in method.search}
            sent = accuracy_of(values, settings.seed)
    except StopIteration:
        return pd.DataFrame(rows)


RIDGE = METHODS["ridge"]


def test_a_trial_stops_where_it_is_not_in_the_better_half_of_those_that_came_as_far():
    table = played(RIDGE, lambda values, seed: values["statistics.ridge"] / 1000)
    for number, row in table.iterrows():
        earlier = table["seed 0"][: number + 1].sort_values(ascending=False)
        if row["seed 0"] < earlier.iloc[max(0, len(earlier) // 2 - 1)]:
            assert row["state"] == STOPPED and pd.isna(row["seed 1"])
    kept = table[table["state"] == COMPLETE]["trial"]
    for number in kept:
        earlier = table["seed 0"][: number + 1].sort_values(ascending=False)
        assert table["seed 0"][number] >= earlier.iloc[max(0, len(earlier) // 2 - 1)]
    assert (table["state"] == STOPPED).any() and (table["state"] == COMPLETE).sum() > 1


def test_trials_move_to_where_accuracy_is_high():
    table = played(RIDGE, lambda values, seed: -abs(values["statistics.ridge"] - 30), count=40)
    penalty = [json.loads(values)["statistics.ridge"] for values in table["values"]]
    late, early = ([abs(p - 30) for p in part] for part in (penalty[25:], penalty[:10]))
    assert sorted(late)[len(late) // 2] < sorted(early)[len(early) // 2]


def test_a_trial_that_diverges_is_on_file_and_never_wins():
    table = played(RIDGE, lambda values, seed: None if values["statistics.ridge"] > 5 else 0.5)
    failed = table[table["state"] == FAILED]
    assert len(failed) and failed["accuracy"].isna().all()
    best = best_values(table)["vit_micro"]["ridge"]
    assert best["statistics.ridge"] <= 5


def test_of_equal_trials_the_first_wins_and_methods_may_be_tuned_as_another():
    rows = [
        ("vit_micro", "fedmitr_plus", 0, COMPLETE, 0.8, '{"statistics.ridge": 1.0}'),
        ("vit_micro", "fedmitr_plus", 1, COMPLETE, 0.8, '{"statistics.ridge": 2.0}'),
        ("vit_micro", "fedmitr_plus", 2, STOPPED, 0.9, '{"statistics.ridge": 3.0}'),
    ]
    found = best_values(
        pd.DataFrame(rows, columns=["start", "method", "trial", "state", "accuracy", "values"])
    )
    values = {"statistics.ridge": 1.0}
    same = ("fedmitr_plus", "calibrated_ensemble", "ensemble_statistics", "textures", "real_images")
    assert found == {"vit_micro": dict.fromkeys(same, values)}


def test_tuned_values_are_loaded_for_their_method_start_and_profile_alone(tmp_path, monkeypatch):
    path = tmp_path / "tuned.yaml"
    write_tuned(
        {"vit_micro": {"dense": {"dense.lr": 0.5, "inversion.stop_ratio": [0.3] * 4}}}, "laptop", path
    )
    write_tuned({"vit_micro": {"dense": {"dense.lr": 0.25}}}, "smoke", path)
    monkeypatch.setattr(
        loading, "shipped", lambda name: path if name == loading.TUNED else loading_shipped(name)
    )
    own = Settings.load("laptop", method="dense")
    assert own.dense.lr == 0.5 and own.inversion.stop_ratio == (0.3,) * 4
    assert Settings.load("smoke", method="dense").dense.lr == 0.25
    assert Settings.load("laptop", {"dense.lr": 0.125}, "dense").dense.lr == 0.125
    usual = Settings.load("laptop")
    assert Settings.load("laptop", method="fadi") == usual
    assert Settings.load("laptop", {"model.name": "vit_micro_early"}, "dense").dense == usual.dense
    assert Settings.load("laptop", {"task.name": "digits-plain"}, "dense").dense == usual.dense
    write_tuned({"vit_micro": {"fadi": {"fadi.rounds": 1}}}, "laptop", path)  # the others' values stay
    assert Settings.load("laptop", method="dense") == own
    assert Settings.load("laptop", method="fadi").fadi.rounds == 1


loading_shipped = loading.shipped


def test_a_method_with_few_choices_tries_each_on_all_seeds():
    table = played(METHODS["ncm"], lambda values, seed: 0.9 if values["statistics.tokens"] == "both" else 0.1)
    assert len(table) == 3 and set(table["state"]) == {COMPLETE}


@pytest.mark.parametrize(
    ("plan", "more", "word"),
    [
        (Plan(trials=0), {}, "trials=0"),
        (Plan(seeds=()), {}, "seeds"),
        (PLAN, {"methods": ["nope"]}, "nope"),
        (PLAN, {"starts": ["nope"]}, "nope"),
    ],
)
def test_bad_input_is_refused_before_any_work(plan, more, word, tmp_path, forbid, one_line):
    forbid(module, "_measure")
    with pytest.raises(BadInput) as error:
        tune(plan, more.get("methods", ["ridge"]), more.get("starts", ["vit_micro"]), tmp_path)
    one_line(error.value, word)


def test_a_table_of_something_else_is_not_overwritten(tmp_path, one_line):
    out = tmp_path / "mine.csv"
    out.write_text("a,b\n1,2\n")
    with pytest.raises(BadInput) as error:
        tune(PLAN, ["ridge"], ["vit_micro"], tmp_path / "store", out)
    one_line(error.value, "mine.csv")
    assert out.read_text() == "a,b\n1,2\n"


def test_a_method_of_your_own_is_tuned_like_any_other(tmp_path):
    def half(uploads, settings, store):
        return Outcome(METHODS["fedavg"].run(uploads, settings, store).models)

    with registrations_taken_back():
        register(
            Method("half", half, family="average", averages=True, search={"distill.lr": Range(1e-4, 1e-3)})
        )
        found = tune(Plan(2, (0,), "smoke", SMALL_SETTINGS), ["half"], ["vit_micro"], tmp_path)
    assert found["method"].tolist() == ["half", "half"] and found["accuracy"].notna().all()


def test_every_search_says_values_that_yaml_keeps():
    for method in METHODS.values():
        for allowed in method.search.values():
            if not isinstance(allowed, Range):
                plain = [json.loads(json.dumps(value)) for value in allowed]
                assert yaml.safe_load(yaml.safe_dump(plain)) == plain
