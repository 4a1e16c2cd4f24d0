"""The ensemble with ridge scores, log A(x) + β·r(x): FedMITR+'s teacher, a reference of K + 1 models."""

from collections.abc import Sequence

from ..core.progress import timed
from ..core.store import Store
from ..server.joint import EnsembleWithStatistics
from ..settings import Settings
from ..upload import Upload
from ._method import Method, Outcome
from ._start import build_ensemble
from ._statistics import ridge_classifier
from .fedmitr_plus import with_additions


def ensemble_statistics(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Join the ensemble of the uploads with the closed-form classifier of their statistics."""
    seconds: dict[str, float] = {}
    with timed(seconds, "solving"):
        classifier = ridge_classifier(uploads, settings)
    ensemble = build_ensemble(uploads, settings)
    return Outcome([EnsembleWithStatistics(ensemble, classifier, settings.statistics.weight)], seconds)


METHOD = Method(
    name="ensemble_statistics",
    run=ensemble_statistics,
    label="ensemble + statistics",
    family="reference",
    citation="",
    tuned_as="fedmitr_plus",
    adapt=with_additions,
    single_model=False,
    needs_statistics=True,
)
