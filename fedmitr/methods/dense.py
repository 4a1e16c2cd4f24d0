"""DENSE (Zhang et al., NeurIPS 2022): a generator finds images on which student and ensemble disagree.

Generation, for a batch of classes y and the ensemble A:

    min over generator and noise   CE(A(x), y) + λ1·L_BN − λ2·mean ω·KL(A(x)^(1/T) ‖ student(x)^(1/T)),
    ω = 1 where the two name different classes (images at the boundary), else 0

then distillation of A on all images made so far; the two alternate. Published: 200 rounds of 30
generator steps on 128 images, Adam 1e-3, T = 3, a generator started anew in every round (values of
the implementation that Co-Boosting's authors published beside theirs).

What a ViT changes: it has no batch normalisation, so there are no statistics to match and L_BN is
absent; nothing takes its place. The student starts where every method's does (`distill.start`), views
and optimiser are those of the `distill` block (at a rate of its own), and A is the run's ensemble. Ours:
the images' labels enter the student's loss (`dense.ce_weight`) and give A class offsets
(`dense.calibrate`).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ..blocks import DenseSettings
from ..ensemble import Ensemble, held_classes
from ..inversion import balanced_labels
from ..runtime import device, generator, progress, timed
from ..settings import Settings
from ..store import Store
from ..upload import Upload
from .generator import divergence, learned_batch
from .outcome import Outcome
from .rounds import Student, budget, portions, stored


def dense(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Uploads to one global model, by rounds of generation and distillation."""
    return stored("dense", uploads, settings, store, partial(_rounds, uploads, settings))


def _rounds(uploads: Sequence[Upload], settings: Settings) -> Outcome:
    own, seconds = settings.dense, {}
    images, steps = budget(settings, own)
    student = Student(uploads, settings, "dense", steps)
    rng = generator(settings.seed, "dense")
    held = held_classes(uploads)
    targets = held[balanced_labels(images, len(held), rng)]
    rounds = min(own.rounds, images)
    with progress(rounds * own.generator_steps + steps, "DENSE", "step") as bar:
        shares = zip(targets.split(portions(images, rounds)), portions(steps, rounds), strict=True)
        for labels, share in shares:
            labels = labels.to(device())
            with timed(seconds, "generation"):
                loss = partial(generator_loss, student.ensemble, student.logits, own)
                made = learned_batch(student.vit, labels, loss, own, rng, bar.update)
            with timed(seconds, "distillation"):
                student.add(made, labels)
                student.learn(share, lambda logits, _: student.ensemble.combine(logits), bar.update)
    return Outcome([student.vit], seconds, student.images, steps)


def generator_loss(
    ensemble: Ensemble,
    student: Callable[[Tensor], Tensor],
    settings: DenseSettings,
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    """CE(A(x), y) − λ·mean ω·T²·KL(A ‖ student), ω the images on which the two differ."""
    teacher, of_student = ensemble(images), student(images)
    differ = (teacher.argmax(1) != of_student.argmax(1)).to(teacher)
    boundary = (differ * divergence(teacher, of_student, settings.temperature)).mean()
    return F.nll_loss(teacher, labels) - settings.disagreement * boundary
