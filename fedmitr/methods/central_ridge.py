"""Ridge regression on all images in one place: what `ridge` reaches from sums, exactly; not federated."""

from collections.abc import Sequence
from dataclasses import replace

from ..core.store import Store
from ..settings import Settings
from ..upload import Upload
from ._method import Method, Outcome
from ._statistics import classify, ridge_head
from .ridge import SEARCH


def central_ridge(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Solve for the head from the sums over every training image, those of one client."""
    (everything,) = uploads
    return replace(classify([everything], settings, ridge_head(settings)), downlink_bytes=0)


METHOD = Method(
    name="central_ridge",
    run=central_ridge,
    label="central ridge",
    family="reference",
    citation="",
    search=SEARCH,
    given="central",
    needs_weights=False,
    needs_statistics=True,
    sends=False,
    exchanges=0,
)
