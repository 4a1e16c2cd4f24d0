"""widgets.py: sliders over figures, live in a kernel and pre-rendered in a stored notebook."""

import base64
import io
from html.parser import HTMLParser

import ipywidgets as ipw
import pytest
import torch
from PIL import Image

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


# Pre-rendered: what a notebook stores.


class Page(HTMLParser):
    """Every element of a page as (tag, attributes), and its texts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())

    def all(self, wanted):
        return [attributes for tag, attributes in self.elements if tag == wanted]


@pytest.fixture
def stored(monkeypatch):
    """stored(view, *arguments): the mime bundle that is displayed where outputs are stored."""
    shown = []
    monkeypatch.setattr(widgets, "static", lambda: True)
    monkeypatch.setattr(widgets, "display", lambda bundle, raw: shown.append(bundle))

    def run(view, *arguments):
        view(*arguments)
        return shown[-1]

    return run


def picture(coded):
    """The PNG that a base64 text holds."""
    image = Image.open(io.BytesIO(base64.b64decode(coded, validate=True)))
    image.load()
    assert image.format == "PNG" and min(image.size) > 50
    return image


def two_sliders(monkeypatch, stored):
    """Shards at two α and three numbers of clients, the first of which more than there are images for."""
    monkeypatch.setattr(widgets, "STORED_CLIENTS", (3, 50))
    settings = PartitionSettings(alpha=100.0, clients=5)
    return stored(widgets.shards, LABELS, settings, 0, list("0123456789"), (0.1, 100.0))


def test_stored_sliders_have_a_picture_for_every_combination(monkeypatch, stored):
    page = Page(two_sliders(monkeypatch, stored)["text/html"])
    alpha, clients = page.all("input")
    assert alpha["type"] == clients["type"] == "range"
    assert (alpha["min"], alpha["max"], alpha["data-values"]) == ("0", "1", "0.1 100")
    assert (clients["min"], clients["max"], clients["data-values"]) == ("0", "2", "3 5 50")
    (figure,) = page.all("figure")
    frames = figure["data-frames"].split(" ")
    assert len(frames) == 2 * 3 and [picture(frame) for frame in frames]
    assert len(set(frames)) == 6 - 1  # fifty clients are refused alike at both α


def test_stored_sliders_begin_at_the_settings_with_the_picture_that_is_the_fallback(monkeypatch, stored):
    bundle = two_sliders(monkeypatch, stored)
    page = Page(bundle["text/html"])
    alpha, clients = page.all("input")
    assert (alpha["value"], clients["value"]) == ("1", "1")
    (image,), (figure,) = page.all("img"), page.all("figure")
    kind, coded = image["src"].split(",")
    assert kind == "data:image/png;base64" and coded == bundle["image/png"]
    assert coded == figure["data-frames"].split(" ")[1 * 3 + 1]  # the last slider moves fastest
    assert image["alt"] == bundle["text/plain"] and image["alt"].endswith("α = 100, clients = 5")


def test_stored_sliders_are_labelled_and_their_values_are_text(monkeypatch, stored):
    page = Page(two_sliders(monkeypatch, stored)["text/html"])
    ids = [slider["id"] for slider in page.all("input")]
    assert [label["for"] for label in page.all("label")] == ids == [o["for"] for o in page.all("output")]
    assert [slider["aria-valuetext"] for slider in page.all("input")] == ["100", "5"]
    assert [text for text in page.texts if text] == ["α", "100", "clients", "5"]
    every = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(every)) == len(every)


def test_a_stored_view_loads_nothing_and_runs_no_script_element(monkeypatch, stored):
    page = Page(two_sliders(monkeypatch, stored)["text/html"])
    assert {tag for tag, _ in page.elements} == {"figure", "div", "label", "input", "output", "img"}
    assert not [a for _, a in page.elements if "://" in " ".join(v for v in a.values() if v)]


def test_a_stored_view_is_the_same_each_time_and_its_id_follows_its_content(monkeypatch, stored, task):
    first, second = (two_sliders(monkeypatch, stored) for _ in range(2))
    assert first == second
    monkeypatch.setattr(widgets, "STORED_CLIENTS", (4,))
    other = stored(widgets.shards, LABELS, PartitionSettings(), 0, list("0123456789"), (0.1,))
    own = [Page(bundle["text/html"]).all("figure")[0]["id"] for bundle in (first, other)]
    assert own[0] != own[1]


def test_a_stored_iteration_slider_has_a_picture_for_each_recorded_iteration(stored, recorded_set, task):
    bundle = stored(widgets.emerging, recorded_set, task.stats)
    page = Page(bundle["text/html"])
    (slider,), (figure,) = page.all("input"), page.all("figure")
    assert (slider["data-values"], slider["max"], slider["value"]) == ("0 10 20", "2", "2")
    frames = figure["data-frames"].split(" ")
    assert len(set(frames)) == 3 and frames[2] == bundle["image/png"]
    assert bundle["text/plain"].endswith("iteration = 20")


def test_the_stored_pictures_of_a_default_partition_are_small(stored):
    labels = torch.arange(1167) % 10
    bundle = stored(widgets.shards, labels, PartitionSettings(), 30, list("0123456789"))
    assert len(bundle["text/html"]) < 400_000
