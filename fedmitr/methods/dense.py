"""DENSE (Zhang et al., NeurIPS 2022): a generator finds images on which student and ensemble disagree.

Generation, for a batch of labels y and the ensemble A:

    min over generator and noise   CE(A(x), y) + λ1·L_BN − λ2·mean ω·KL(A(x)^(1/T) ‖ student(x)^(1/T)),
    ω = 1 where the two predict different classes (images at the boundary), else 0

then distillation of A, at temperature 4, on all images made so far, their labels unused; the two alternate.
Published: 200 rounds of 30 generator steps on 128 images, Adam 1e-3, T = 3, a generator and noise started
anew in every round, its weights from N(0, 0.02²), one pass over all images a round (values of the
implementation that Co-Boosting's authors published beside theirs; DENSE's own command has batches of 256, T
= 1 and distils at 20).

What a ViT changes: it has no batch normalisation, so there are no statistics to match and L_BN is
absent; nothing takes its place. The student starts where every method's does (`distill.start`), views
and optimiser are those of the `distill` block (at a rate of its own), and A is the run's ensemble
(published: the mean of the logits). Targets are balanced over the classes that clients hold.

`_generator.distil_generated` runs the rounds; this file supplies the loss and how images are made.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.machine import device
from ..core.store import Store
from ..server.ensemble import Ensemble
from ..settings import Settings
from ..settings.schema import NotNegative, Positive, setting
from ..upload import Upload
from ._generator import (
    GeneratorSettings,
    balanced_targets,
    distil_generated,
    divergence,
    generator_search,
    generator_work,
    learned_batch,
)
from ._method import Method, Outcome, Range
from ._student import KD_TEMPERATURE, Generation, Images, Student


class DenseSettings(GeneratorSettings):
    """DENSE: images of given classes on which student and ensemble still disagree."""

    lr: Positive = setting(2e-2, "Adam's learning rate of the generator", "choice; DENSE, Co-Boosting: 1e-3")
    kd_temperature: Positive = setting(
        4.0, KD_TEMPERATURE, "DENSE and Co-Boosting, in Co-Boosting's code; DENSE's command: 20"
    )
    disagreement: NotNegative = setting(
        1.0, "weight of the boundary-support loss", "DENSE, in Co-Boosting's code"
    )
    temperature: Positive = setting(
        3.0, "temperature T of the boundary-support loss", "DENSE, in Co-Boosting's code"
    )


def dense(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn uploads into one global model, by rounds of generation and distillation."""
    return distil_generated("dense", uploads, settings, store, partial(_begin, uploads, settings.dense))


def _begin(
    uploads: Sequence[Upload],
    own: DenseSettings,
    student: Student,
    counts: Sequence[int],
    rng: torch.Generator,
    progress: Callable[[int], object],
) -> Generation:
    """Prepare a run; counts holds the number of images of each round."""
    targets = balanced_targets(uploads, counts, rng)
    loss = partial(generator_loss, student.ensemble, student.logits, own)

    def make(index: int) -> Images:
        labels = targets[index].to(device())  # (n,)
        return [(learned_batch(student.vit, labels, loss, own, rng, progress), labels)]

    return Generation(make)


def generator_loss(
    ensemble: Ensemble,
    student: Callable[[Tensor], Tensor],
    settings: DenseSettings,
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    """Compute CE(A(x), y) − λ·mean ω·T²·KL(A ‖ student), ω = 1 for images on which the two differ.

    student: a function from images (B, ch, H, W) to logits (B, C); labels (B,).
    """
    teacher, student_logits = ensemble(images), student(images)  # (B, C) each
    differ = (teacher.argmax(1) != student_logits.argmax(1)).to(teacher)  # ω (B,)
    boundary = (differ * divergence(teacher, student_logits, settings.temperature)).mean()
    return F.nll_loss(teacher, labels) - settings.disagreement * boundary


METHOD = Method(
    name="dense",
    run=dense,
    label="DENSE",
    citation="Zhang et al., NeurIPS 2022",
    settings=DenseSettings,
    search={
        **generator_search("dense"),
        "dense.disagreement": (0.0, 0.3, 1.0, 3.0, 10.0),
        "dense.temperature": Range(1.0, 20.0, log=True),
    },
    work=lambda settings: generator_work(settings, settings.dense),
)
