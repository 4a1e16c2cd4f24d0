"""F-DAFL: data-free learning of students (Chen et al., ICCV 2019) with the ensemble as its teacher.

The generator sees noise only; its images x should be recognised as some class, excite the teacher's
features f, and show all classes alike (the ensemble A stands for the one teacher):

    min over generator   CE(A(x), argmax A(x)) − α·mean|f(x)| − β·H(mean A(x))

then the student learns A on its images; the two alternate. Published: α = 0.1, β = 5, batches of 512,
the student on fresh images in every step.

What changes here: the generator is trained in rounds, after each of which it adds its share of the
synthetic images to the pool, so that the budget is that of every other method. f is a ViT's input to
the classifier; layer normalisation fixes its scale, so the activation term says much less than for a
CNN. The entropy is in nats. Images are balanced by it alone: nobody asks for a class.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import FdaflSettings
from ..ensemble import Ensemble
from ..runtime import autocast, generator, progress, timed
from ..settings import Settings
from ..store import Store
from ..upload import Upload
from ..vit import patch_features, read_by_head
from .generator import Generator, make_adam, noise, take_step
from .outcome import Outcome
from .rounds import Student, budget, portions, stored


def fdafl(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Uploads to one global model, by rounds of generation and distillation."""
    return stored("fdafl", uploads, settings, store, partial(_rounds, uploads, settings))


def _rounds(uploads: Sequence[Upload], settings: Settings) -> Outcome:
    own, seconds = settings.fdafl, {}
    images, steps = budget(settings, own)
    student = Student(uploads, settings, "fdafl", steps)
    rng = generator(settings.seed, "fdafl")
    maker = Generator(student.vit, own, rng)
    optimizer = make_adam(maker.parameters(), own)
    rounds = min(own.rounds, images)
    with progress(rounds * own.generator_steps + steps, "F-DAFL", "step") as bar:
        for count, share in zip(portions(images, rounds), portions(steps, rounds), strict=True):
            with timed(seconds, "generation"):
                for _ in range(own.generator_steps):
                    made = maker(noise(own.batch_size, own, rng))
                    take_step(optimizer, generator_loss(*excite(student.ensemble, made), own), maker)
                    bar.update(1)
                with torch.no_grad():
                    made = maker(noise(count, own, rng))
                    labels = student.ensemble(made).argmax(1)
            with timed(seconds, "distillation"):
                student.add(made, labels)
                student.learn(share, lambda logits, _: student.ensemble.combine(logits), bar.update)
    return Outcome([student.vit], seconds, student.images, steps)


def excite(ensemble: Ensemble, images: Tensor) -> tuple[Tensor, Tensor]:
    """The ensemble's log-probabilities (B, C), and all clients' features before the head, in one row."""

    def before_head(k: int, patches: Tensor, position: Tensor) -> Tensor:
        member, seen = ensemble.members[k], ensemble.seen_by(k, patches, position)
        return member.forward_head(patch_features(member, *seen, read_by_head(member)), pre_logits=True)

    with autocast(ensemble.precision):
        features = ensemble.each(before_head, *ensemble.cut(images))
        logits = [m.head(f) for m, f in zip(ensemble.members, features, strict=True)]
    in_a_row = torch.cat([f.flatten() for f in features])  # clients' widths may differ
    return ensemble.combine(torch.stack(logits).to(images)), in_a_row.to(images)


def generator_loss(log_probs: Tensor, features: Tensor, settings: FdaflSettings) -> Tensor:
    """One-hot loss − α·mean|f| − β·entropy of the mean prediction (nats)."""
    one_hot = F.nll_loss(log_probs, log_probs.argmax(1))
    mean = (log_probs.logsumexp(0) - math.log(len(log_probs))).clamp(min=-1e3)  # its log, never -inf
    entropy = -(mean.exp() * mean).sum()
    return one_hot - settings.activation * features.abs().mean() - settings.entropy * entropy
