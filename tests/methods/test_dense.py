"""DENSE: its generator's loss by hand, and what it rewards."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import randn

from fedmitr.methods.dense import DenseSettings, generator_loss


def dense_loss(teacher, student, labels, **options):
    settings = DenseSettings(**options)
    return generator_loss(lambda _: teacher, lambda _: student, settings, None, torch.tensor(labels)).item()


def test_denses_generator_loss_by_hand():
    """Three images; student and ensemble predict the same class for the first alone."""
    teacher = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    student = np.array([[0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.4, 0.3, 0.3]])
    wanted = -(math.log(0.7) + math.log(0.3) + math.log(0.8)) / 3
    for b in (1, 2):
        p, q = teacher[b] ** (1 / 3), student[b] ** (1 / 3)  # T = 3
        p, q = p / p.sum(), q / q.sum()
        wanted -= 0.4 * 9 * (p * np.log(p / q)).sum() / 3
    teacher, student = torch.tensor(teacher).log(), torch.tensor(student).log()
    assert dense_loss(teacher, student + 2, [0, 1, 2], disagreement=0.4) == pytest.approx(wanted)


@given(scale=st.floats(0.1, 5), which=st.integers(0, 3))
def test_only_images_on_which_student_and_ensemble_differ_are_driven_apart(scale, which):
    teacher, labels = randn(4, 5).log_softmax(-1), [0, 1, 2, 3]
    student = torch.where(torch.tensor([True, True, False, False])[:, None], teacher, -teacher)
    moved = student.clone()
    moved[which, moved[which].argmax()] += scale  # more certain of the same class
    change = dense_loss(teacher, moved, labels) - dense_loss(teacher, student, labels)
    assert (abs(change) > 1e-9) == (which >= 2)


def test_where_all_agree_dense_is_cross_entropy_alone():
    teacher = randn(4, 5).log_softmax(-1)
    found = dense_loss(teacher, 3 * teacher, [0, 1, 2, 3], disagreement=5.0)
    assert found == pytest.approx(-teacher.diagonal().mean().item())
