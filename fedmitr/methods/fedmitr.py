"""FedMITR: sparse model inversion, token relabel, distillation (method steps 2 to 5).

"Exploring One-Shot Federated Learning by Model Inversion and Token Relabel with Vision
Transformers" (ICLR 2025 submission 9305; arXiv 2605.10748).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

from ..distill import distill
from ..ensemble import Ensemble
from ..inversion import SyntheticSet, invert, label_batches, load_synthetic, save_synthetic
from ..runtime import derive_seed, device, progress
from ..settings import Settings
from ..store import Store, fingerprint, read_tensors, write_tensors
from ..upload import Upload, average_weights
from ..vit import create_vit, weights_digest


def fedmitr(uploads: Sequence[Upload], settings: Settings, store: Store) -> list[VisionTransformer]:
    """Uploads to one global model: invert, relabel, distil; each stage kept in the store."""
    return [global_model(uploads, synthetic_set(uploads, settings, store), settings, store)]


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
    ensemble = Ensemble(uploads, settings.ensemble).to(device())
    batches = label_batches(settings.inversion, ensemble.num_classes, settings.seed)[:first]
    parts = []
    with progress(len(keys) * settings.inversion.iterations, "inversion", "it") as bar:
        for index, (key, labels) in enumerate(zip(keys, batches, strict=True)):
            before = bar.n
            draw = partial(
                invert,
                ensemble,
                labels.to(device()),
                settings.inversion,
                derive_seed(settings.seed, "batch", index),
                recorded=20 if index == 0 else 0,  # the pictures of one batch are enough to plot
                progress=bar.update,
            )
            parts.append(store.get("synthetic", key, load_synthetic, draw, save_synthetic))
            bar.update(before + settings.inversion.iterations - bar.n)
    return SyntheticSet.concat(parts)


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
        ensemble = Ensemble(uploads, settings.ensemble).to(device())
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


def student_start(uploads: Sequence[Upload], settings: Settings) -> VisionTransformer:
    """The student before distillation: the shared initial model, or the average of the clients."""
    shape, model = uploads[0].shape, settings.model
    if settings.distill.start == "average":
        vit = shape.build()
        vit.load_state_dict(average_weights(uploads))
    else:
        vit = create_vit(
            shape.name,
            shape.num_classes,
            pretrained=model.pretrained,
            checkpoint=model.checkpoint,
            image_size=shape.image_size,
            in_chans=shape.in_chans,
        )
    return vit.to(device())
