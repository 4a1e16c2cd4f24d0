"""experiment.py: every method from settings to result: its account, its place in the store, hard settings."""

import importlib
import math
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

import fedmitr as fm
import fedmitr.experiments.run as module
from fedmitr.client.fusefl import FusionClient
from fedmitr.evaluation.flops import forward_flops
from fedmitr.evaluation.metrics import accuracy
from fedmitr.experiments.result import code_text
from fedmitr.methods import METHODS
from fedmitr.settings import Settings

GENERATORS = ("fdafl", "dense", "co_boosting", "fedftg")
DISTILLED = ("fedmitr", "fadi", *GENERATORS)
SMALL = {
    "task.test": 0.05,
    "task.validation": 0.85,
    "model.pretrained": False,
    "model.image_size": 12,
    "partition.clients": 2,
    "partition.alpha": 100.0,
    "client.epochs": 1,
    "ensemble.mode": "mean_probs",
    "inversion.teacher": "ensemble",  # needs no histograms
    "inversion.images": 20,
    "inversion.batch_size": 10,
    "inversion.iterations": 5,
    "inversion.stop_at": [1, 2, 3, 4],
    "inversion.stop_ratio": [0.3] * 4,
    "distill.steps": 6,
    "distill.batch_size": 8,
    "distill.views": 2,
}
SMALL |= {
    f"{method}.{name}": value
    for method in GENERATORS
    for name, value in dict(rounds=2, generator_steps=2, width=4, latent=5).items()
}
SMALL |= {"fdafl.batch_size": 8, "fedftg.batch_size": 8, "fadi.iterations": 5}


def small(**changes):
    """Two clients of about ninety 12×12 images; changes by dotted name, with __ for the dot."""
    return Settings.load("smoke", SMALL | {name.replace("__", "."): v for name, v in changes.items()})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def these(store):
    return fm.Experiment(small(), store)


@pytest.fixture(scope="module")
def results(these):
    return {method: these.result(method) for method in METHODS}


@pytest.fixture
def no_work(forbid):
    """Whatever trains, inverts or distils fails."""
    forbid(module, "train_client")
    forbid(FusionClient, "_train")
    for method, name in [("fedmitr", "invert"), ("fedmitr", "distill"), ("fadi", "invert")]:
        forbid(importlib.import_module(f"fedmitr.methods.{method}"), name)
    for method in ("generator", "fdafl", "fedftg"):
        forbid(importlib.import_module(f"fedmitr.methods.{method}"), "take_step")
    forbid(importlib.import_module("fedmitr.methods.rounds"), "train_student")


# The account.


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reports_an_accuracy_and_a_whole_account(results, method):
    result = results[method]
    assert result.method == method and 0 <= result.accuracy <= 1 and len(result.accuracy_per_class) == 10
    assert all(0 <= share <= 1 for share in result.accuracy_per_class)
    stages = {"fedmitr": {"inversion", "distillation"}, "fadi": {"inversion", "distillation"}}
    stages |= {name: {"generation", "distillation"} for name in GENERATORS} | {"fusefl": {"fusing"}}
    clients = {"central"} if method == "central" else {"clients"}
    assert set(result.seconds) == clients | stages.get(method, set())
    assert all(value >= 0 for value in result.seconds.values())


def test_under_an_equal_budget_all_that_distil_make_as_many_images_and_steps(results):
    for method, result in results.items():
        wanted = (20, 6) if method in DISTILLED else (0, 0)
        assert (result.synthetic_images, result.student_steps) == wanted, method


def test_under_its_own_budget_a_method_has_the_numbers_of_its_block(store):
    own = {f"{method}__images": 4 + i for i, method in enumerate(GENERATORS)}
    own |= {f"{method}__student_steps": 3 + i for i, method in enumerate(GENERATORS)}
    own = fm.Experiment(small(budget="own", **own), store)
    for i, method in enumerate(GENERATORS):
        outcome = own.outcome(method)
        assert (len(outcome.synthetic), outcome.student_steps) == (4 + i, 3 + i), method
    for method in ("fedmitr", "fadi"):
        outcome = own.outcome(method)
        assert (len(outcome.synthetic), outcome.student_steps) == (20, 6), method


def test_bytes_up_and_down_are_those_of_the_files(results, these, store, tmp_path):
    folders = [store / "uploads" / these.upload_key(k) for k in range(2)]
    counted = sum(
        (f / name).stat().st_size for f in folders for name in ("weights.safetensors", "upload.json")
    )
    histograms = [",".join(map(str, u.class_counts)) for u in these._everyone]
    without = counted - sum(len(f"[{h}]") - len("null") for h in histograms)
    save_file(these.initial.state_dict(), tmp_path / "shared.safetensors")
    shared = 2 * (tmp_path / "shared.safetensors").stat().st_size
    for method, result in results.items():
        up = {"fedftg": counted, "local": 0, "central": 0}.get(method, without)
        if method != "fusefl":  # several messages: tests/test_fusefl.py
            assert result.upload_bytes == up, method
            assert result.download_bytes == (0 if method == "central" else shared), method


def test_exchanges_are_one_but_for_fusefl_and_what_is_not_federated(results):
    found = {method: result.exchanges for method, result in results.items()}
    assert found == dict.fromkeys(METHODS, 1) | {"fusefl": 2, "local": 0, "central": 0}


def test_inference_costs_one_model_or_all_of_them(results, these):
    one = forward_flops(these.initial, 9) + 2 * 96 * 10  # and the head
    for method, result in results.items():
        assert result.inference_flops == one * (2 if method in ("ensemble", "fusefl") else 1), method


# The store.


def state_of(outcome):
    states = [m.state_dict() for m in outcome.models]
    return [{n: v.clone() for n, v in s.items()} for s in states], outcome.synthetic


def equal(one, other):
    (states, images), (others, other_images) = one, other
    pairs = zip(states, others, strict=True)
    alike = all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in pairs)
    return alike and (images is None or torch.equal(images.pixels, other_images.pixels))


@pytest.mark.parametrize("method", METHODS)
def test_a_second_run_comes_from_the_store_and_nothing_is_trained(results, these, store, method, no_work):
    again = fm.Experiment(small(), store)
    assert again.result(method) == results[method]
    assert equal(state_of(again.outcome(method)), state_of(these.outcome(method)))


def test_the_same_settings_give_the_same_models_in_another_store(results, these, tmp_path):
    fresh = fm.Experiment(small(), tmp_path)
    for method in METHODS:
        assert equal(state_of(fresh.outcome(method)), state_of(these.outcome(method))), method


# The evaluation.


@pytest.fixture
def unmeasured(results, store, tmp_path):
    """The same models in a store of which nothing has been evaluated."""
    copy = tmp_path / "unmeasured"
    shutil.copytree(store, copy, ignore=shutil.ignore_patterns("runs", "references"))
    return copy


def test_an_image_goes_once_through_every_model(unmeasured, results, no_work, block_passes):
    one, images = fm.Experiment(small(), unmeasured), 90

    def models_run(method, experiment):
        block_passes.clear()
        assert experiment.result(method) == results[method]
        return sum(n for n in block_passes if n > 1) / 4 / images  # one image is for the operations counted

    assert len(one.task.test) == images
    assert models_run("fedmitr", one) == 1 + 2 + 1  # the global model, the clients', their average
    for method in ("ensemble", "local", "fedavg"):
        assert models_run(method, fm.Experiment(small(), unmeasured)) == 0
    assert models_run("central", one) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_references_answer_what_their_models_answer_one_image_at_a_time(unmeasured, no_work, precision):
    experiment = fm.Experiment(small(ensemble__precision=precision), unmeasured)
    images, found = experiment.task.test.images, experiment.reference_predictions
    assert {name: len(rows) for name, rows in found.items()} == {"ensemble": 1, "fedavg": 1, "local": 2}
    for name, rows in found.items():
        whole = name == "ensemble" and precision == "bf16"  # which rounds otherwise in another batch
        batches = images.split(len(images) if whole else 1)
        with torch.inference_mode():
            for model, row in zip(experiment.models(name), rows, strict=True):
                assert row.tolist() == [c for batch in batches for c in model(batch).argmax(1).tolist()], name


# Who is asked for its class histogram.


def given_to_methods(these, monkeypatch):
    """What every method gets, none of them run."""
    seen = {}
    for method in METHODS:
        monkeypatch.setitem(METHODS, method, lambda given, *_, name=method: seen.update({name: given}))
        these.outcome(method)
    return seen


def test_only_fedftg_is_given_class_histograms_where_the_ensemble_needs_none(results, these, monkeypatch):
    seen = given_to_methods(these, monkeypatch)
    for method in set(METHODS) - {"fusefl", "central"}:
        counted = [u.class_counts is not None for u in seen[method]]
        assert counted == [method == "fedftg"] * 2, method
    assert [type(c) for c in seen["fusefl"]] == [FusionClient] * 2 and len(seen["central"]) == 1


def test_class_mode_asks_everyone(results, store, monkeypatch, no_work):
    seen = given_to_methods(fm.Experiment(small(ensemble__mode="class"), store), monkeypatch)
    for method in set(METHODS) - {"fusefl", "central"}:
        assert all(u.class_counts for u in seen[method]), method


# Hard settings.

SKEWED = {
    "ten clients of one class": dict(
        partition__clients=10,
        partition__scheme="shards",
        partition__classes_per_client=1,
        partition__min_size=1,
        ensemble__mode="class",
    ),
    "twenty clients of extreme skew": dict(
        partition__clients=20, partition__alpha=0.01, partition__min_size=2
    ),
}


@pytest.mark.parametrize("name", SKEWED)
def test_every_method_survives(name, tmp_path):
    hard = fm.Experiment(small(**SKEWED[name]), tmp_path)
    sizes = [len(shard) for shard in hard.shards]
    assert len(sizes) == SKEWED[name]["partition__clients"] and sum(sizes) == 179
    for method in METHODS:
        if len(sizes) < 20 or method != "fusefl":  # which runs every client's blocks at every client
            for model in hard.outcome(method).models:
                assert all(torch.isfinite(p).all() for p in model.parameters()), method
                assert 0 <= accuracy(model, hard.task.test) <= 1, method
    assert math.isfinite(hard.result("dense").accuracy)


@pytest.mark.parametrize(
    "method, changes, name",
    [
        ("dense", dict(partition__clients=400), "partition.clients=400"),
        ("fusefl", dict(fusefl__stages=5), "fusefl.stages=5"),
        ("nobody", {}, "method='nobody'"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(method, changes, name, tmp_path, one_line, no_work):
    with pytest.raises(fm.BadInput) as error:
        fm.run(method, small(**changes), tmp_path)
    one_line(error.value, name)


# A method of the reader's own.


def test_a_method_of_your_own_is_run_and_run_anew_when_it_changes(results, these, monkeypatch):
    runs = []

    def mine(uploads, settings, store):
        runs.append("mine")
        return METHODS["fedavg"](uploads, settings, store)

    def changed(uploads, settings, store):
        runs.append("changed")
        return METHODS["fedavg"](uploads, settings, store)

    for method in (mine, mine, changed):
        monkeypatch.setitem(METHODS, "mine", method)
        found = these.result("mine")
        assert found.method == "mine" and found.accuracy == results["fedavg"].accuracy
        assert found.upload_bytes == results["fedavg"].upload_bytes
    assert runs == ["mine", "changed"]


def test_an_experiment_computes_with_the_threads_of_its_settings(tmp_path):
    before = torch.get_num_threads()
    try:
        keys = [fm.Experiment(small(threads=n), tmp_path).upload_key(0) for n in (1, 2)]
        assert torch.get_num_threads() == 2 and keys[0] != keys[1]
    finally:
        torch.set_num_threads(before)


def test_a_method_of_your_own_is_told_by_its_body_not_by_where_it_stands():
    def method(uploads, settings, store):
        return [u for u in uploads if u.size > 3]

    first = code_text(method)

    def method(uploads, settings, store):
        return [u for u in uploads if u.size > 3]

    assert code_text(method) == first

    def method(uploads, settings, store):
        return [u for u in uploads if u.size > 4]

    assert code_text(method) != first
    assert code_text(partial(method, None)) == code_text(partial(method, 1))
