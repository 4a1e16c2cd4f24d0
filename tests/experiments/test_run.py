"""run.py: every method from settings to result: its place in the store, what it is given, bad input."""

import importlib
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import small_settings

import fedmitr as fm
from fedmitr.client.fusefl import FusionClient
from fedmitr.methods import METHODS, Method

pipeline = importlib.import_module("fedmitr.methods.fedmitr")  # the package's name for it is the method


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


# What methods are given.


def parts(upload):
    """What a client sends: weights, class histogram, statistics."""
    sent = {
        "weights": upload.weights,
        "class histogram": upload.class_counts,
        "statistics": upload.statistics,
    }
    return [name for name, value in sent.items() if value is not None]


def given_to_methods(these, monkeypatch):
    """What every method gets, none of them run."""
    seen = {}
    for method in list(METHODS):
        note = replace(METHODS[method], run=lambda *given, name=method: seen.update({name: given}))
        monkeypatch.setitem(METHODS, method, note)
        these.outcome(method)
    return seen


@pytest.mark.parametrize("mode", ["mean_probs", "class"])
def test_methods_are_given_what_their_records_say_and_no_more(mode, results, store, monkeypatch, no_work):
    these = fm.Experiment(small_settings(ensemble__mode=mode), store)
    counted = ["class histogram"] * (mode == "class")
    for method, (given, _, _, *more) in given_to_methods(these, monkeypatch).items():
        record = METHODS[method]
        if method == "fusefl":
            assert [type(c) for c in given] == [FusionClient] * 2
            continue
        alone = record.given == "central"
        assert len(given) == (1 if alone else 2), method
        uploads = [c.upload for c in given] if record.given == "clients" else given
        for upload in uploads:
            assert upload.checked() is upload
            if record.given == "clients":  # their sums come later
                assert parts(upload) == ["weights", *counted], method
            elif alone:
                assert parts(upload)[0] == ("weights" if method == "central" else "statistics")
            else:
                assert parts(upload) == record.sent_under(these.settings) or not record.sends, method
        assert len(more) == (method == "real_images")


def test_real_images_are_those_of_the_training_split_and_no_others_get_any(these, monkeypatch):
    given = given_to_methods(these, monkeypatch)
    assert given["real_images"][3] is these.task.train.images
    assert {len(args) for method, args in given.items() if method != "real_images"} == {3}


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
