"""images.py: what is drawn of inverted images, and what where there is none."""

import io

import numpy as np
import PIL.Image
import PIL.ImageSequence
import torch

from fedmitr import figures
from fedmitr.figures.images import _dimmed


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
        ["the student", "gets"],
        ["true", "image"],
    ]
    outlined = [bool(axis.collections) for axis in rows[0]]
    assert outlined == [False, True, True, False]
    boxed = [axis.spines["left"].get_visible() for axis in rows[1]]
    assert boxed == [False, False, True, False]


def shown_pixels(axis):
    return np.asarray(axis.images[0].get_array())


def test_a_frame_is_one_iteration_with_its_stopped_patches_dimmed(recorded_set, task, drawn):
    figure = drawn(figures.frame(recorded_set, 1, task.stats, count=3))
    assert len(figure.axes) == 3 and figure.get_suptitle() == "iteration 10: 25 of 36 patches left"
    mean, std = task.stats
    bright = (recorded_set.history["frames"][1, 2] * std + mean).clamp(0, 1)[0].numpy()
    found = shown_pixels(figure.axes[2])
    for patch in range(36):
        y, x = 4 * (patch // 6), 4 * (patch % 6)
        where = slice(y, y + 4), slice(x, x + 4)
        wanted = bright[where] if patch < 25 else 0.675 + 0.25 * bright[where]
        assert np.allclose(found[where], wanted, atol=1e-6), patch


def test_the_last_frame_is_what_the_student_gets_and_not_dimmed(recorded_set, task, drawn):
    figure = drawn(figures.frame(recorded_set, 2, task.stats))
    assert len(figure.axes) == 10 and figure.get_suptitle() == "what the student gets"
    mean, std = task.stats
    for axis, image in zip(figure.axes, recorded_set.history["frames"][2], strict=True):
        assert np.allclose(shown_pixels(axis), (image * std + mean).clamp(0, 1)[0])
        assert axis.spines["top"].get_visible()


def test_colour_images_are_dimmed_in_all_channels():
    image, mask = np.random.default_rng(0).random((8, 8, 3)), torch.tensor([True, False, False, True])
    found = _dimmed(image, mask)
    assert np.array_equal(found[:4, :4], image[:4, :4]) and np.array_equal(found[4:, 4:], image[4:, 4:])
    assert np.allclose(found[:4, 4:], 0.675 + 0.25 * image[:4, 4:])


def test_the_animation_plays_every_frame_for_ever_and_is_the_same_each_time(
    recorded_set, task, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDMITR_OUTPUT", str(tmp_path))
    made = []
    for _ in range(2):
        frames = figures.animation(recorded_set, task.stats)
        shown = figures.save_animation(frames, "moving", "smoke", alt="images emerge")
        made.append((shown.data, (tmp_path / "figures" / "moving.gif").read_bytes()))
    assert made[0] == made[1] and shown.alt == "images emerge"
    assert len(made[0][1]) < 1_000_000
    width, height = (round(100 * side) for side in frames[0].get_size_inches())
    decoded = {}
    for form, data in zip(("PNG", "GIF"), made[0], strict=True):
        movie = PIL.Image.open(io.BytesIO(data))
        assert (movie.format, movie.n_frames, movie.info["loop"]) == (form, 3, 0)
        assert abs(movie.width - width) <= 1 and abs(movie.height - height) <= 1
        times, decoded[form] = [], []
        for picture in PIL.ImageSequence.Iterator(movie):
            times.append(picture.info["duration"])
            decoded[form].append(np.asarray(picture.convert("RGB")).astype(int))
        assert times == [400, 400, 3000]
    for png, gif in zip(*decoded.values(), strict=True):
        assert np.abs(png - gif).max() <= 1
    still = np.asarray(figures.style.picture(figures.frame(recorded_set, 1, task.stats), dpi=100))
    assert np.abs(decoded["PNG"][1] - still.astype(int)).mean() < 3  # few colours, but the same picture


def test_attention_is_drawn_beside_the_scene_and_the_survivors(task, drawn):
    scenes = task.test.subset(torch.arange(3))
    importance = torch.rand(3, 36, generator=torch.Generator().manual_seed(0))
    mask = importance > 0.5
    rows = np.array(drawn(figures.attention(scenes, importance, mask, task.stats)).axes[:9]).reshape(3, 3)
    assert np.allclose(rows[1, 2].images[0].get_array(), importance[2].view(6, 6))


def test_curves_and_schedule_draw_a_line_for_each_name(drawn):
    steps = torch.linspace(1, 0, 5)
    history = {"cross_entropy": steps, "confidence": 1 - steps, "kept": torch.ones(5)}
    stopped = history | {"kept": torch.tensor([1, 1, 0.7, 0.7, 0.5])}
    figure = drawn(figures.curves({"dense": history, "sparse": stopped}))
    for axis in figure.axes:
        assert [list(line.get_xdata()) for line in axis.lines[2:]] == [[2, 2], [4, 4]]  # the stops
    names = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert names == ["dense", "sparse", "a stop"]
    left, right = drawn(figures.schedule({"dense": steps}, {"dense": 1e9 * torch.ones(5)})).axes
    assert right.lines[0].get_ydata().tolist() == [1, 2, 3, 4, 5] and left.lines[0].get_label() == "dense"


def test_foreground_compares_choices_of_patches(drawn):
    own, others = torch.linspace(0, 1, 21), torch.full((21,), 0.25)
    figure = drawn(figures.foreground({"true": {"its own": own, "another's": others}}))
    (axis,) = figure.axes
    assert [t.get_text() for t in axis.get_yticklabels()] == ["its own", "another's"]
    assert [t.get_text() for t in axis.texts] == ["0.50", "0.25"]
    for line, wanted in zip(axis.lines, ([0.05, 0.95], [0.25, 0.75], [0.5]), strict=False):
        assert np.allclose(line.get_xdata(), wanted)


def test_places_share_one_scale(drawn):
    figure = drawn(figures.places({"a": torch.zeros(36), "b": torch.arange(16.0)}, "attention"))
    assert [axis.images[0].get_clim() for axis in figure.axes[:2]] == [(0, 15)] * 2
    assert figure.axes[0].images[0].get_array().shape == (6, 6)
