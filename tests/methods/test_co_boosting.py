"""Co-Boosting: the ensemble's weights, hard samples and perturbed views, against closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from tiny_runs import module_of, own, randn, small

import fedmitr as fm
from fedmitr.core.rng import make_rng
from fedmitr.core.store import Store
from fedmitr.methods import METHODS
from fedmitr.methods._student import Student
from fedmitr.methods.co_boosting import (
    CoBoostingSettings,
    generator_loss,
    hard_loss,
    perturb,
    reweigh,
    shares,
    weight_step,
)
from fedmitr.server.ensemble import combine
from fedmitr.settings.schema import EnsembleSettings


@given(count=st.integers(1, 5), by_class=st.booleans(), rate=st.floats(0, 2), seed=st.integers(0, 999))
def test_weights_stay_in_zero_to_one_and_move_by_the_rate_at_most(count, by_class, rate, seed):
    rng = make_rng(seed)
    weights = torch.rand(count, 6 if by_class else 1, generator=rng)
    logits, labels = 5 * torch.randn(count, 7, 6, generator=rng), torch.randint(6, (7,), generator=rng)
    found = weight_step(weights, logits, labels, rate)
    assert found.shape == weights.shape and not found.requires_grad
    assert (found >= 0).all() and (found <= 1).all() and ((found - weights).abs() <= rate + 1e-6).all()


@pytest.mark.parametrize("columns", [1, 4])
def test_a_weight_goes_to_where_the_ensembles_loss_is_less(columns):
    rng = make_rng(3)
    weights = 0.3 + 0.4 * torch.rand(3, columns, generator=rng).double()
    logits, labels = randn(3, 8, 4), torch.randint(4, (8,), generator=rng)

    def loss(w):
        return F.cross_entropy((w[:, None] * logits).sum(0) / w.sum(0), labels).item()

    found = weight_step(weights, logits, labels, 0.1)
    for k in range(3):
        for c in range(columns):
            nudge = torch.zeros_like(weights)
            nudge[k, c] = 1e-4
            rises = loss(weights + nudge) > loss(weights - nudge)
            assert found[k, c].item() == pytest.approx(weights[k, c].item() + (-0.1 if rises else 0.1))


def test_the_ensemble_is_the_weighted_sum_of_logits_over_the_sum_of_weights_by_hand():
    logits = torch.tensor([[[4.0, 0.0]], [[0.0, 2.0]], [[1.0, 1.0]]])  # three clients, one image, two classes
    found = combine(logits, shares(torch.tensor([[0.5], [0.25], [0.0]])), "mean_logits")
    torch.testing.assert_close(found, torch.tensor([[8 / 3, 2 / 3]]).log_softmax(-1))
    by_class = shares(torch.tensor([[0.5, 0.0], [0.25, 0.1], [0.25, 0.1]]))  # each class's by itself
    torch.testing.assert_close(
        combine(logits, by_class, "mean_logits"), torch.tensor([[2.25, 1.5]]).log_softmax(-1)
    )


def test_weights_that_are_all_zero_leave_a_finite_ensemble_that_knows_nothing():
    logits, weights = randn(3, 5, 4), torch.zeros(3, 1).double()
    found = combine(logits, shares(weights), "mean_logits")
    torch.testing.assert_close(found, torch.full((5, 4), -math.log(4)).double())
    assert torch.isfinite(weight_step(weights, logits, torch.arange(5) % 4, 0.01)).all()


def test_a_client_that_is_right_gains_all_the_weight_and_one_that_is_wrong_none():
    labels = torch.tensor([0, 1, 2, 0])
    logits = torch.stack([3 * F.one_hot(labels, 3), 3 * F.one_hot((labels + 1) % 3, 3)]).double()
    weights, losses = torch.full((2, 1), 0.5).double(), []
    for _ in range(30):
        losses.append(F.nll_loss(combine(logits, shares(weights), "mean_logits"), labels).item())
        weights = weight_step(weights, logits, labels, 0.02)
    assert weights.flatten().tolist() == pytest.approx([1, 0])
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(math.log(2 + math.exp(-1.5)))
    assert losses[-1] == pytest.approx(math.log(1 + 2 * math.exp(-3)))


def test_the_pool_reweighs_once_a_batch():
    labels = torch.arange(10) % 3
    right, wrong = 3.0 * F.one_hot(labels, 3), 3.0 * F.one_hot((labels + 1) % 3, 3)
    pool = None, labels, torch.stack([right, wrong], dim=1)
    found = reweigh(torch.full((2, 1), 0.5), pool, 0.02, 4, make_rng(0))
    torch.testing.assert_close(found, torch.tensor([[0.56], [0.44]]))  # batches of 4, 4 and 2
    assert torch.equal(reweigh(torch.full((2, 1), 0.5), pool, 0.0, 4, make_rng(0)), torch.full((2, 1), 0.5))


@pytest.mark.parametrize("mode", ["mean_logits", "class"])
def test_the_weight_step_decays_and_the_student_learns_from_the_new_weights(
    mode, clients, tmp_path, monkeypatch
):
    rates, before = [], []

    def reweigh(weights, pool, rate, batch_size, rng):
        rates.append(rate)
        before.append(weights.clone())
        return 0.1 * torch.arange(1.0, 4)[:, None].expand_as(weights) * len(rates)

    def learn(self, steps, teacher, progress):
        logits = randn(3, 2, 10)
        total = (logits[0] + 2 * logits[1] + 3 * logits[2]) / 6  # whatever the weights' sum
        torch.testing.assert_close(teacher(logits, None), total.log_softmax(-1), rtol=1e-5, atol=1e-6)

    monkeypatch.setattr(module_of("co_boosting"), "reweigh", reweigh)
    monkeypatch.setattr(Student, "learn", learn)
    options = dict(rounds=3, weight_step=0.2, weight_decay=0.5)
    settings = small(own("co_boosting", **options) | {"ensemble.mode": mode})
    METHODS["co_boosting"](clients, settings, Store(tmp_path))
    assert rates == pytest.approx([0.2, 0.1, 0.05])
    first = fm.Ensemble(clients, EnsembleSettings(mode=mode)).weights
    torch.testing.assert_close(before[0], first)  # the run's ensemble
    torch.testing.assert_close(before[2][:, 0], torch.tensor([0.2, 0.4, 0.6]))  # not divided by their sum


def test_the_ensemble_is_reweighed_on_the_images_as_made_and_the_student_learns_moved_ones(
    clients, tmp_path, monkeypatch
):
    seen, pools = [], []

    def reweigh(weights, pool, rate, batch_size, rng):
        seen.append(pool)
        return weights

    monkeypatch.setattr(module_of("co_boosting"), "reweigh", reweigh)
    monkeypatch.setattr(
        Student, "learn", lambda self, *_: pools.append((self.images.pixels, self.images.labels))
    )
    METHODS["co_boosting"](clients[:2], small(own("co_boosting", rounds=2)), Store(tmp_path))
    assert [len(views) for views, _, _ in seen] == [3, 6]
    for (views, labels, logits), (pixels, wanted) in zip(seen, pools, strict=True):
        order = [int((view == pixels).flatten(1).all(1).nonzero()) for view in views]
        assert sorted(order) == [*range(len(pixels))] and torch.equal(labels, wanted[order])
        torch.testing.assert_close(logits[:, 0], clients[0].vit()(views), rtol=1e-4, atol=1e-4)


def test_without_hardness_the_hard_loss_is_cross_entropy():
    log_probs, labels = randn(6, 4).log_softmax(-1), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(hard_loss(log_probs, labels, 0.0), F.nll_loss(log_probs, labels))


@pytest.mark.parametrize("hardness", [1.0, 2.0])
def test_easy_samples_count_little_in_value_and_gradient(hardness):
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).double()
    logits, labels = p.log().requires_grad_(True), torch.tensor([0, 0])  # one easy, one hard
    easy, hard = 0.1**hardness, 0.8**hardness
    loss = hard_loss(logits.log_softmax(-1), labels, hardness)
    assert loss.item() == pytest.approx(-(easy * math.log(0.9) + hard * math.log(0.2)) / 2)
    loss.backward()  # that of cross-entropy, p − y, times the factor: nothing flows through it
    wanted = torch.tensor([[-0.1 * easy, 0.1 * easy], [-0.8 * hard, 0.8 * hard]]).double() / 2
    torch.testing.assert_close(logits.grad, wanted)


def test_co_boostings_generator_loss_is_hard_loss_less_the_divergence_of_all_images():
    teacher, student = randn(4, 5).log_softmax(-1), randn(4, 5, seed=1)
    labels, settings = (
        torch.tensor([4, 0, 1, 1]),
        CoBoostingSettings(disagreement=0.3, hardness=2.0, temperature=2.0),
    )
    found = generator_loss(lambda _: teacher, lambda _: student, settings, None, labels)
    wanted = 0.0
    for b in range(4):
        p, q = (softmax(x[b].numpy() / 2) for x in (teacher, student))
        right = math.exp(teacher[b, labels[b]])
        wanted += (1 - right) ** 2 * -math.log(right) / 4 - 0.3 * 4 * (p * np.log(p / q)).sum() / 4
    assert found.item() == pytest.approx(wanted)


class Linear(torch.nn.Module):
    """An ensemble of one linear model of four classes, on images of two channels."""

    def __init__(self):
        super().__init__()
        self.stats = tuple(torch.tensor(s).view(-1, 1, 1) for s in ([0.5, 0.1], [0.25, 0.5]))
        self.matrix = randn(18, 4, seed=1)

    def forward(self, images):
        return images.flatten(1) @ self.matrix


def test_every_pixel_moves_by_epsilon_of_full_brightness_where_the_closed_form_points():
    images, teacher = randn(6, 2, 3, 3), Linear()
    moved = perturb(teacher, images, CoBoostingSettings(perturbation=0.1), make_rng(5))
    towards = (2 * torch.rand(6, 4, generator=make_rng(5)) - 1).double().numpy()
    p = softmax(teacher(images).numpy() / 4, axis=1)
    slope = (p * (towards - (p * towards).sum(1, keepdims=True))) @ teacher.matrix.numpy().T
    sign = np.sign(slope).reshape(6, 2, 3, 3)
    np.testing.assert_allclose(moved[:, 0], images[:, 0] + 0.4 * sign[:, 0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(moved[:, 1], images[:, 1] + 0.2 * sign[:, 1], rtol=1e-6, atol=1e-7)


def test_no_perturbation_moves_nothing(ensemble, images):
    assert torch.equal(perturb(ensemble, images, CoBoostingSettings(perturbation=0), make_rng(0)), images)


def test_a_perturbation_changes_the_output_more_than_random_signs_of_its_size(uploads):
    teacher = fm.Ensemble(uploads, EnsembleSettings(mode="mean_logits"))
    images = torch.randn(24, 1, 24, 24, generator=make_rng(3))
    moved = perturb(teacher, images, CoBoostingSettings(), make_rng(0))
    step = 8 / 255 / 0.25
    torch.testing.assert_close((moved - images).abs(), torch.full_like(images, step), rtol=0, atol=1e-5)
    signs = 2.0 * torch.randint(2, images.shape, generator=make_rng(1)) - 1

    def change(views):
        return (teacher(views).exp() - teacher(images).exp()).abs().sum(1).mean().item()

    with torch.no_grad():
        assert change(moved) > 1.5 * change(images + step * signs)


def test_co_boostings_views_are_moved_others_are_not(clients, tmp_path, monkeypatch):
    pools = {}
    monkeypatch.setattr(
        Student,
        "learn",
        lambda self, steps, teacher, bar: pools.update({method: (self.pool()[0], self.images.pixels)}),
    )
    for method in ("co_boosting", "dense"):
        METHODS[method](clients[:2], small(own(method, rounds=1), images=1), Store(tmp_path))
    moved, still = ((views - pixels).abs() for views, pixels in pools.values())
    torch.testing.assert_close(moved, torch.full_like(moved, 8 / 255 / 0.25), rtol=0, atol=1e-5)
    assert still.max() == 0
