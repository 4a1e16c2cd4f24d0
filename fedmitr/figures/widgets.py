"""Interactive views: sliders over the figures of this package.

Every view has a static picture beside it in its notebook. Where nobody can move a slider, as when a notebook
is run to be stored ($FEDMITR_STATIC=1), a line of text is printed in its place.
"""

from collections.abc import Callable, Sequence

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
from .style import show

ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0, 100.0)


def shards(
    labels: Tensor,
    settings: PartitionSettings,
    seed: int,
    classes: Sequence[str],
    alphas: Sequence[float] = ALPHAS,
) -> None:
    """Show sliders for α and the number of clients over the heatmap of shards of training labels (n,)."""
    if _replaced_by_text():
        return

    def draw(alpha: float, clients: int) -> Figure:
        chosen = settings.model_copy(update={"alpha": alpha, "clients": clients})
        counts = class_counts(labels, partition(labels, chosen, seed), len(classes))
        return client_figures.shards(counts, classes, f"{clients} clients, α = {alpha:g}")

    near = min(alphas, key=lambda alpha: abs(alpha - settings.alpha))
    _interact(
        draw,
        alpha=ipw.SelectionSlider(options=alphas, value=near, description="α", continuous_update=False),
        clients=ipw.IntSlider(
            settings.clients, 1, max(12, settings.clients), description="clients", continuous_update=False
        ),
    )


def emerging(synthetic: SyntheticSet, stats: tuple[Tensor, Tensor]) -> None:
    """Show a slider for the iteration over emerging images and the patches that are left."""
    if _replaced_by_text():
        return
    at = synthetic.history["frame_at"].tolist()

    def draw(iteration: int) -> Figure:
        return images.frame(synthetic, at.index(iteration), stats)

    _interact(
        draw, iteration=ipw.SelectionSlider(options=at, description="iteration", continuous_update=False)
    )


def _replaced_by_text() -> bool:
    """Whether outputs are stored and nobody can move a slider; then a line of text says so."""
    if static():
        print("Sliders appear here in a live kernel; the static picture beside them shows the same.")
    return static()


def _interact(draw: Callable[..., Figure], **controls: ipw.Widget) -> None:
    """Show controls over a picture that is drawn anew whenever one of them moves."""

    def redraw(**values: object) -> None:
        try:
            display(show(draw(**values)))
        except BadInput as error:  # a combination of sliders that no partition can serve
            print(error)

    display(ipw.VBox([*controls.values(), ipw.interactive_output(redraw, controls)]))
