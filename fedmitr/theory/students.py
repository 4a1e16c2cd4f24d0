"""Students of one cell: what they learn from, their training, and what is measured of them.

A sample is a synthetic image with its views and their labels. Students of a cell differ in one sample, and
see all samples in the same order.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.gradients import Loss
from ..core.rng import make_rng
from ..server.distill import distill_loss, student_optimizer, train_student, view_labeller
from ..server.ensemble import Ensemble
from ..server.inversion import attention_mask, remaining
from ..server.synthetic import SyntheticSet
from ..server.views import Batch, draw_views, epochs, rows_of
from ..settings import Settings
from ..settings.schema import DistillSettings, RelabelSettings
from ..vision.tokens import images_at_once
from .gradients import average_labels, gradient_noise, sample_losses
from .stability import descend, distance, replace_sample

RATE = 0.01  # of SGD: below 2/β, so that on a convex loss its steps would move no two students apart
SAMPLES = 64  # of the views, drawn at random: on them a gradient's variance is measured
NO_TOKENS = RelabelSettings(mode="none")


class Material(NamedTuple):
    """What a cell's students learn from and are measured on; pools are columns of labelled views.

    pool: every image with all its views; samples (rows,): the image of each of its rows; others: pools in
    which one image is another. held_out, test: one view of each synthetic image that no student sees, and
    the test images.
    """

    pool: Batch
    samples: Tensor
    others: list[Batch]
    held_out: Batch
    test: Batch


def labelled_pool(
    student: nn.Module, teacher: Ensemble, synthetic: SyntheticSet, settings: Settings, views: int, name: str
) -> tuple[Batch, Tensor]:
    """Return labelled views of every image as the student learns them, and the image (rows,) of each row."""
    rng = make_rng(settings.seed, "theory", name)
    draw = view_labeller(student, teacher, synthetic, settings.distill, settings.relabel, rng)
    few = images_at_once(student)
    *pool, samples = draw_views(lambda pick: (*draw(pick), pick), len(synthetic), views, rng, few)
    return tuple(pool), samples


def subset(synthetic: SyntheticSet, index: Tensor) -> SyntheticSet:
    """Return some images of a synthetic set, without its history."""
    columns = (synthetic.pixels, synthetic.labels, synthetic.mask, synthetic.loss)
    return SyntheticSet(*(column[index] for column in columns))


def masked(ensemble: Ensemble, synthetic: SyntheticSet, settings: Settings) -> SyntheticSet:
    """Return a set of dense inversion with the mask of as many patches as a sparse one keeps."""
    if not synthetic.mask.all():
        return synthetic
    count = remaining(ensemble.grid.patches, settings.inversion.stop_ratio)
    parts = synthetic.pixels.split(images_at_once(ensemble))
    mask = torch.cat([attention_mask(ensemble, part, ensemble.grid, count) for part in parts])
    return SyntheticSet(synthetic.pixels, synthetic.labels, mask, synthetic.loss)


def prepare(
    start: nn.Module,
    ensemble: Ensemble,
    train: SyntheticSet,
    substitutes: SyntheticSet,
    held: SyntheticSet,
    test: tuple[Tensor, Tensor],
    settings: Settings,
) -> Material:
    """Label the views of what a cell's students learn from and are measured on.

    Each of the substitutes takes the place of one random training image. test: images and labels.
    """
    label = partial(labelled_pool, start, ensemble, settings=settings)
    pool, samples = label(train, views=settings.distill.views, name="train")
    other, whose = label(substitutes, views=settings.distill.views, name="substitutes")
    chosen = torch.randperm(len(train), generator=make_rng(settings.seed, "theory", "replaced"))
    others = [
        replace_sample(pool, samples, int(chosen[number]), rows_of(other)((whose == number).nonzero()[:, 0]))
        for number in range(len(substitutes))
    ]
    held_out, _ = label(held, views=1, name="held out")
    images, labels = test
    with torch.no_grad():
        log_probs = ensemble(images)
    no_tokens = log_probs.new_empty(len(images), 0, log_probs.shape[1])
    return Material(pool, samples, others, held_out, (images, log_probs, labels, no_tokens))


def loss_of(distill: DistillSettings, relabel: RelabelSettings) -> Loss:
    """Return the student's loss as a function of model and rows."""
    return partial(distill_loss, settings=distill, relabel=relabel)


def students(
    student: nn.Module, pool: Batch, steps: Sequence[int], settings: Settings, optimizer: str
) -> Iterator[nn.Module]:
    """Train a student, in place, and yield it at each of these steps; the order of rows is the seed's."""
    loss = loss_of(settings.distill, settings.relabel)
    order = epochs(len(pool[0]), settings.distill.batch_size, make_rng(settings.seed, "theory", "order"))
    batches = map(rows_of(pool), order)
    if optimizer == "adamw":
        adamw, schedule = student_optimizer(student, settings.distill)
    done = 0
    for step in steps:
        part = islice(batches, step - done)
        if optimizer == "sgd":
            descend(student, loss, part, RATE)
        else:
            train_student(student, part, adamw, schedule, settings.distill, settings.relabel)
        done = step
        yield student.eval()


def measure(
    student: nn.Module,
    others: Sequence[nn.Module],
    material: Material,
    distill: DistillSettings,
    relabel: RelabelSettings,
) -> dict[str, float]:
    """Measure a student, and how far those lie that had one image replaced; NaN where there are none.

    The variance is that of the first `SAMPLES` views, whose order is random. Losses on training images are of
    one view of each, on average over views those that were trained on.
    """
    loss, alone = loss_of(distill, relabel), loss_of(distill, NO_TOKENS)
    some = tuple(column[:SAMPLES] for column in material.pool)
    noise = gradient_noise(student, loss, some, average_labels(some, distill.temperature))
    first = tuple(column[: len(material.samples.unique())] for column in material.pool)  # the first epoch
    own = sample_losses(student, loss, material.held_out)  # (n,)
    apart = torch.full((1, len(own)), torch.nan)
    if others:
        apart = torch.stack(
            [(sample_losses(s, loss, material.held_out) - own).abs() for s in others]
        )  # (R, n)
    far = [distance(student, other) for other in others]
    return {
        "variance": noise.variance,
        "variance_error": noise.error,
        "from_images": noise.images,
        "from_labels": noise.labels,
        "signal": noise.signal,
        "distance": sum(far) / len(far) if far else float("nan"),
        "loss_distance": apart.mean().item(),
        "loss_distance_max": apart.mean(dim=0).max().item(),
        "train": sample_losses(student, loss, first).mean().item(),
        "held_out": own.mean().item(),
        "train_kd": sample_losses(student, alone, first).mean().item(),
        "held_out_kd": sample_losses(student, alone, material.held_out).mean().item(),
        "test_kd": sample_losses(student, alone, material.test).mean().item(),
    }
