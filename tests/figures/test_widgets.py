"""widgets.py: sliders over the static figures, and a line of text where nobody can move them."""

import ipywidgets as ipw
import pytest
import torch

from fedmitr.core.errors import BadInput
from fedmitr.figures import widgets
from fedmitr.settings.schema import PartitionSettings

LABELS = torch.arange(200) % 10


@pytest.fixture
def live(monkeypatch):
    """What is displayed in a live kernel."""
    shown = []
    monkeypatch.setattr(widgets, "static", lambda: False)
    monkeypatch.setattr(widgets, "display", shown.append)
    return shown


def controls(box):
    return {child.description: child for child in box.children if hasattr(child, "description")}


def test_sliders_begin_at_the_settings_and_draw_anew(live):
    widgets.shards(LABELS, PartitionSettings(alpha=0.3, clients=4), 0, list("0123456789"))
    box = live[-1]
    assert isinstance(box, ipw.VBox)
    assert (controls(box)["α"].value, controls(box)["clients"].value) == (0.3, 4)


def test_a_partition_that_cannot_be_is_one_line(live, capsys):
    """Where drawing fails for a choice of sliders, the view says why."""

    def draw(clients):
        raise BadInput("partition.clients=900: too many")

    widgets._interact(draw, clients=ipw.IntSlider(900, 1, 900))
    output = live[-1].children[-1]
    told = capsys.readouterr().out + "".join(o.get("text", "") for o in output.outputs)
    assert told.endswith("partition.clients=900: too many\n")


def test_iterations_can_be_chosen(live, recorded_set, task):
    widgets.emerging(recorded_set, task.stats)
    assert list(controls(live[-1])["iteration"].options) == [0, 10, 20]


def test_where_nobody_can_move_them_a_line_says_so(monkeypatch, recorded_set, task, capsys):
    monkeypatch.setattr(widgets, "static", lambda: True)
    monkeypatch.setattr(widgets, "display", lambda *_: pytest.fail("displayed"))
    widgets.emerging(recorded_set, task.stats)
    widgets.shards(LABELS, PartitionSettings(), 0, list("0123456789"))
    assert capsys.readouterr().out.count("Sliders appear here in a live kernel") == 2
