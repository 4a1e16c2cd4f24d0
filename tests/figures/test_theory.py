"""theory.py: what is drawn of invented tables."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from theory_tables import STEPS, invented_inversions, invented_students

from fedmitr import figures
from fedmitr.figures.style import BLUE, ORANGE
from fedmitr.theory.gradients import GradientNoise
from fedmitr.theory.verdicts import with_bounds


@pytest.fixture(scope="module")
def students():
    return invented_students(seeds=3)


def test_variances_are_geometric_means_over_seeds(students, drawn):
    axes = drawn(figures.variances(students)).axes
    assert [a.get_title() for a in axes] == ["vit_micro_early", "vit_micro"]
    (line,) = [x for x in axes[1].lines if to_hex(x.get_color()) == BLUE.lower() and x.get_linestyle() == "-"]
    own = students.query("start == 'vit_micro' and inversion == 'sparse' and labels == 'relabel'")
    own = own.query("optimizer == 'sgd' and images == 400 and step == 20")["variance"]
    assert line.get_xdata().tolist() == list(STEPS)
    assert np.isclose(line.get_ydata()[2], np.exp(np.log(own).mean()))
    assert len(axes[1].lines) == 6


def test_parts_of_a_variance_are_bars(drawn):
    noises = {
        "sparse": GradientNoise(3.0, 0.1, 1.0, 2.0, 1.5),
        "dense": GradientNoise(4.0, 0.1, 1.0, 1.0, 2.0),
    }
    axis = drawn(figures.noise_parts(noises)).axes[0]
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == [3.0, 2.0, 1.5, -0.5, 4.0, 1.0, 2.0, 1.0]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["sparse", "dense"]


def test_lengths_of_gradients_are_bars_and_that_of_their_mean_a_line(drawn):
    gradients = torch.tensor([[3.0, 0.0], [0.0, 4.0], [-3.0, 0.0]])  # their mean is (0, 4/3)
    axis = drawn(figures.gradient_lengths(gradients)).axes[0]
    assert [bar.get_height() for bar in axis.patches] == [4.0, 3.0, 3.0]
    assert np.allclose(axis.lines[0].get_ydata(), 4 / 3)


def test_patch_gradients_end_where_patches_stop(drawn):
    axes = np.array(drawn(figures.patch_gradients(invented_inversions())).axes).reshape(2, -1)
    assert axes.shape == (2, 4)
    stopping = next(x for x in axes[0, 0].lines if to_hex(x.get_color()) == ORANGE.lower())
    assert stopping.get_xdata().max() == 3  # sparse: no such patch is left after that
    dense = next(x for x in axes[0, 1].lines if to_hex(x.get_color()) == ORANGE.lower())
    assert dense.get_xdata().max() == 5


def test_drift_is_on_logarithmic_axes_beside_two_bounds(students, drawn):
    axes = drawn(figures.drift(with_bounds(students))).axes
    assert all(a.get_xscale() == a.get_yscale() == "log" for a in axes)
    first = axes[0]
    bounds = [x for x in first.lines if to_hex(x.get_color()) == "#777777"]
    assert len(bounds) == 2 and len(first.lines) == 8
    largest = with_bounds(students).query("start == 'vit_micro_early' and images == 400 and step == 40")
    means = np.exp(np.log(largest["convex"]).groupby([largest["inversion"], largest["labels"]]).mean())
    assert bounds[0].get_ydata()[-1] >= 0.9 * means.max()
    assert len(axes[2].lines) == 7  # losses: six cells and one bound


def test_gaps_have_a_point_for_each_student(students, drawn):
    axes = drawn(figures.gaps(students)).axes
    last = students[students["step"] == 40]
    for axis in axes:
        points = np.concatenate([x.get_xdata() for x in axis.lines if x.get_linestyle() == "None"])
        assert len(points) == len(last)
    real = np.concatenate([x.get_ydata() for x in axes[1].lines if x.get_linestyle() == "None"])
    assert np.isclose(np.sort(real), np.sort(last["test_kd"] - last["held_out_kd"])).all()
