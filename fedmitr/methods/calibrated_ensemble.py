"""The ensemble with class offsets, fitted without data to synthetic images: a reference of K models."""

from collections.abc import Sequence
from dataclasses import replace

from ..core.progress import timed
from ..core.store import Store
from ..server.distill import calibrated
from ..settings import Settings, SettingsBlock
from ..settings.schema import Positive, setting
from ..upload import Upload
from ._method import Method, Outcome
from ._start import build_ensemble, global_shape
from .fedmitr import fedmitr_work, inversion_keys, synthetic_set
from .fedmitr_plus import with_additions


class CalibratedEnsembleSettings(SettingsBlock):
    """The calibrated ensemble: FedMITR+'s ensemble with offsets fitted to FedMITR+'s images."""

    penalty: Positive = setting(0.02, "penalty λ of the class offsets", "ours")


def calibrated_ensemble(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Fit class offsets to labelled views of FedMITR+'s images, and return the ensemble with them."""
    synthetic = synthetic_set(uploads, settings, store)
    seconds = {"inversion": sum(store.seconds("synthetic", k) for k in inversion_keys(uploads, settings))}
    how = settings.distill.model_copy(update={"calibrate": settings.calibrated_ensemble.penalty})
    with timed(seconds, "calibration"):
        vit = global_shape(uploads, settings).build()  # for its grid and its pixels' normalisation
        ensemble = calibrated(build_ensemble(uploads, settings), vit, synthetic, how, settings.seed)
    return Outcome([ensemble], seconds, synthetic)


METHOD = Method(
    name="calibrated_ensemble",
    run=calibrated_ensemble,
    label="calibrated ensemble",
    family="reference",
    citation="",
    settings=CalibratedEnsembleSettings,
    tuned_as="fedmitr_plus",
    adapt=with_additions,
    work=lambda settings: replace(
        fedmitr_work(settings), student_steps=0, calibrate=settings.calibrated_ensemble.penalty
    ),
    single_model=False,
)
