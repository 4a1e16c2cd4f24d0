"""Ridge regression on frozen features (AFL, He et al., CVPR 2025; Fed3R, Fanì et al., ICML 2024).

Clients send Σ f fᵀ and Σ f by class; the server solves for the head in closed form. The result is the one
that all images in one place would give, for any partition and any number of clients. Here features are
standardised first, which the same sums allow, and the intercept is not penalised.
"""

from collections.abc import Sequence

from ..core.store import Store
from ..settings import Settings
from ..upload import Upload
from ._method import Method, Outcome, Range
from ._statistics import SUMS, classify, ridge_head

SEARCH = {
    **SUMS,
    "statistics.ridge": Range(1e-3, 1e3, log=True),
}


def ridge(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn sums of features into one model: the shared backbone with the head of ridge regression."""
    return classify(uploads, settings, ridge_head(settings))


METHOD = Method(
    name="ridge",
    run=ridge,
    label="ridge",
    family="statistics",
    citation="AFL: He et al., CVPR 2025; Fed3R: Fanì et al., ICML 2024",
    search=SEARCH,
    needs_weights=False,
    needs_statistics=True,
)
