"""Linear discriminant analysis on frozen features (FedCGS, Guan et al., AAAI 2025; GH-OFL, ICLR 2026).

Clients send counts, sums and Σ f fᵀ; the server has class means and the covariance that classes share, those
of all images. FedCGS inverts the covariance as it is; here it is shrunk, so that a few images suffice.
"""

from collections.abc import Sequence
from functools import partial

from ..core.store import Store
from ..server import statistics
from ..settings import Settings, SettingsBlock
from ..settings.schema import setting
from ..upload import Upload
from ._method import Method, Outcome, Range
from ._statistics import SUMS, classify


class LdaSettings(SettingsBlock):
    """LDA: Gaussians of one covariance."""

    shrinkage: float = setting(
        1e-3, "share γ of a multiple of the identity in the covariance", "choice; GH-OFL: 0.05", gt=0, le=1
    )


def lda(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn sums of features into one model: the shared backbone with the head of LDA."""
    return classify(uploads, settings, partial(statistics.lda, shrinkage=settings.lda.shrinkage))


METHOD = Method(
    name="lda",
    run=lda,
    label="LDA",
    family="statistics",
    citation="FedCGS: Guan et al., AAAI 2025; GH-OFL: Turazza et al., ICLR 2026",
    settings=LdaSettings,
    search={
        **SUMS,
        "lda.shrinkage": Range(1e-4, 0.5, log=True),
    },
    needs_weights=False,
    needs_statistics=True,
)
