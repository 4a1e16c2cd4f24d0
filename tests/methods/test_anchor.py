"""`ensemble.anchor` and `distill.start=statistics`: what every method that distils can have of the sums."""

import pytest
import torch
from helpers import make_upload, with_statistics
from tiny_runs import given, run, small, tiny

import fedmitr as fm
from fedmitr.core.store import Store
from fedmitr.methods import METHODS, check_methods
from fedmitr.methods._statistics import ridge_classifier
from fedmitr.methods._student import Student, student_start
from fedmitr.vision.features import FeatureClassifier

DISTILL = [name for name, record in METHODS.items() if record.distils]
WITHOUT = [name for name, record in METHODS.items() if not record.distils]
ANCHORED = {"ensemble.anchor": True, "statistics.weight": 4.0, "statistics.tokens": "regions"}


@pytest.fixture(scope="module")
def pair():
    counts = [(9, 8, 7, 0, 0, 0, 0, 0, 0, 0), (0, 0, 2, 4, 6, 8, 3, 1, 1, 2)]
    return [make_upload(k, c, side=12) for k, c in enumerate(counts)]


@pytest.fixture(scope="module")
def informed(pair):
    return [with_statistics(u, "regions") for u in pair]


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", DISTILL)
def test_with_it_clients_of_every_method_that_distils_send_sums(method):
    record, settings = METHODS[method], tiny()
    assert "statistics" in record.sent_under(settings.changed({"ensemble.anchor": True}))
    off = settings.changed({"fedmitr_plus.statistics": False})
    assert "statistics" not in record.sent_under(off)


@pytest.mark.parametrize("method", ["textures", "real_images"])
def test_references_of_the_student_have_the_teacher_of_the_run(method, pair, tmp_path):
    """`fedmitr_plus.statistics` is off; the run itself asks for the anchor."""
    settings = tiny().changed(ANCHORED | {"fedmitr_plus.statistics": False})
    assert "statistics" in METHODS[method].sent_under(settings)
    plain = run(method, pair, settings.changed({"ensemble.anchor": False}), Store(tmp_path)).models[0]
    anchored = run(method, pair, settings, Store(tmp_path)).models[0]
    assert not torch.equal(anchored.head.weight, plain.head.weight)


@pytest.mark.parametrize("method", WITHOUT)
def test_others_send_what_they_did(method):
    record, settings = METHODS[method], tiny()
    assert record.sent_under(settings) == record.sent_under(settings.changed({"ensemble.anchor": True}))


@pytest.mark.parametrize("views", [0, 2])
def test_what_a_student_learns_is_its_teacher_times_the_ridge_scores(views, informed, pixels, monkeypatch):
    settings = small(ANCHORED | {"distill.views": views, "distill.augment": 0.0})
    student, learned = Student(informed, settings, "dense", 2), []
    student.add(pixels, torch.tensor([0, 1, 2, 3, 4]))
    monkeypatch.setattr(
        "fedmitr.methods._student.train_student", lambda vit, batches, *_: learned.extend(batches)
    )
    student.learn(2, student.by_ensemble)
    scores = ridge_classifier(informed, settings)
    for images, target, _, _ in learned:
        wanted = (student.ensemble(images) + 4.0 * scores(images)).log_softmax(-1)
        torch.testing.assert_close(target, wanted, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(target, student.ensemble(images), atol=1e-2)


@pytest.mark.parametrize("method", ["fedmitr", "dense", "fadi", "fdafl", "co_boosting", "fedftg"])
def test_it_changes_the_model_of_every_method_and_so_does_its_weight(method, pair, tmp_path):
    store, settings = Store(tmp_path), tiny()
    plain = run(method, pair, settings, store).models[0].state_dict()
    anchored = settings.changed(ANCHORED)
    model = run(method, pair, anchored, store).models[0].state_dict()
    other = run(method, pair, anchored.changed({"statistics.weight": 1.0}), store).models[0].state_dict()
    name = "head.weight"
    assert not torch.equal(model[name], plain[name])
    assert not torch.equal(model[name], other[name])


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_the_start_from_statistics_has_the_logits_of_ridge_times_beta(weight, informed, pixels):
    settings = small(ANCHORED | {"distill.start": "statistics", "statistics.weight": weight})
    student, ridge = student_start(informed, settings), ridge_classifier(informed, settings)
    assert isinstance(student, FeatureClassifier) and student.head.weight.shape == (10, 960)
    torch.testing.assert_close(student(pixels), weight * ridge(pixels), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", ["cls", "both", "regions"])
@pytest.mark.parametrize("method", ["fedmitr", "dense", "fadi", "fdafl", "co_boosting", "fedftg"])
def test_a_student_of_statistics_learns_in_all_its_parts_and_comes_back_from_the_store(
    method, tokens, pair, pixels, tmp_path, monkeypatch
):
    change = ANCHORED | {"distill.start": "statistics", "statistics.tokens": tokens}
    settings, store = tiny().changed(change), Store(tmp_path)
    start = student_start(given(method, pair, settings), METHODS[method].adapted(settings)).state_dict()
    model = run(method, pair, settings, store).models[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert {"head.weight", "vits.0.blocks.0.attn.qkv.weight", "vits.0.norm.weight"} <= moved
    for place in ("fedmitr.methods._student.train_student", "fedmitr.server.distill.train_student"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("trained anew"))
    again = run(method, pair, settings, store).models[0]
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    with torch.no_grad():
        assert model(pixels).isfinite().all()


def test_a_token_head_of_its_own_is_refused_with_the_start_from_statistics(one_line):
    with pytest.raises(fm.BadInput) as error:
        small(ANCHORED | {"distill.start": "statistics", "relabel.head": "own"})
    one_line(error.value, "distill.start", "relabel.head", "shared")


def test_without_sums_the_start_from_statistics_is_refused(one_line):
    with pytest.raises(fm.BadInput) as error:
        small({"distill.start": "statistics"})
    one_line(error.value, "distill.start", "ensemble.anchor=true")


def test_with_the_closed_form_patch_tokens_share_its_head_whatever_the_run_says():
    settings = tiny().changed({"fedmitr_plus.closed_form": True, "relabel.head": "own"})
    check_methods(["ridge", "fedmitr_plus"], settings)
    assert METHODS["fedmitr_plus"].adapted(settings).relabel.head == "shared"
    average = settings.changed({"fedmitr_plus.closed_form": False})
    assert METHODS["fedmitr_plus"].adapted(average).relabel.head == "own"
