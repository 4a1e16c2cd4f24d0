"""style.py and all figures: sizes of text, brightness of pixels, and where pictures are written."""

import numpy as np
import torch

from fedmitr import figures
from fedmitr.figures.style import pixels, square


def test_no_text_is_below_nine_points(table, synthetic, recorded_set, task, drawn):
    pictures = [
        figures.comparison(table),
        figures.generated({"all": synthetic}, task.test, task.stats),
        figures.weights({"shares": torch.eye(3)}, ["a", "b", "c"]),
        figures.emerging(recorded_set, task.test, task.stats, frames=3),
        figures.panels(table.assign(panel="methods", cell=table["method"])),
        figures.bars({"FedMITR": 0.8, "mine": 0.5}),
    ]
    for figure in pictures:
        texts = drawn(figure).findobj(lambda artist: hasattr(artist, "get_fontsize"))
        assert min(t.get_fontsize() for t in texts if t.get_text()) >= 9


def test_pixels_are_brightness_in_grey_and_in_colour():
    stats = torch.tensor(0.5).view(1, 1, 1), torch.tensor(0.25).view(1, 1, 1)
    grey = pixels(torch.tensor([[[-9.0, 0.0], [1.0, 9.0]]]), stats)
    assert np.allclose(grey, [[0, 0.5], [0.75, 1]])
    assert pixels(torch.zeros(4, 3, 5, 6), stats).shape == (4, 5, 6, 3)
    assert square(torch.arange(9)).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_saved_figure_is_shown_at_its_size_and_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMITR_OUTPUT", str(tmp_path))
    shown = figures.save(figures.bars({"a": 0.5}), "bars", "smoke")
    (path,) = tmp_path.rglob("*.png")
    assert path.name == "bars.png" and path.read_bytes() == shown.data and shown.width == 7 * 96
    assert figures.show(figures.bars({"a": 0.5})).data == shown.data


def test_every_name_of_the_package_is_there():
    for name in figures.__all__:
        assert hasattr(figures, name), name
