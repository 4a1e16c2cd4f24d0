"""Random textures in place of FedMITR+'s images: what the teacher's labels alone can teach, a reference."""

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.machine import device
from ..core.progress import progress, timed
from ..core.rng import make_rng
from ..core.store import Store
from ..server.distill import distill
from ..server.synthetic import SyntheticSet
from ..server.views import random_textures
from ..settings import Settings
from ..upload import Upload
from ._method import Method, Outcome, Work, find
from ._student import student_start, whole_images
from .fedmitr import build_teacher
from .fedmitr_plus import towards_start, with_additions


def textures(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Distil FedMITR+'s teacher on `inversion.images` random textures."""
    vit, count = student_start(uploads, settings), settings.inversion.images
    like = torch.empty(count, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)
    pixels = random_textures(vit, like, make_rng(settings.seed, "textures"))
    return distil_on("textures", unlabelled(vit, pixels), uploads, settings)


def unlabelled(vit: VisionTransformer, pixels: Tensor) -> SyntheticSet:
    """Return images (n, ch, H, W) as a synthetic set whose labels say nothing and whose patches all count."""
    labels = torch.zeros(len(pixels), dtype=torch.long, device=device())
    return whole_images(vit, pixels.to(device()), labels)


def distil_on(method: str, images: SyntheticSet, uploads: Sequence[Upload], settings: Settings) -> Outcome:
    """Distil FedMITR+'s teacher on other images, by its predictions alone: their labels are not used."""
    seconds: dict[str, float] = {}
    own = settings.changed({"distill.ce_weight": 0, "distill.calibrate": 0, "relabel.mode": "none"})
    with timed(seconds, "distillation"), progress(own.distill.steps, find(method).label, "step") as bar:
        student, teacher = student_start(uploads, own), build_teacher(uploads, own)
        distill(student, teacher, images, own.distill, own.relabel, own.seed, progress=bar.update)
    return towards_start(Outcome([student], seconds, images, own.distill.steps), uploads, own)


def substitute(name: str, run, **more) -> Method:
    """Make the record of a reference that distils FedMITR+'s teacher on other images."""
    return Method(
        name=name,
        run=run,
        family="reference",
        citation="",
        tuned_as="fedmitr_plus",
        adapt=with_additions,
        work=lambda settings: Work(images=settings.inversion.images, student_steps=settings.distill.steps),
        needs_statistics="ensemble.anchor",
        **more,
    )


METHOD = substitute("textures", textures)
