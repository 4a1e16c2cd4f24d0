"""All uploads as an ensemble: the teacher of the methods that distil, and no single model."""

from collections.abc import Sequence

from ..core.store import Store
from ..settings import Settings
from ..upload import Upload
from ._method import Method, Outcome
from ._start import build_ensemble


def ensemble(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Combine the predictions of all uploads, at K times the inference cost of one model."""
    return Outcome([build_ensemble(uploads, settings)])


METHOD = Method(
    name="ensemble",
    run=ensemble,
    family="reference",
    citation="",
    search={"ensemble.mode": ("mean_probs", "mean_logits", "size", "class")},
    single_model=False,
)
