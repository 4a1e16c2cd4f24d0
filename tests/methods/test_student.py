"""_student.py: the student, its pool of images, its rounds, and what the store keeps of them."""

import dataclasses
import math

import pytest
import torch
from helpers import loud, make_upload
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import DISTILLED, copy_of, loop_of, own, small, unchanged

import fedmitr as fm
import fedmitr.methods._student as module
from fedmitr.core.optimizers import rate_factor
from fedmitr.core.rng import make_rng
from fedmitr.core.store import Store
from fedmitr.methods import METHODS, Range
from fedmitr.methods._student import Student, portions, steps_of_rounds, student_start
from fedmitr.methods.dense import DenseSettings, generator_loss
from fedmitr.methods.fedavg import average_weights
from fedmitr.server.views import epochs
from fedmitr.settings import Settings
from fedmitr.settings.schema import DistillSettings

CLOSE = dict(rtol=1e-4, atol=1e-4)


@given(total=st.integers(0, 500), parts=st.integers(1, 40))
def test_portions_are_whole_sum_up_and_differ_by_at_most_one(total, parts):
    found = portions(total, parts)
    assert len(found) == parts and sum(found) == total and max(found) - min(found) <= 1


@given(steps=st.integers(1, 500), counts=st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_a_rounds_steps_go_equally_often_over_its_pool_and_the_last_ones_twice(steps, counts):
    found = steps_of_rounds(steps, counts)
    sizes = [sum(counts[: r + 1]) for r in range(len(counts))]
    passes = steps / (sum(sizes) + sizes[-1])  # of a round over its pool
    assert len(found) == len(counts) and sum(found) == steps
    for share, size in zip(found, [*sizes[:-1], 2 * sizes[-1]], strict=True):
        assert abs(share - passes * size) < 1


def test_the_published_number_of_steps_is_one_pass_a_round():
    """200 rounds of 128 images, batches of 128: round r takes r steps; 200 more are the last pass."""
    assert steps_of_rounds(20_300, [128] * 200) == [*range(1, 200), 400]
    assert steps_of_rounds(400, [400]) == [400]


@pytest.mark.parametrize("rounds, wanted, before", [(4, 0.078, 0.008), (2, 0.175, 0.055), (1, 0.25, 0.25)])
def test_what_the_last_quarter_of_the_images_gets_of_visits_times_learning_rate(rounds, wanted, before):
    """Counted image by image over a whole run; with steps shared equally by the rounds it was `before`."""
    counts = portions(400, rounds)

    def share(steps):
        visits, done, rng = torch.zeros(400), 0, make_rng(0)
        for index, count in enumerate(steps):
            batches = epochs(sum(counts[: index + 1]), 8, rng)
            for _ in range(count):
                visits[next(batches)] += rate_factor("one_cycle", sum(steps), done)
                done += 1
        return (visits[300:].sum() / visits.sum()).item()

    assert share(steps_of_rounds(4000, counts)) == pytest.approx(wanted, abs=0.003)
    assert share(portions(4000, rounds)) == pytest.approx(before, abs=0.003)


@pytest.fixture(scope="module")
def pair():
    """Two clients with models of 12×12 images."""
    return [make_upload(k, (3, 0, 2, 0, 0, 1, 0, 0, 0, k), side=12) for k in range(2)]


def settings_of(**distill):
    base = dict(steps=6, batch_size=4, views=1, augment=0.0)
    return Settings(distill=DistillSettings(**(base | distill)))


def student_of(pair, steps=6, **distill):
    return Student(pair, settings_of(**distill), "fdafl", steps)


def some(count, seed=3):
    return torch.randn(count, 1, 12, 12, generator=make_rng(seed))


def learn(student, steps, progress=None):
    student.learn(steps, lambda logits, _: student.ensemble.combine(logits), progress)


def test_the_pool_grows_by_every_view_of_what_is_added(pair):
    student = student_of(pair, views=3, augment=0.5)
    for added, size in ((2, 6), (5, 21), (1, 24)):
        student.add(some(added), torch.zeros(added, dtype=torch.int64))
        images, labels, logits = student.pool()
        assert len(images) == len(labels) == len(logits) == size and logits.shape == (size, 2, 10)
    assert len(student.images) == 8 and student.images.mask.all() and len(student.images.mask[0]) == 9


def test_the_pool_holds_each_view_its_label_and_every_clients_logits_of_it(pair):
    student, images, labels = student_of(pair), some(5), torch.tensor([4, 0, 1, 3, 2])
    student.add(images, labels)
    views, view_labels, logits = student.pool()
    order = [int((view == images).flatten(1).all(1).nonzero()) for view in views]
    assert sorted(order) == [*range(5)] and torch.equal(view_labels, labels[order])
    for k, upload in enumerate(pair):
        torch.testing.assert_close(logits[:, k], upload.vit()(views), **CLOSE)


def test_views_are_changed_before_clients_and_student_are_shown_them(pair):
    def change(ensemble, views):
        return views + len(ensemble.members)

    student = student_of(pair)
    student.change = change
    student.add(some(1), torch.tensor([3]))
    views, _, logits = student.pool()
    assert torch.equal(views, some(1) + 2) and torch.equal(student.images.pixels, some(1))
    torch.testing.assert_close(logits[:, 0], pair[0].vit()(views), **CLOSE)


@pytest.mark.parametrize("views", [0, 3])
def test_views_without_change_are_those_of_the_images_as_they_were_made(pair, views):
    student, images, labels = student_of(pair, views=views), some(5), torch.tensor([4, 0, 1, 3, 2])
    student.change = lambda ensemble, views: views + 7
    student.add(images, labels)
    shown, shown_labels, logits = student.unchanged_views()
    order = [int((view == images).flatten(1).all(1).nonzero()) for view in shown]
    assert sorted(order) == [*range(5)] and torch.equal(shown_labels, labels[order])
    torch.testing.assert_close(logits[:, 1], pair[1].vit()(shown), **CLOSE)


@pytest.mark.parametrize("views", [0, 1])
def test_the_student_learns_from_the_images_of_all_rounds(pair, views):
    student, seen, steps = student_of(pair, views=views), [], []

    def teacher(logits, labels):
        assert logits.shape == (2, len(labels), 10)
        seen.extend(labels.tolist())
        return student.ensemble.combine(logits)

    for label in range(3):
        seen.clear()
        student.add(some(4, seed=label), torch.full((4,), label))
        before = copy_of(student.vit)
        student.learn(label + 1, teacher, steps.append)
        assert sorted(seen) == sorted([*range(label + 1)] * 4)  # batches of four: every image once
        assert not unchanged(student.vit, before)
    assert steps == [1] * 6 and len(student.pool()[0]) == 12


def test_the_learning_rate_follows_one_cycle_over_all_rounds(pair):
    student, rates = student_of(pair, steps=10), []
    student.add(some(2), torch.tensor([0, 1]))
    for share in portions(10, 4):
        rates.append(student.optimizer.param_groups[0]["lr"] / student.settings.lr)
        learn(student, share)
    assert rates == pytest.approx([1, *(0.5 + 0.5 * math.cos(math.pi * (n - 1) / 9) for n in (2, 5, 7))])


def test_the_frozen_student_gets_no_gradient_and_learns_afterwards(pair):
    student, pixels = student_of(pair), some(4).requires_grad_(True)
    opponent = student.frozen
    assert opponent is student.vit and not opponent.training
    generator_loss(student.ensemble, opponent, DenseSettings(), pixels, torch.arange(4)).backward()
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None for p in [*opponent.parameters(), *student.ensemble.parameters()])
    members, before = copy_of(student.ensemble), copy_of(student.vit)
    student.add(some(4), torch.arange(4))
    learn(student, 1)
    assert all(p.requires_grad and p.grad is not None for p in student.vit.parameters())
    assert not any(torch.equal(p, before[n]) for n, p in student.vit.named_parameters() if p.ndim > 1)
    assert unchanged(student.ensemble, members)


def test_the_student_starts_at_the_average_or_at_the_shared_model(pair):
    average, fresh = average_weights(pair), fm.create_vit("vit_micro", 10, image_size=12)
    assert unchanged(student_of(pair).vit, average)
    initial = settings_of(start="initial").changed({"model.pretrained": False})
    assert unchanged(Student(pair, initial, "fdafl", 1).vit, fresh.state_dict())


@pytest.mark.parametrize("method", [*DISTILLED, "a method of your own"])
def test_by_default_the_student_learns_the_teacher_alone_as_published(pair, method):
    """What `distill` says of labels, offsets, rate and temperature is FedMITR's."""
    settings = settings_of(ce_weight=0.7, calibrate=0.5, temperature=9.0, lr=0.5)
    student = Student(pair, settings, method, 6)
    assert student.settings.ce_weight == 0 and student.calibrate == 0
    assert student.settings.lr == 3e-4
    published = {"dense": 4, "co_boosting": 4, "fadi": 3}  # DAFL and FedFTG have none, which is 1
    assert student.settings.temperature == published.get(method, 1)


def test_a_method_can_have_its_images_labels_count(pair):
    own = settings_of().model_copy(update={"dense": DenseSettings(ce_weight=0.3, calibrate=0.4)})
    student = Student(pair, own, "dense", 6)
    assert student.settings.ce_weight == 0.3 and student.calibrate == 0.4


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_the_kd_temperature_softens_teacher_and_student(pair, temperature):
    """The gradient of a step against that of T²·KL(softmax(z_A/T) ‖ softmax(z/T)), written out."""
    own = settings_of(batch_size=8).model_copy(update={"dense": DenseSettings(kd_temperature=temperature)})
    student, images = Student(pair, own, "dense", 6), some(8)
    student.add(images, torch.zeros(8, dtype=torch.int64))
    start = student_start(pair, own).eval().requires_grad_(True)
    teacher = torch.stack([upload.vit()(images) for upload in pair]).mean(0).detach()  # mean of logits
    p, q = (teacher / temperature).softmax(1), (start(images) / temperature).softmax(1)
    (temperature**2 * (p * (p.log() - q.log())).sum(1).mean()).backward()
    wanted = torch.cat([w.grad.flatten() for w in start.parameters()])
    student.learn(1, lambda logits, _: logits.mean(0).log_softmax(-1))
    found = torch.cat([w.grad.flatten() for w in student.vit.parameters()])
    scale = min(1, 1 / wanted.norm().item())  # the student's gradient is clipped at norm 1
    torch.testing.assert_close(found, scale * wanted, rtol=1e-3, atol=1e-5)


def test_calibration_fits_what_the_student_is_taught_to_the_labels(pair, monkeypatch):
    own = settings_of(batch_size=8).model_copy(update={"dense": DenseSettings(calibrate=0.01)})
    student, taught = Student(pair, own, "dense", 6), []
    student.add(some(8), torch.full((8,), 3))
    monkeypatch.setattr(module, "train_student", lambda vit, batches, *_: taught.extend(batches))
    learn(student, 1)
    ((images, target, labels, _),) = taught
    plain = student.ensemble(images)
    gap = target - plain
    torch.testing.assert_close(gap - gap[:, :1], (gap - gap[:, :1])[:1].expand_as(gap), atol=1e-4, rtol=1e-3)
    assert (target[:, 3] > plain[:, 3]).all() and (labels == 3).all()
    torch.testing.assert_close(target.exp().sum(1), torch.ones(8))


@pytest.mark.parametrize("method", DISTILLED)
def test_only_the_student_learns(method, clients, tmp_path, monkeypatch):
    digests, made = [u.digest for u in clients], []

    class Spy(Student):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            self.before = copy_of(self.ensemble.members), copy_of(self.vit)
            made.append(self)

    monkeypatch.setattr(loop_of(method), "Student", Spy)
    settings = small({"distill.views": 0, "distill.augment": 0.5})  # new views at every step
    outcome = METHODS[method](clients, settings, Store(tmp_path))
    (student,) = made
    members, start = student.before
    assert all(torch.equal(v, members[n]) for n, v in student.ensemble.members.state_dict().items())
    assert outcome.models == [student.vit] and [u.digest for u in clients] == digests
    learnt = outcome.models[0].state_dict()
    assert not torch.equal(learnt["head.weight"], start["head.weight"])
    assert all(torch.isfinite(v).all() for v in learnt.values())
    assert len(outcome.synthetic) == 6 and outcome.student_steps == 3


@pytest.mark.parametrize("method", DISTILLED)
def test_the_same_run_gives_the_same_bytes_and_comes_back_from_the_store(
    method, clients, tmp_path, monkeypatch
):
    def run(where, seed=0):
        return METHODS[method](clients[:2], small({"seed": seed}), Store(tmp_path / where))

    first, other, changed = run("one"), run("two"), run("one", seed=1)
    monkeypatch.setattr(loop_of(method), "Student", None)
    again = run("one")
    for alike in (other, again):
        state = alike.models[0].state_dict()
        assert all(torch.equal(v, state[n]) for n, v in first.models[0].state_dict().items())
        assert torch.equal(alike.synthetic.pixels, first.synthetic.pixels)
    assert not torch.equal(changed.synthetic.pixels, first.synthetic.pixels)
    assert not again.models[0].training and again.student_steps == first.student_steps == 3
    assert again.seconds == {stage: round(value, 3) for stage, value in first.seconds.items()}


@pytest.mark.parametrize("method", DISTILLED)
def test_other_settings_are_another_run(method, clients, tmp_path, monkeypatch):
    METHODS[method](clients[:2], small(), Store(tmp_path))

    def work(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(loop_of(method), "Student", work)
    METHODS[method](clients[:2], small(), Store(tmp_path))
    METHODS[method](
        clients[:2], small({"distill.lr": 0.1, "distill.temperature": 5}), Store(tmp_path)
    )  # FedMITR's
    changes = [{"inversion.images": 7}, {"distill.steps": 4}, {"budget": "own"}, {"ensemble.mode": "size"}]
    changes += [own(method, rounds=1), own(method, student_lr=0.1), own(method, kd_temperature=7.0)]
    changes += [{"distill.weight_decay": 0.1}]
    changes += [{"model.pretrained": False}]
    for change in changes:
        with pytest.raises(InterruptedError):
            METHODS[method](clients[:2], small(change), Store(tmp_path))
    with pytest.raises(InterruptedError):
        METHODS[method](clients[1:], small(), Store(tmp_path))


@pytest.mark.parametrize("method", DISTILLED)
def test_clients_that_are_certain_of_everything_leave_a_finite_student(method, clients, tmp_path):
    certain = []
    for upload in clients[:2]:
        weights = copy_of(loud(upload.vit(), seed=upload.client, scale=1.0))
        certain.append(dataclasses.replace(upload, weights=weights))
    outcome = METHODS[method](certain, small(), Store(tmp_path))
    assert all(torch.isfinite(p).all() for p in outcome.models[0].parameters())
    assert torch.isfinite(outcome.synthetic.pixels).all()


@pytest.mark.parametrize("method", DISTILLED)
def test_what_every_distilling_method_may_tune(method):
    search = METHODS[method].search
    assert 1 in search[f"{method}.rounds"]
    assert search[f"{method}.kd_temperature"].low == 1 and search[f"{method}.kd_temperature"].high >= 20
    assert not {f"{method}.ce_weight", f"{method}.calibrate"} & set(search)  # additions of ours
    if method != "fedftg":  # its teacher is the class-wise ensemble
        assert {"mean_logits", "size", "class"} <= set(search["ensemble.mode"])
    for name, values in search.items():  # each value is one that settings allow
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            Settings().changed({name: value})
