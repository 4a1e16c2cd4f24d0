"""Ridge regression on FedMITR+'s features: the closed form that FedMITR+ starts from, without any image.

As ridge.py, on the sums that `fedmitr_plus` asks for: with its defaults, CLS and the mean of each quarter of
the image after each of the last two blocks, averaged over each image and moved copies of it.
"""

from collections.abc import Sequence

from ..core.store import Store
from ..settings import Settings
from ..upload import Upload
from ._method import Method, Outcome
from .fedmitr_plus import SUMS, with_additions
from .ridge import ridge


def ridge_plus(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn sums of FedMITR+'s features into one model, as `ridge` does with its own."""
    return ridge(uploads, settings, store)


METHOD = Method(
    name="ridge_plus",
    run=ridge_plus,
    label="ridge+",
    family="statistics",
    citation="ours, on AFL and Fed3R",
    search=SUMS,
    adapt=with_additions,
    needs_weights=False,
    needs_statistics=True,
)
