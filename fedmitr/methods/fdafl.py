"""F-DAFL: data-free learning of students (Chen et al., ICCV 2019) with the ensemble as its teacher.

The generator is given noise alone. Its images x should be recognised as some class, excite the teacher's
features f, and be predicted as all classes alike; the teacher is the ensemble A:

    min over generator   γ·CE(A(x), argmax A(x)) − α·mean|f(x)| − β·H(mean A(x))

then the student learns A on its images, at T = 1; the two alternate. Published: α = 0.1, β = 5, batches of
512 for MNIST; α = 0.01, β = 5, CE × 0.05, batches of 1,024 for CIFAR-10; the student on fresh images in every
step.

What changes here: the generator is trained in rounds, after each of which it adds its share of the
synthetic images to the pool, so that the budget is that of every other method. f is a ViT's input to the
classifier; layer normalisation fixes its scale, so the activation term says much less than for a CNN. The
entropy is in nats (in the authors' code to base 10). It alone balances the images: none is made for a
target label. The authors' code lets the student's loss move the generator too; the paper does not.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.machine import autocast
from ..core.store import Store
from ..server.ensemble import Ensemble
from ..settings import Settings
from ..settings.schema import Count, NotNegative, setting
from ..upload import Upload
from ..vision.tokens import patch_features, read_by_head
from ._generator import (
    Generator,
    GeneratorSettings,
    distil_generated,
    generator_search,
    generator_work,
    make_adam,
    noise,
    take_step,
)
from ._method import Method, Outcome
from ._student import Generation, Images, Student


class FdaflSettings(GeneratorSettings):
    """F-DAFL: a generator whose images excite the ensemble, each one class, all classes alike."""

    batch_size: Count = setting(64, "images of a generator step", "DAFL: 512")
    one_hot: NotNegative = setting(1.0, "weight of the cross-entropy to the predicted class", "DAFL")
    activation: NotNegative = setting(0.1, "weight α of the teacher's mean absolute feature", "DAFL")
    entropy: NotNegative = setting(5.0, "weight β of the batch's class entropy", "DAFL")


def fdafl(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn uploads into one global model, by rounds of generation and distillation."""
    return distil_generated("fdafl", uploads, settings, store, partial(_begin, settings.fdafl))


def _begin(
    own: FdaflSettings,
    student: Student,
    counts: Sequence[int],
    rng: torch.Generator,
    progress: Callable[[int], object],
) -> Generation:
    """Prepare a run; counts holds the number of images of each round."""
    generator = Generator(student.vit, own, rng, form="dafl")
    optimizer = make_adam(generator.parameters(), own)

    def make(index: int) -> Images:
        for _ in range(own.generator_steps):
            images = generator(noise(own.batch_size, own, rng))  # (B, ch, H, W)
            take_step(optimizer, generator_loss(*excite(student.ensemble, images), own), generator)
            progress(1)
        with torch.no_grad():
            images = generator(noise(counts[index], own, rng))
            return [(images, student.ensemble(images).argmax(1))]

    return Generation(make)


def excite(ensemble: Ensemble, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the ensemble's log-probabilities (B, C) and all clients' features before the head, flat."""

    def before_head(k: int, patches: Tensor, positions: Tensor) -> Tensor:
        member, own = ensemble.members[k], ensemble.patches_for(k, patches, positions)
        return member.forward_head(patch_features(member, *own, read_by_head(member)), pre_logits=True)

    with autocast(ensemble.precision):
        features = ensemble.map_members(before_head, *ensemble.cut(images))
        logits = [m.head(f) for m, f in zip(ensemble.members, features, strict=True)]  # K of (B, C)
    flat = torch.cat([f.flatten() for f in features])  # clients' widths may differ
    return ensemble.combine(torch.stack(logits).to(images)), flat.to(images)


def generator_loss(log_probs: Tensor, features: Tensor, settings: FdaflSettings) -> Tensor:
    """Compute γ·CE(A, argmax A) − α·mean|f| − β·H(mean A), with log A = log_probs (B, C), H in nats."""
    certain = settings.one_hot * F.nll_loss(log_probs, log_probs.argmax(1))
    mean = (log_probs.logsumexp(0) - math.log(len(log_probs))).clamp(min=-1e3)  # log, never -inf: (C,)
    entropy = -(mean.exp() * mean).sum()
    return certain - settings.activation * features.abs().mean() - settings.entropy * entropy


METHOD = Method(
    name="fdafl",
    run=fdafl,
    label="F-DAFL",
    citation="Chen et al., ICCV 2019, with the ensemble as the teacher",
    settings=FdaflSettings,
    search={
        **generator_search("fdafl"),
        "fdafl.one_hot": (0.05, 0.3, 1.0),
        "fdafl.activation": (0.0, 0.03, 0.1, 0.3),
        "fdafl.entropy": (1.0, 5.0, 20.0),
    },
    work=lambda settings: generator_work(settings, settings.fdafl),
)
