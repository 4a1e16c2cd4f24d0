"""result.py: what a run reports is measured once, and a method's body is part of its address."""

import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import registrations_taken_back, small_settings

import fedmitr as fm
from fedmitr.experiments.result import code_text
from fedmitr.methods import Method, Outcome, register


@pytest.fixture
def registrations_back():
    with registrations_taken_back():
        yield


@pytest.fixture
def unmeasured(results, store, tmp_path):
    """The same models in a store of which nothing has been evaluated."""
    copy = tmp_path / "unmeasured"
    shutil.copytree(store, copy, ignore=shutil.ignore_patterns("runs", "references"))
    return copy


def test_an_image_goes_once_through_every_model(unmeasured, results, no_work, block_passes):
    one, images = fm.Experiment(small_settings(), unmeasured), 90

    def models_run(method, experiment):
        block_passes.clear()
        assert experiment.result(method) == results[method]
        return sum(n for n in block_passes if n > 1) / 4 / images  # one image is for the operations counted

    assert len(one.task.test) == images
    assert models_run("fedmitr", one) == 1 + 2 + 1  # the global model, the clients', their average
    for method in ("ensemble", "local", "fedavg"):
        assert models_run(method, fm.Experiment(small_settings(), unmeasured)) == 0
    assert models_run("central", one) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_references_answer_what_their_models_answer_one_image_at_a_time(unmeasured, no_work, precision):
    experiment = fm.Experiment(small_settings(ensemble__precision=precision), unmeasured)
    images, found = experiment.task.test.images, experiment.reference_predictions
    assert {name: len(rows) for name, rows in found.items()} == {"ensemble": 1, "fedavg": 1, "local": 2}
    for name, rows in found.items():
        whole = name == "ensemble" and precision == "bf16"  # which rounds otherwise in another batch
        batches = images.split(len(images) if whole else 1)
        with torch.inference_mode():
            for model, row in zip(experiment.models(name), rows, strict=True):
                assert row.tolist() == [c for batch in batches for c in model(batch).argmax(1).tolist()], name


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
    assert code_text(partial(method, None)) != code_text(partial(method, 1))


def pick(client, uploads, settings, store):
    return Outcome([uploads[client].vit()])


def test_a_method_registered_anew_with_other_arguments_is_run_anew(registrations_back, tmp_path):
    experiment = fm.Experiment(small_settings(), tmp_path)
    found = {}
    for client in (0, 1):
        register(Method("pick", partial(pick, client)))
        found[client] = experiment.result("pick")
    assert found[0].run_id != found[1].run_id
    local = experiment.result("local").local_accuracies
    assert [found[client].accuracy for client in (0, 1)] == pytest.approx(local[:2])


def test_the_text_of_a_function_is_the_same_whatever_the_order_of_sets():
    code = (
        "def f(x):\n    return x in {'a', 'b', 'c', 'd'}\nfrom fedmitr.experiments.result import code_text\n"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code + "print(code_text(f))"],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(texts) == 1


def test_a_method_that_sends_nothing_has_no_bytes_up_whatever_its_outcome_says(registrations_back, tmp_path):
    register(Method("alone", partial(pick, 0), family="reference", sends=False, exchanges=0))
    result = fm.Experiment(small_settings(), tmp_path).result("alone")
    assert result.exchanges == 0 and result.upload_bytes == 0
