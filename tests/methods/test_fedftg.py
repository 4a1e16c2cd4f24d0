"""FedFTG: its weights, teacher and losses, against loops and cases by hand; what its generator does."""

import math
from types import SimpleNamespace

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
from fedmitr.methods._generator import Generator
from fedmitr.methods._student import Student
from fedmitr.methods.fedftg import (
    FedftgSettings,
    class_ensemble,
    client_logits,
    generator_loss,
    likeness,
    sample_labels,
)
from fedmitr.server.ensemble import class_weights
from fedmitr.settings.schema import EnsembleSettings

fedftg = METHODS["fedftg"]


def uploads_with(*counts):
    return [SimpleNamespace(client=k, class_counts=c) for k, c in enumerate(counts)]


def test_fedftg_weighs_a_client_by_its_share_of_the_class():
    found = class_weights(uploads_with((3, 0, 1, 0), (1, 2, 3, 0)))
    assert found.tolist() == [[0.75, 0, 0.25, 0.5], [0.25, 1, 0.75, 0.5]]  # the last is nobody's: all alike


def test_fedftgs_teacher_of_an_image_made_for_y_by_hand():
    p = torch.tensor([[[0.5, 0.25, 0.25]] * 3, [[0.2, 0.2, 0.6]] * 3])
    known = class_weights(uploads_with((3, 0, 1), (1, 2, 3)))
    found = class_ensemble(p.log() + 7, torch.tensor([0, 1, 2]), known).exp()
    wanted = [[0.425, 0.2375, 0.3375], [0.2, 0.2, 0.6], [0.275, 0.2125, 0.5125]]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_learning_that_teacher_is_coming_near_every_client_by_its_weight():
    """KL(Σ α p ‖ q), the code's, and the paper's Σ α KL(p ‖ q) differ by what the student cannot change."""
    logits, labels = randn(3, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    known = class_weights(uploads_with((3, 0, 1, 2), (1, 4, 0, 0), (0, 4, 9, 2))).double()
    student = randn(5, 4, seed=1).requires_grad_(True)
    ours = F.kl_div(
        student.log_softmax(-1), class_ensemble(logits, labels, known), reduction="batchmean", log_target=True
    )
    p, log_q = logits.softmax(-1), student.log_softmax(-1)
    theirs = (known[:, labels] * (p * (p.log() - log_q)).sum(-1)).sum(0).mean()
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_fedftgs_generator_loss_against_a_loop_over_samples(weight):
    labels, weights = [0, 3, 1, 1, 2], [0.75, 0.0, 0.5, 0.5, 1.0]
    logits, student_logits = randn(5, 4), randn(5, 4, seed=1)
    p = softmax(logits.numpy(), axis=-1)
    apart = sum(
        w * sum(abs(student_logits[b, c].item() - logits[b, c].item()) for c in range(4)) / 4
        for b, w in enumerate(weights)
    )
    wrong = sum(-math.log(p[b, y]) for b, y in enumerate(labels))
    found = generator_loss(
        logits,
        student_logits,
        torch.tensor(labels),
        torch.tensor(weights),
        FedftgSettings(classification=weight),
    )
    assert found.item() == pytest.approx(weight * (2.75 / 5) * wrong / 5 - apart / 5)


def test_the_discrepancy_moves_images_through_the_student_alone():
    logits, student_logits = randn(5, 4).requires_grad_(), randn(5, 4, seed=1).requires_grad_()
    weights = torch.tensor([0.75, 0.0, 0.5, 0.5, 1.0])
    generator_loss(
        logits, student_logits, torch.arange(5) % 4, weights, FedftgSettings(classification=0)
    ).backward()
    assert not logits.grad.any()  # the cross-entropy's, which weighs nothing here
    away = -weights[:, None] * (student_logits - logits).detach().sign() / 20  # less loss further away
    torch.testing.assert_close(student_logits.grad, away)


def test_likeness_against_loops():
    z, images = randn(5, 3), randn(5, 2, 3, 4, seed=1)
    total = 0.0
    for i in range(5):
        for j in range(5):
            noise_distance = ((z[i] - z[j]) ** 2).sum().item() / 3
            total += noise_distance * (images[i] - images[j]).abs().sum().item() / 24
    assert likeness(z, images).item() == pytest.approx(math.exp(-total / 25))


def test_likeness_is_one_for_equal_images_and_less_the_more_they_differ():
    z, images = randn(5, 3), randn(5, 1, 2, 2, seed=1)
    found = [likeness(z, scale * images).item() for scale in (0, 0.5, 1, 2)]
    assert found[0] == 1 and found == sorted(found, reverse=True) and len(set(found)) == 4


@given(st.lists(st.integers(0, 9), min_size=2, max_size=10).filter(any), st.integers(0, 99))
def test_a_class_that_nobody_holds_is_never_drawn(totals, seed):
    drawn = sample_labels(torch.tensor(totals, dtype=torch.float32), 50, make_rng(seed))
    assert len(drawn) == 50 and all(totals[y] > 0 for y in drawn.tolist())


def test_labels_are_drawn_in_proportion_to_what_all_hold():
    drawn = sample_labels(torch.tensor([6.0, 0, 1, 3]), 4000, make_rng(0))
    share = torch.bincount(drawn, minlength=4) / 4000
    assert (share - torch.tensor([0.6, 0, 0.1, 0.3])).abs().max() < 0.03


def test_a_pass_is_one_step_of_the_generator_for_each_client_in_turn(clients, tmp_path, monkeypatch):
    """On the same noise and labels, with that client's logits of the images and its weights of the labels."""
    seen, steps, known = [], [], class_weights(clients)
    real_loss, real_logits = generator_loss, client_logits

    def loss_of(logits, student_logits, labels, weights, settings):
        seen.append((labels, weights))
        return real_loss(logits, student_logits, labels, weights, settings)

    def logits_of(ensemble, client, images):
        found = real_logits(ensemble, client, images)
        torch.testing.assert_close(found, clients[client].vit()(images), rtol=1e-4, atol=1e-4)
        return found

    adam = torch.optim.Adam.step
    monkeypatch.setattr(module_of("fedftg"), "generator_loss", loss_of)
    monkeypatch.setattr(module_of("fedftg"), "client_logits", logits_of)
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a: (steps.append(type(self)), adam(self, *a))[1]
    )
    fedftg(clients, small(own("fedftg", rounds=2, generator_steps=3)), Store(tmp_path))
    assert len(seen) == 2 * 3 * 3 and steps.count(torch.optim.Adam) == 18  # not the student's
    for index, (labels, weights) in enumerate(seen):
        assert torch.equal(labels, seen[index - index % 3][0])
        torch.testing.assert_close(weights, known[index % 3, labels])


def test_the_generator_learns_in_training_mode_and_makes_the_pool_in_evaluation_mode(
    clients, tmp_path, monkeypatch
):
    modes, forward = [], Generator.forward

    def record(self, z, labels):
        modes.append((len(z), self.training, torch.is_grad_enabled()))
        return forward(self, z, labels)

    monkeypatch.setattr(Generator, "forward", record)
    options = dict(rounds=2, generator_steps=1, batch_size=5)
    fedftg(clients[:2], small(own("fedftg", **options), images=6, steps=1), Store(tmp_path))
    assert modes == [(5, True, True), (5, True, True), (3, False, False)] * 2


def test_fedftgs_generator_drives_student_and_clients_apart(clients, tmp_path, recorded):
    losses = recorded(module_of("fedftg"), "generator_loss")
    options = dict(rounds=1, generator_steps=14, lr=1e-2, width=8, classification=0, diversity=0)
    fedftg(clients, small(own("fedftg", **options)), Store(tmp_path))
    apart = -torch.stack(losses).detach().view(14, 3).sum(1)  # what is left is the discrepancy
    assert (apart > 0).all() and apart[-4:].mean() > 1.1 * apart[:4].mean()


def test_after_eighty_steps_the_clients_name_images_as_wanted(clients, tmp_path):
    options = dict(rounds=1, generator_steps=40, width=8, batch_size=10, diversity=0)
    settings = small(own("fedftg", **options), images=60, steps=1)
    made = fedftg(clients[:2], settings, Store(tmp_path)).synthetic
    with torch.no_grad():
        named = fm.Ensemble(clients[:2], EnsembleSettings(mode="class"))(made.pixels).argmax(1)
    assert (named == made.labels).float().mean() > 0.8


def test_fedftgs_diversity_loss_makes_images_differ(clients, tmp_path, monkeypatch, recorded):
    found = []
    for weight in (0, 100):
        alike = recorded(module_of("fedftg"), "likeness")
        options = dict(rounds=1, generator_steps=14, lr=1e-2, width=8, diversity=weight)
        fedftg(clients[:2], small(own("fedftg", **options)), Store(tmp_path))
        found.append(torch.stack(alike[-4:]).mean().item())
        monkeypatch.undo()
    assert found[1] < found[0]


def test_fedftgs_student_learns_the_class_wise_teacher(clients, tmp_path, monkeypatch):
    teachers = []
    monkeypatch.setattr(Student, "learn", lambda self, steps, teacher, bar: teachers.append(teacher))
    fedftg(clients, small(), Store(tmp_path))
    logits, labels = randn(3, 4, 10), [0, 1, 5, 9]
    found = teachers[0](logits, torch.tensor(labels)).exp()
    counts = np.array([u.class_counts for u in clients], dtype=float)
    counts[:, 9] = 1
    p = softmax(logits.numpy(), axis=-1)
    for b, y in enumerate(labels):
        wanted = sum(counts[k, y] / counts[:, y].sum() * p[k, b] for k in range(3))
        np.testing.assert_allclose(found[b], wanted, rtol=1e-5)


def test_fedftg_makes_images_of_the_classes_that_the_clients_hold(clients, tmp_path):
    made = fedftg(clients, small(images=40, steps=1), Store(tmp_path)).synthetic
    assert 9 not in made.labels.tolist() and len(set(made.labels.tolist())) > 5


def test_fedftg_without_class_counts_is_one_line_before_any_work(clients, tmp_path, monkeypatch, one_line):
    monkeypatch.setattr(module_of("fedftg"), "Generator", None)
    with pytest.raises(fm.BadInput) as error:
        fedftg(
            [clients[0], clients[1].without_counts()], small({"ensemble.mode": "mean_probs"}), Store(tmp_path)
        )
    one_line(error.value, "class_counts", "client 1")
