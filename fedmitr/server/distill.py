"""Distillation: synthetic images, labels and token labels in, one global model out (method step 5)."""

from collections.abc import Callable, Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..core.errors import BadInput
from ..core.machine import autocast
from ..core.optimizers import make_optimizer, make_schedule
from ..core.rng import make_rng
from ..settings.schema import DistillSettings, RelabelSettings
from ..vision.tokens import forward_tokens, image_logits, images_at_once, images_in_training
from .ensemble import Ensemble
from .relabel import background_labels, soft_token_labels, tempered, token_targets
from .synthetic import SyntheticSet
from .views import Batch, draw_views, epochs, rows_of, view

FIT_VIEWS = 4  # views of each image that calibration sees


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
    rng = make_rng(seed, "distill")
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
    rng = make_rng(seed, "calibration")

    def labelled(pick: Tensor) -> Batch:
        images = view(student, synthetic, pick, settings, rng)[0]
        with torch.no_grad():
            return ensemble.drawn(settings.per_class, rng)(images), synthetic.labels[pick]

    views = draw_views(labelled, len(synthetic), FIT_VIEWS, rng, images_at_once(student))
    return ensemble.calibrated(ensemble.offset + fit_offset(*views, settings.calibrate))


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


def fit_offset(log_probs: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Class offsets o (C,) = argmin mean CE(log p + o, y) + λ |o|² for log p (n, C) and labels (n,).

    Vector scaling (Guo et al. 2017) by its bias alone: clients were trained apart, so that the logits of
    their classes stand on different levels. Convex; in double precision.
    """
    log_probs = log_probs.detach().double()
    offset = torch.zeros(log_probs.shape[1], dtype=torch.double, device=log_probs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([offset], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(log_probs + offset, labels) + penalty * offset.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return offset.detach().float()
