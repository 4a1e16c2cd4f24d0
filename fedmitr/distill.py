"""Distillation: synthetic images, labels and token labels in, one global model out (method step 5)."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from .augment import random_maps, warp, warp_mask
from .blocks import DistillSettings, RelabelSettings
from .ensemble import Ensemble, fit_offset
from .errors import BadInput
from .inversion import SyntheticSet
from .optim import make_optimizer, make_schedule
from .relabel import background_labels, soft_token_labels, tempered, token_targets
from .runtime import autocast, generator
from .scenes import texture
from .vit import forward_tokens, grid_size, image_logits, images_at_once, images_in_training, normalisation

FIT_VIEWS = 4  # views of each image that calibration sees
Batch = tuple[Tensor, ...]


def distill(
    student: VisionTransformer,
    ensemble: Ensemble,
    synthetic: SyntheticSet,
    settings: DistillSettings,
    relabel: RelabelSettings,
    seed: int,
    *,
    progress: Callable[[int], object] | None = None,
) -> VisionTransformer:
    """Train the student, in place, on random views of the synthetic set; returned in evaluation mode.

    With `settings.calibrate` the ensemble that labels them is `calibrated` first. progress is called with
    1 after each step.
    """
    rng = generator(seed, "distill")
    optimizer, schedule = student_optimizer(student, settings)
    if settings.calibrate:
        ensemble = calibrated(ensemble, student, synthetic, settings, seed)
    of_background = None
    if relabel.source == "background_cls":
        of_background = background_labels(ensemble, synthetic, relabel.temperature)

    def fresh(pick: Tensor) -> Batch:
        images, mask = view(student, synthetic, pick, settings, rng)
        labels, teacher = synthetic.labels[pick], ensemble.drawn(settings.per_class, rng)
        background = None if of_background is None else of_background[pick]
        teacher, soft = soft_token_labels(teacher, images, background, relabel)
        return images, teacher, labels, token_targets(labels, mask, soft, relabel)

    draw, count = fresh, len(synthetic)
    if settings.views:  # the teacher, K forwards an image, labels every view once
        pool = draw_views(fresh, count, settings.views, rng, images_at_once(student))
        draw, count = rows_of(pool), len(pool[0])
    batches = map(draw, islice(epochs(count, settings.batch_size, rng), settings.steps))
    return train_student(student, batches, optimizer, schedule, settings, relabel, progress)


def calibrated(
    ensemble: Ensemble,
    student: VisionTransformer,
    synthetic: SyntheticSet,
    settings: DistillSettings,
    seed: int,
) -> Ensemble:
    """The ensemble with class offsets fitted to the labels of views of the synthetic set (`fit_offset`).

    It says something where an image's label does not come from the ensemble itself: with
    inversion.teacher=owners, from the one client that knows the class.
    """
    rng = generator(seed, "calibration")

    def labelled(pick: Tensor) -> Batch:
        images = view(student, synthetic, pick, settings, rng)[0]
        with torch.no_grad():
            return ensemble.drawn(settings.per_class, rng)(images), synthetic.labels[pick]

    views = draw_views(labelled, len(synthetic), FIT_VIEWS, rng, images_at_once(student))
    return ensemble.calibrated(ensemble.offset + fit_offset(*views, settings.calibrate))


def draw_views(
    fresh: Callable[[Tensor], Batch], count: int, views: int, rng: torch.Generator, batch_size: int
) -> Batch:
    """`views` random views of each of `count` images: columns of rows.

    `fresh` draws and labels batch_size of them together.
    """
    drawn = zip(*map(fresh, epochs(count, batch_size, rng, views)), strict=True)
    return tuple(map(torch.cat, drawn))


def rows_of(columns: Batch) -> Callable[[Tensor], Batch]:
    """A function from indices (B,) to those rows of every column."""
    return lambda pick: tuple(column[pick] for column in columns)


def student_optimizer(student: VisionTransformer, settings: DistillSettings, steps: int | None = None):
    """AdamW on all of the student and its one-cycle schedule over `steps`, default settings.steps."""
    student.requires_grad_(True)
    optimizer = make_optimizer(student, "adamw", settings.lr, settings.weight_decay)
    return optimizer, make_schedule(optimizer, "one_cycle", steps or settings.steps)


def train_student(
    student: VisionTransformer,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    settings: DistillSettings,
    relabel: RelabelSettings,
    progress: Callable[[int], object] | None = None,
) -> VisionTransformer:
    """One step on each batch: images, teacher's log-probabilities, labels, token targets.

    Returns the student in evaluation mode. Raises BadInput when it diverged.
    """
    student.train().requires_grad_(True)
    for images, teacher, labels, tokens in batches:
        optimizer.zero_grad(set_to_none=True)
        take_gradients(student, (images, teacher, labels, tokens), settings, relabel)
        clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(1)
    if not all(torch.isfinite(p).all() for p in student.parameters()):
        raise BadInput(
            f"distill.lr={settings.lr} (student_lr of another method): the student diverged to NaN or Inf; "
            "allowed is a lower rate"
        )
    return student.eval()


def take_gradients(
    student: VisionTransformer, batch: Batch, settings: DistillSettings, relabel: RelabelSettings
) -> None:
    """Add the gradients of the batch's loss, a mean over images, with few large images held at a time.

    A GPU, which is made for large batches, sees all at once.
    """
    count = len(batch[0])
    few = count if batch[0].is_cuda else images_in_training(student)
    for first in range(0, count, few):
        part = [None if column is None else column[first : first + few] for column in batch]
        share = len(part[0]) / count
        (share * distill_loss(student, *part, settings, relabel)).backward()


def distill_loss(
    student: VisionTransformer,
    images: Tensor,
    teacher: Tensor,
    labels: Tensor,
    tokens: Tensor,
    settings: DistillSettings,
    relabel: RelabelSettings,
) -> Tensor:
    """T²·KL(A^0 ‖ z^0) + λ_ce·CE(z^0, y) + λ_tok·(1/N) Σ_i CE(z^i, ℓ_i).

    images (B, ch, H, W); teacher log-probabilities (B, C); labels (B,); token targets (B, N, C).
    """
    use_tokens = settings.token_weight > 0 and relabel.mode != "none"
    with autocast(settings.precision):
        if use_tokens:
            of_cls, of_tokens = forward_tokens(student, images)
        else:
            of_cls, of_tokens = image_logits(student, images), None
    heat, of_cls = settings.temperature, of_cls.to(images)
    target = tempered(teacher, heat)
    loss = heat**2 * F.kl_div(F.log_softmax(of_cls / heat, dim=-1), target, reduction="batchmean")
    if settings.ce_weight:
        loss = loss + settings.ce_weight * F.cross_entropy(of_cls, labels)
    if use_tokens:
        of_tokens = of_tokens.to(images).flatten(0, 1)
        loss = loss + settings.token_weight * F.cross_entropy(of_tokens, tokens.flatten(0, 1))
    return loss


def view(
    student: VisionTransformer,
    synthetic: SyntheticSet,
    pick: Tensor,
    settings: DistillSettings,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A random view of images `pick` (B,): pixels (B, ch, H, W) and patch mask (B, N), moved together.

    With background=texture the low-information patches show a fresh texture in every view, so that
    the student cannot learn from what surrounded the foreground.
    """
    images, mask = synthetic.pixels[pick], synthetic.mask[pick]
    grid = grid_size(student)
    if settings.augment:
        maps = random_maps(len(pick), settings.augment, rng)
        images, mask = warp(images, maps), warp_mask(mask, maps, grid)
    if settings.background == "texture" and not mask.all():  # dense inversion has no background
        foreground = pixel_mask(mask, grid, images.shape[-2:])
        images = torch.where(foreground, images, random_textures(student, images, rng))
    return images, mask


def random_textures(student: VisionTransformer, like: Tensor, rng: torch.Generator) -> Tensor:
    """Smooth random textures of random contrast, normalised and shaped as `like` (B, ch, H, W)."""
    batch, channels, side, _ = like.shape
    contrast = torch.rand(batch, 1, 1, 1, generator=rng)
    mean, std = (s.to(like) for s in normalisation(student))
    smooth = contrast * texture(batch * channels, side, rng).view(batch, channels, side, side)
    return (smooth.to(like) - mean) / std


def pixel_mask(mask: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A patch mask (B, N) as pixels (B, 1, H, W)."""
    height, width = size[0] // grid[0], size[1] // grid[1]
    return mask.view(-1, 1, *grid).repeat_interleave(height, 2).repeat_interleave(width, 3)


def epochs(count: int, batch_size: int, rng: torch.Generator, times: int | None = None) -> Iterator[Tensor]:
    """Indices of batch after batch, each of `count` once an epoch, for ever or `times` epochs."""
    for _ in itertools.count() if times is None else range(times):
        yield from torch.randperm(count, generator=rng).split(batch_size)
