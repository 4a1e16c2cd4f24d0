"""Nearest class means (FedNCM, Legate et al., NeurIPS 2023): no training, an image goes to the nearest mean.

Clients send sums of features of the frozen shared model. The means are those of all images, for any
partition. The Gram matrix is not needed; it is sent because one kind of message serves all methods on
statistics. FedNCM goes on to fine-tune from this head over many rounds; here there is one exchange.
"""

from collections.abc import Sequence

from ..core.store import Store
from ..server import statistics
from ..settings import Settings
from ..upload import Upload
from ._method import Method, Outcome
from ._statistics import SUMS, classify


def ncm(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn sums of features into one model: the shared backbone with class means as its head."""
    return classify(uploads, settings, statistics.ncm)


METHOD = Method(
    name="ncm",
    run=ncm,
    label="NCM",
    family="statistics",
    citation="FedNCM: Legate et al., NeurIPS 2023",
    search=SUMS,
    needs_weights=False,
    needs_statistics=True,
)
