"""Sliders over figures: live ones in a running kernel, pre-rendered ones in a stored notebook.

With $FEDMITR_STATIC=1, as when a notebook is run to be stored, every picture is drawn at once. The output
then needs no kernel. It is HTML with one `<input type="range">` for each slider and a handler of a few lines,
and the first picture as PNG. Viewers that show no HTML, or remove handlers from it, show the first picture.
"""

import base64
import hashlib
import html
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from textwrap import fill

import ipywidgets as ipw
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor

from ..core.errors import BadInput
from ..core.progress import static
from ..data.partition import class_counts, partition
from ..server.synthetic import SyntheticSet
from ..settings.schema import PartitionSettings
from . import clients as client_figures
from . import images
from .style import SHOWN, few_colors, new_figure, picture, show

ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0, 100.0)
STORED_CLIENTS = (2, 3, 5, 8, 12)  # a picture for each of them and each α is stored
COLORS = 24  # of a stored picture, so that all of a slider's pictures take less than 400 kB

# Runs on every move of a slider inside the <figure>: the positions give the index of the picture, row by row.
_HANDLER = """
const inputs = [...this.querySelectorAll('input')], image = this.querySelector('img'), shown = [];
let index = 0;
for (const input of inputs) {
  const values = input.dataset.values.split(' '), value = values[input.value];
  index = index * values.length + Number(input.value);
  input.setAttribute('aria-valuetext', value);
  input.nextElementSibling.textContent = value;
  shown.push(input.dataset.name + ' = ' + value);
}
image.src = 'data:image/png;base64,' + this.dataset.frames.split(' ')[index];
image.alt = this.dataset.alt + ' ' + shown.join(', ');
"""


def shards(
    labels: Tensor,
    settings: PartitionSettings,
    seed: int,
    classes: Sequence[str],
    alphas: Sequence[float] = ALPHAS,
) -> None:
    """Show sliders for α and the number of clients over the heatmap of shards of training labels (n,)."""
    most = int(labels.bincount().max())  # one colour scale for all pictures

    def draw(alpha: float, clients: int) -> Figure:
        chosen = settings.model_copy(update={"alpha": alpha, "clients": clients})
        counts = class_counts(labels, partition(labels, chosen, seed), len(classes))
        return client_figures.shards(counts, classes, f"{clients} clients, α = {alpha:g}", most)

    near = min(alphas, key=lambda alpha: abs(alpha - settings.alpha))
    if static():
        stored = {"α": tuple(alphas), "clients": tuple(sorted({*STORED_CLIENTS, settings.clients}))}
        alt = "Heatmap of training images by client and class."
        _display_stored(draw, stored, (near, settings.clients), alt)
        return
    _interact(
        draw,
        alpha=ipw.SelectionSlider(options=alphas, value=near, description="α", continuous_update=False),
        clients=ipw.IntSlider(
            settings.clients, 1, max(12, settings.clients), description="clients", continuous_update=False
        ),
    )


def emerging(synthetic: SyntheticSet, stats: tuple[Tensor, Tensor]) -> None:
    """Show a slider for the iteration over emerging images and the patches that are left."""
    at = synthetic.history["frame_at"].tolist()

    def draw(iteration: int) -> Figure:
        return images.frame(synthetic, at.index(iteration), stats)

    if static():
        alt = "Synthetic images, one of each class, with a line around the patches that are left."
        _display_stored(draw, {"iteration": at}, (at[-1],), alt)
        return
    _interact(
        draw,
        iteration=ipw.SelectionSlider(
            options=at, value=at[-1], description="iteration", continuous_update=False
        ),
    )


def _interact(draw: Callable[..., Figure], **controls: ipw.Widget) -> None:
    """Show controls over a picture that is drawn anew whenever one of them moves."""

    def redraw(**values: object) -> None:
        try:
            display(show(draw(**values)))
        except BadInput as error:  # a combination of sliders that no partition can serve
            print(error)

    display(ipw.VBox([*controls.values(), ipw.interactive_output(redraw, controls)]))


def _display_stored(
    draw: Callable[..., Figure], sliders: Mapping[str, Sequence[float]], start: Sequence[float], alt: str
) -> None:
    """Display the pictures of all combinations of the sliders' values as HTML that needs no kernel.

    draw: from one value of each slider to a figure. start: the values that are shown first. alt: a sentence
    on what can be seen; the values are added to it.
    """
    combinations = list(product(*sliders.values()))
    frames = [_small_png(_drawn(draw, values)) for values in combinations]
    first = combinations.index(tuple(start))
    said = ", ".join(f"{name} = {value:g}" for name, value in zip(sliders, start, strict=True))
    display(
        {
            "text/html": _stored_html(frames, sliders, start, first, alt, f"{alt} {said}"),
            "image/png": base64.b64encode(frames[first]).decode(),
            "text/plain": f"{alt} {said}",
        },
        raw=True,
    )


def _drawn(draw: Callable[..., Figure], values: Sequence[float]) -> Figure:
    """Return draw(*values) or, where no partition can serve these values, a figure that says why."""
    try:
        return draw(*values)
    except BadInput as error:
        figure = new_figure(7, 1.2)
        figure.text(0.02, 0.5, fill(str(error), 90), va="center")
        return figure


def _small_png(figure: Figure) -> bytes:
    """Return the figure as a PNG of at most `COLORS` colours, at the size in pixels at which it is shown."""
    small = io.BytesIO()
    few_colors(picture(figure, SHOWN), COLORS).save(small, format="png", optimize=True)
    return small.getvalue()


def _stored_html(
    frames: Sequence[bytes],
    sliders: Mapping[str, Sequence[float]],
    start: Sequence[float],
    first: int,
    alt: str,
    first_alt: str,
) -> str:
    """Write a <figure> with the frames as data, the sliders, and the frame `first`; ids hash the content."""
    coded = [base64.b64encode(frame).decode() for frame in frames]
    own = "frames-" + hashlib.sha256("\n".join([alt, *sliders, *coded]).encode()).hexdigest()[:12]
    controls = "".join(
        _slider(f"{own}-{number}", name, list(values), value)
        for number, ((name, values), value) in enumerate(zip(sliders.items(), start, strict=True))
    )
    return (
        f'<figure id="{own}" style="margin:0" data-alt="{html.escape(alt)}" data-frames="{" ".join(coded)}" '
        f'oninput="{html.escape(_HANDLER.strip())}">\n{controls}'
        f'<img src="data:image/png;base64,{coded[first]}" alt="{html.escape(first_alt)}" '
        f'style="max-width:100%">\n</figure>'
    )


def _slider(own: str, name: str, values: Sequence[float], value: float) -> str:
    """Write one labelled slider over the positions of `values`, and the value beside it."""
    texts, name = [f"{v:g}" for v in values], html.escape(name)
    return (
        f'<div><label for="{own}">{name}</label> <input id="{own}" type="range" min="0" '
        f'max="{len(values) - 1}" step="1" value="{values.index(value)}" aria-valuetext="{value:g}" '
        f'data-name="{name}" data-values="{" ".join(texts)}"> <output for="{own}">{value:g}</output></div>\n'
    )
