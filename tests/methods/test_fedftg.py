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
from fedmitr.methods._student import Student
from fedmitr.methods.fedftg import (
    FedftgSettings,
    class_ensemble,
    generator_loss,
    likeness,
    sample_labels,
)
from fedmitr.server.ensemble import class_weights

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
    """KL(Σ α p ‖ q) and the paper's Σ α KL(p ‖ q) differ by what does not depend on the student."""
    logits, labels = randn(3, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    known = class_weights(uploads_with((3, 0, 1, 2), (1, 4, 0, 0), (0, 4, 9, 2))).double()
    student = randn(5, 4, seed=1).requires_grad_(True)
    ours = F.kl_div(
        student.log_softmax(-1), class_ensemble(logits, labels, known), reduction="batchmean", log_target=True
    )
    theirs = -generator_loss(logits, student, labels, known, FedftgSettings(classification=0))
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_fedftgs_generator_loss_against_a_loop_over_clients_and_samples(weight):
    counts, labels = [(3, 0, 1, 2), (1, 4, 0, 0), (0, 4, 9, 2)], [0, 3, 1, 1, 2]
    logits, student_logits = randn(3, 5, 4), randn(5, 4, seed=1)
    p, q = softmax(logits.numpy(), axis=-1), softmax(student_logits.numpy(), axis=-1)
    apart = wrong = 0.0
    for b, y in enumerate(labels):
        for k in range(3):
            share = counts[k][y] / sum(c[y] for c in counts)
            apart += share * sum(p[k, b, c] * math.log(p[k, b, c] / q[b, c]) for c in range(4)) / 5
            wrong -= share * math.log(p[k, b, y]) / 5
    settings, known = FedftgSettings(classification=weight), class_weights(uploads_with(*counts)).double()
    found = generator_loss(logits, student_logits, torch.tensor(labels), known, settings)
    assert found.item() == pytest.approx(weight * wrong - apart)


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


def test_fedftgs_generator_drives_student_and_clients_apart(clients, tmp_path, recorded):
    losses = recorded(module_of("fedftg"), "generator_loss")
    options = dict(rounds=1, generator_steps=14, lr=1e-2, width=8, classification=0, diversity=0)
    fedftg(clients, small(own("fedftg", **options)), Store(tmp_path))
    apart = -torch.stack(losses).detach()  # what is left is the discrepancy
    assert len(apart) == 14 and (apart > 0).all() and apart[-4:].mean() > 1.1 * apart[:4].mean()


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
