"""clients.py: counts, scenes and skew as they are given."""

import numpy as np
import torch

from fedmitr import figures
from fedmitr.figures.style import pixels

COUNTS = torch.tensor([[5, 0, 1], [2, 30, 4]])


def test_shards_write_every_count(drawn):
    axis = drawn(figures.shards(COUNTS, ["a", "b", "c"], "title")).axes[0]
    assert [t.get_text() for t in axis.texts] == ["5", "0", "1", "2", "30", "4"]
    assert axis.get_title() == "title" and axis.images[0].get_array().tolist() == COUNTS.tolist()


def test_shards_on_a_given_scale_keep_it(drawn):
    axis = drawn(figures.shards(COUNTS, ["a", "b", "c"], most=100)).axes[0]
    assert axis.images[0].get_clim() == (0, 100)


def test_every_client_has_a_row_of_its_first_images(task, drawn):
    shards = [torch.tensor([4, 7, 9]), torch.tensor([2])]
    figure = drawn(figures.client_images(task.train, shards, task.stats, count=2))
    rows = np.array(figure.axes).reshape(2, 2)
    for axis, index in ((rows[0, 0], 4), (rows[0, 1], 7), (rows[1, 0], 2)):
        assert np.allclose(axis.images[0].get_array(), pixels(task.train.images[index], task.stats))
        assert [t.get_text() for t in axis.texts] == [str(int(task.train.labels[index]))]
    assert not rows[1, 1].images  # a client with fewer images
    assert [row[0].get_ylabel() for row in rows] == ["client 0\n3 images", "client 1\n1 images"]


def test_several_partitions_share_one_scale(drawn):
    figure = drawn(figures.shard_grid({"even": COUNTS, "skewed": 2 * COUNTS}, ["a", "b", "c"]))
    assert [axis.images[0].get_clim() for axis in figure.axes[:2]] == [(0, 60)] * 2


def test_scenes_stand_above_their_foreground_and_its_share(task, drawn):
    figure = drawn(figures.scenes(task.train, task.stats, [3, 0], 4))
    rows = np.array(figure.axes[:6]).reshape(3, 2)
    assert [axis.get_title() for axis in rows[0]] == [f"a {int(task.train.labels[k])}" for k in (3, 0)]
    assert np.allclose(rows[1, 0].images[0].get_array(), task.train.foreground[3, 0])
    assert rows[2, 0].images[0].get_array().shape == (6, 6)


def test_skew_is_a_dot_for_every_draw(drawn):
    values = torch.tensor([[0.75, 0.5], [0.25, 0.5]])
    (axis,) = drawn(figures.skew([0.1, 1.0], values)).axes
    assert [line.get_ydata().tolist() for line in axis.lines] == [[0.75, 0.25], [0.5, 0.5], [0.625, 0.375]]
