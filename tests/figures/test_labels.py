"""labels.py: labels of patches, and the method in one picture."""

import numpy as np
import torch

from fedmitr import figures
from fedmitr.figures.style import pixels


def test_the_most_probable_class_of_every_patch_is_written(synthetic, task, drawn):
    classes = torch.arange(36) % 10
    targets = torch.nn.functional.one_hot(classes, 10).float().expand(10, -1, -1)
    figure = drawn(figures.token_labels(synthetic, {"soft": targets}, task.stats, [4, 2]))
    rows = np.array(figure.axes).reshape(2, 2)
    assert [axis.get_title() for axis in rows[0]] == ["target 4", "target 2"]
    assert [t.get_text() for t in rows[1, 0].texts] == [str(int(c)) for c in classes]
    assert rows[1, 0].collections  # the survivors' outline
    assert [axis.get_ylabel() for axis in rows[:, 0]] == ["image", "soft"]
    figure = figures.token_labels(synthetic, {"soft": targets}, task.stats, [4, 2], "a view")
    assert figure.axes[0].get_ylabel() == "a view"


def test_the_overview_shows_all_four_steps(recorded_set, task, drawn):
    targets = torch.full((10, 36, 10), 0.1)
    counts = torch.arange(30).view(3, 10)
    figure = drawn(
        figures.overview(counts, recorded_set, targets, {"FedMITR": 0.8, "FedAvg": 0.2}, task.stats)
    )
    parts = [part for row in figure.subfigs for part in row.subfigs]
    assert [part.get_suptitle()[0] for part in parts] == list("1234")
    assert [t.get_text() for t in parts[3].axes[0].texts] == ["0.80", "0.20", " guessing"]


def test_the_overview_ends_with_the_images_that_the_student_receives(recorded_set, task, drawn):
    targets = torch.full((10, 36, 10), 0.1)
    figure = figures.overview(torch.ones(3, 10), recorded_set, targets, {"FedMITR": 0.8}, task.stats)
    axes = np.array(drawn(figure).subfigs[0].subfigs[1].axes).reshape(2, 5)
    assert axes[0, -1].get_title() == "result"
    for row, pick in zip(axes, (0, 1), strict=True):  # the first image of each of the first two classes
        assert np.allclose(row[-1].images[0].get_array(), pixels(recorded_set.pixels[pick], task.stats))
