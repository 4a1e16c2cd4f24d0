"""images.py: what is drawn of inverted images, and what where there is none."""

import numpy as np
import torch

from fedmitr import figures


def test_generated_shows_one_image_of_each_class_and_a_dash_where_there_is_none(synthetic, task, drawn):
    without = synthetic.pixels[:9], synthetic.labels[:9], synthetic.mask[:9], synthetic.loss[:9]
    sets = {"all": synthetic, "no nine": type(synthetic)(*without)}
    figure = drawn(figures.generated(sets, task.test, task.stats))
    rows = np.array(figure.axes).reshape(3, 10)
    assert [len(axis.images) for axis in rows[1]] == [1] * 9 + [0]
    assert [t.get_text() for t in rows[1, 9].texts] == ["–"]
    assert all(axis.images and axis.collections for axis in rows[0])  # with the survivors' outline
    assert all(axis.images and not axis.collections for axis in rows[2])
    assert [axis.get_ylabel() for axis in rows[:, 0]] == ["all", "no nine", "true scene"]


def test_generated_shows_the_image_of_the_class_it_names(synthetic, task):
    backwards = type(synthetic)(synthetic.pixels, synthetic.labels.flip(0), synthetic.mask, synthetic.loss)
    figure = figures.generated({"backwards": backwards}, task.test, task.stats)
    mean, std = task.stats
    wanted = (synthetic.pixels[9] * std + mean).clamp(0, 1)[0]
    assert np.allclose(figure.axes[0].images[0].get_array(), wanted)


def test_one_of_each_is_the_first_image_of_every_class():
    assert figures.one_of_each(torch.tensor([4, 2, 4, 2, 7]), 9) == [1, 0, 4]
    assert figures.one_of_each(torch.tensor([4, 2, 4, 2, 7]), 2) == [1, 0]


def test_emerging_shows_each_class_on_its_way_and_a_true_image(recorded_set, task, drawn):
    figure = drawn(figures.emerging(recorded_set, task.test, task.stats, count=2, frames=3))
    rows = np.array(figure.axes).reshape(2, 4)
    assert [axis.get_ylabel() for axis in rows[:, 0]] == ["target 0", "target 1"]
    assert [axis.get_title().splitlines() for axis in rows[0]] == [
        ["iteration 0", "36 left"],
        ["iteration 10", "25 left"],
        ["iteration 20", "9 left"],
        ["true", "image"],
    ]
    outlined = [bool(axis.collections) for axis in rows[0]]
    assert outlined == [False, True, True, False]


def test_a_frame_is_one_iteration(recorded_set, task, drawn):
    figure = drawn(figures.frame(recorded_set, 1, task.stats, count=3))
    assert len(figure.axes) == 3 and figure.get_suptitle() == "iteration 10: 25 left of each image's patches"


def test_attention_is_drawn_beside_the_scene_and_the_survivors(task, drawn):
    scenes = task.test.subset(torch.arange(3))
    importance = torch.rand(3, 36, generator=torch.Generator().manual_seed(0))
    mask = importance > 0.5
    rows = np.array(drawn(figures.attention(scenes, importance, mask, task.stats)).axes[:9]).reshape(3, 3)
    assert np.allclose(rows[1, 2].images[0].get_array(), importance[2].view(6, 6))


def test_curves_and_schedule_draw_a_line_for_each_name(drawn):
    steps = torch.linspace(1, 0, 5)
    history = {"cross_entropy": steps, "confidence": 1 - steps}
    for axis in drawn(figures.curves({"dense": history, "sparse": history})).axes:
        assert len(axis.lines) == 2
    left, right = drawn(figures.schedule({"dense": steps}, {"dense": 1e9 * torch.ones(5)})).axes
    assert right.lines[0].get_ydata().tolist() == [1, 2, 3, 4, 5] and left.lines[0].get_label() == "dense"


def test_foreground_marks_mean_and_chance(drawn):
    figure = drawn(figures.foreground({"true": (torch.tensor([0.5, 0.7]), 0.25)}))
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["chance 0.25", "mean 0.60"]


def test_places_share_one_scale(drawn):
    figure = drawn(figures.places({"a": torch.zeros(36), "b": torch.arange(16.0)}, "attention"))
    assert [axis.images[0].get_clim() for axis in figure.axes[:2]] == [(0, 15)] * 2
    assert figure.axes[0].images[0].get_array().shape == (6, 6)
