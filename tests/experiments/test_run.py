"""run.py: every method from settings to result: its account, its place in the store, hard settings."""

import importlib
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import GENERATORS, small_settings
from safetensors.torch import save_file

import fedmitr as fm
from fedmitr.client.fusefl import FusionClient
from fedmitr.evaluation.flops import forward_flops
from fedmitr.evaluation.metrics import accuracy
from fedmitr.methods import METHODS, Method

pipeline = importlib.import_module("fedmitr.methods.fedmitr")  # the package's name for it is the method
DISTILLED = ("fedmitr", "fadi", *GENERATORS)


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
    own = fm.Experiment(small_settings(budget="own", **own), store)
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
    counted -= sum(len(f',"sha256":"{u.digest}"') for u in these.counted_uploads)  # part of the transport
    histograms = [",".join(map(str, u.class_counts)) for u in these.counted_uploads]
    without = counted - sum(len(f"[{h}]") - len("null") for h in histograms)
    save_file(these.initial.state_dict(), tmp_path / "shared.safetensors")
    shared = 2 * (tmp_path / "shared.safetensors").stat().st_size
    for method, result in results.items():
        up = {"fedftg": counted, "local": 0, "central": 0}.get(method, without)
        if method != "fusefl":  # several messages: tests/client/test_fusefl.py
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
    again = fm.Experiment(small_settings(), store)
    assert again.result(method) == results[method]
    assert equal(state_of(again.outcome(method)), state_of(these.outcome(method)))


def test_the_same_settings_give_the_same_models_in_another_store(results, these, tmp_path):
    fresh = fm.Experiment(small_settings(), tmp_path)
    for method in METHODS:
        assert equal(state_of(fresh.outcome(method)), state_of(these.outcome(method))), method


# Which clients send their class histogram.


def given_to_methods(these, monkeypatch):
    """What every method gets, none of them run."""
    seen = {}
    for method in list(METHODS):
        note = replace(METHODS[method], run=lambda given, *_, name=method: seen.update({name: given}))
        monkeypatch.setitem(METHODS, method, note)
        these.outcome(method)
    return seen


def test_only_fedftg_is_given_class_histograms_where_the_ensemble_needs_none(results, these, monkeypatch):
    seen = given_to_methods(these, monkeypatch)
    for method in set(METHODS) - {"fusefl", "central"}:
        counted = [u.class_counts is not None for u in seen[method]]
        assert counted == [method == "fedftg"] * 2, method
    assert [type(c) for c in seen["fusefl"]] == [FusionClient] * 2 and len(seen["central"]) == 1


def test_in_class_mode_every_method_is_given_class_histograms(results, store, monkeypatch, no_work):
    seen = given_to_methods(fm.Experiment(small_settings(ensemble__mode="class"), store), monkeypatch)
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
    hard = fm.Experiment(small_settings(**SKEWED[name]), tmp_path)
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
        fm.run(method, small_settings(**changes), tmp_path)
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
        monkeypatch.setitem(METHODS, "mine", Method("mine", method))
        found = these.result("mine")
        assert found.method == "mine" and found.accuracy == results["fedavg"].accuracy
        assert found.upload_bytes == results["fedavg"].upload_bytes
    assert runs == ["mine", "changed"]


# The address of an upload.


def test_an_experiment_computes_with_the_threads_of_its_settings(tmp_path):
    before = torch.get_num_threads()
    try:
        keys = [fm.Experiment(small_settings(threads=n), tmp_path).upload_key(0) for n in (1, 2)]
        assert torch.get_num_threads() == 2 and keys[0] != keys[1]
    finally:
        torch.set_num_threads(before)


def test_the_class_histogram_leaves_a_client_only_where_ensemble_or_inversion_needs_it(
    results, store, no_work
):
    for mode, teacher in product(("mean_probs", "size", "class"), ("ensemble", "owners")):
        changed = small_settings(ensemble__mode=mode, inversion__teacher=teacher)
        sent = [u.class_counts for u in fm.Experiment(changed, store).uploads]
        assert all((counts is not None) == ("class" in mode or teacher == "owners") for counts in sent)


@pytest.mark.parametrize(
    "change, anew",
    [
        ({"client__lr": 0.5}, True),
        ({"partition__alpha": 0.5}, True),
        ({"task__clutter": 0.1}, True),
        ({"seed": 9}, True),
        ({"model__pretrained": True}, True),
        ({"inversion__lr": 0.1}, False),
        ({"distill__steps": 9}, False),
        ({"ensemble__mode": "size"}, False),
    ],
    ids=str,
)
def test_clients_are_trained_anew_where_their_settings_differ(store, change, anew):
    here, there = (fm.Experiment(small_settings(**c), store) for c in ({}, change))
    assert (here.upload_key(0) != there.upload_key(0)) == anew
    assert here.upload_key(0) != here.upload_key(1)


def test_other_weights_in_the_checkpoints_file_are_another_run(store, uploads, tmp_path):
    keys = []
    for upload in uploads[:2]:
        upload.save(tmp_path)
        settings = small_settings(model__checkpoint=str(tmp_path / "weights.safetensors"))
        keys.append(fm.Experiment(settings, store).upload_key(0))
        keys.append(pipeline.distill_key(uploads, settings))
    assert len(set(keys)) == 4
