"""ridge+: ridge regression on the sums that FedMITR+'s clients send, and nothing else; ours.

Two things differ from ridge.py. Features are CLS and the mean of each quarter of the image, after each of the
last two blocks (`fedmitr_plus.regions`), where ridge.py reads the last block alone. And each image counts
as the mean over itself and some moved copies (`fedmitr_plus.views`). The sums still add up to those of all
images in one place. FedMITR+'s student starts here: what FedMITR+ has beyond this row it owes to the uploaded
weights and to synthetic images.
"""

from collections.abc import Sequence

from ..core.store import Store
from ..settings import Settings
from ..upload import Upload
from ._method import Method, Outcome, Range
from ._statistics import classify, ridge_head
from .fedmitr_plus import sums_of_plus


def ridge_plus(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn sums of features into one model: the shared backbone with the head of ridge regression."""
    return classify(uploads, settings, ridge_head(settings))


METHOD = Method(
    name="ridge_plus",
    run=ridge_plus,
    label="ridge+",
    family="statistics",
    citation="ours, on AFL and Fed3R",
    search={"statistics.ridge": Range(1e-3, 1e3, log=True)},
    adapt=lambda settings: settings.changed(sums_of_plus(settings)),
    needs_weights=False,
    needs_statistics=True,
)
