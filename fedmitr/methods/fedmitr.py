"""FedMITR: sparse model inversion, token relabel, distillation (method steps 2 to 5).

"Exploring One-Shot Federated Learning by Model Inversion and Token Relabel with Vision
Transformers" (ICLR 2025 submission 9305; arXiv 2605.10748).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from tqdm.auto import tqdm

from ..distill import distill
from ..inversion import SyntheticSet, invert, label_batches, load_synthetic, save_synthetic
from ..parallel import parallel, spreads
from ..runtime import derive_seed, device, progress
from ..settings import Settings
from ..store import Store, fingerprint, read_tensors, write_tensors
from ..upload import Upload
from ..vit import weights_digest
from .outcome import Outcome
from .rounds import student_start, teacher


def fedmitr(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Uploads to one global model: invert, relabel, distil; each stage kept in the store."""
    synthetic = synthetic_set(uploads, settings, store)
    model = global_model(uploads, synthetic, settings, store)
    seconds = {
        "inversion": sum(store.seconds("synthetic", key) for key in inversion_keys(uploads, settings)),
        "distillation": store.seconds("global", distill_key(uploads, settings)),
    }
    return Outcome([model], seconds, synthetic, settings.distill.steps)


def inversion_keys(uploads: Sequence[Upload], settings: Settings) -> list[str]:
    """The address of every batch of synthetic images."""
    made_by = [[u.digest for u in uploads], settings.ensemble.model_dump(), settings.inversion.model_dump()]
    batches = -(-settings.inversion.images // settings.inversion.batch_size)
    return [fingerprint("synthetic", made_by, settings.seed, index) for index in range(batches)]


def synthetic_set(
    uploads: Sequence[Upload], settings: Settings, store: Store, first: int | None = None
) -> SyntheticSet:
    """Invert the ensemble of the uploads, batch by batch; finished batches come from the store.

    first: stop after that many batches, default all.
    """
    keys = inversion_keys(uploads, settings)[:first]
    todo = [(index, key) for index, key in enumerate(keys) if not store.has("synthetic", key)]
    if len(todo) > 1 and spreads():
        with progress(len(todo), "inversion", "batch") as bar:
            for _ in parallel(partial(_invert_apart, uploads, settings, store), todo):
                bar.update(1)
    with progress(len(keys) * settings.inversion.iterations, "inversion", "it") as bar:
        return SyntheticSet.concat(
            [_batch(uploads, settings, store, *batch, bar) for batch in enumerate(keys)]
        )


def _batch(
    uploads: Sequence[Upload], settings: Settings, store: Store, index: int, key: str, bar: tqdm
) -> SyntheticSet:
    """One batch of synthetic images, from the store or inverted now."""
    before = bar.n

    def make() -> SyntheticSet:
        ensemble = teacher(uploads, settings)
        labels = label_batches(settings.inversion, ensemble.num_classes, settings.seed)[index]
        return invert(
            ensemble,
            labels.to(device()),
            settings.inversion,
            derive_seed(settings.seed, "batch", index),
            recorded=20 if index == 0 else 0,  # the pictures of one batch are enough to plot
            progress=bar.update,
        )

    made = store.get("synthetic", key, load_synthetic, make, save_synthetic)
    bar.update(before + settings.inversion.iterations - bar.n)
    return made


def _invert_apart(
    uploads: Sequence[Upload], settings: Settings, store: Store, batch: tuple[int, str]
) -> None:
    torch.set_num_threads(settings.threads)
    with progress(settings.inversion.iterations, "inversion", "it") as bar:
        _batch(uploads, settings, store, *batch, bar)


def distill_key(uploads: Sequence[Upload], settings: Settings) -> str:
    """The address of the distilled global model."""
    how = [settings.relabel.model_dump(), settings.distill.model_dump(), weights_digest(settings.model)]
    return fingerprint("global", inversion_keys(uploads, settings), how, settings.seed)


def global_model(
    uploads: Sequence[Upload], synthetic: SyntheticSet, settings: Settings, store: Store
) -> VisionTransformer:
    """Distil the ensemble into one model on the synthetic set, or take it from the store."""
    student = student_start(uploads, settings)

    def make() -> VisionTransformer:
        ensemble = teacher(uploads, settings)
        with progress(settings.distill.steps, "distillation", "step") as bar:
            return distill(
                student,
                ensemble,
                synthetic,
                settings.distill,
                settings.relabel,
                settings.seed,
                progress=bar.update,
            )

    def read(folder: Path) -> VisionTransformer:
        student.load_state_dict(read_tensors(folder / "weights.safetensors"))
        return student.eval()

    def write(model: VisionTransformer, folder: Path) -> None:
        write_tensors(model.state_dict(), folder / "weights.safetensors")

    return store.get("global", distill_key(uploads, settings), read, make, write)
