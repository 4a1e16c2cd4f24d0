"""Clients' own images in place of FedMITR+'s: a reference, since no server has them.

The teacher is FedMITR+'s, and so are the number of images, the student and its steps. The images' labels are
not used. What is between this and FedMITR+ is what better synthetic images could win.
"""

from collections.abc import Sequence

import torch

from ..core.rng import make_rng
from ..core.store import Store
from ..settings import Settings
from ..upload import Upload
from ._method import Outcome
from ._start import initial_model
from .textures import distil_on, substitute, unlabelled


def real_images(uploads: Sequence[Upload], settings: Settings, store: Store, pixels: torch.Tensor) -> Outcome:
    """Distil FedMITR+'s teacher on `inversion.images` of all clients' images, pixels (n, ch, H, W)."""
    rng = make_rng(settings.seed, "real images")
    drawn = pixels[torch.randperm(len(pixels), generator=rng)[: settings.inversion.images]]
    images = unlabelled(initial_model(uploads, settings), drawn)
    return distil_on("real_images", images, uploads, settings)


METHOD = substitute("real_images", real_images, label="real images", given="images")
