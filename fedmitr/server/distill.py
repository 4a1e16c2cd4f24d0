"""Distillation: synthetic images, their labels and token labels in, one global model out (method step 5)."""

import copy
from collections.abc import Callable, Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..core.errors import Diverged
from ..core.machine import autocast
from ..core.optimizers import make_optimizer, make_schedule
from ..core.rng import make_rng
from ..settings.schema import DistillSettings, RelabelSettings
from ..vision.features import FeatureClassifier
from ..vision.tokens import image_logits, images_at_once, images_in_training, kept_patches, patch_features
from .ensemble import CombinedModels
from .relabel import background_labels, soft_token_labels, tempered, token_targets
from .synthetic import SyntheticSet
from .views import Batch, draw_views, epochs, rows_of, view

FIT_VIEWS = 4  # views of each image to which calibration is fitted


def distill(
    student: VisionTransformer,
    ensemble: CombinedModels,
    synthetic: SyntheticSet,
    settings: DistillSettings,
    relabel: RelabelSettings,
    seed: int,
    *,
    progress: Callable[[int], object] | None = None,
) -> VisionTransformer:
    """Train the student, in place, on random views of the synthetic set; return it in evaluation mode.

    With `settings.calibrate` the ensemble that labels the views is `calibrated` first. With `relabel.head` =
    "own" a copy of the student's classifier, LV-ViT's `aux_head` (Jiang et al. 2021), learns the patch
    tokens. It is dropped in the end, so that the student stays a plain ViT; LV-ViT uses it at inference too.
    progress is called with 1 after each step.
    """
    rng = make_rng(seed, "distill")
    if relabel.head == "own":
        student.aux_head = copy.deepcopy(student.head)
    optimizer, schedule = student_optimizer(student, settings)
    if settings.calibrate:
        ensemble = calibrated(ensemble, student, synthetic, settings, seed)
    labelled_view = view_labeller(student, ensemble, synthetic, settings, relabel, rng)
    draw, count = labelled_view, len(synthetic)
    if settings.views:  # the teacher, K forwards an image, labels every view once
        pool = draw_views(labelled_view, count, settings.views, rng, images_at_once(student))
        draw, count = rows_of(pool), len(pool[0])
    batches = map(draw, islice(epochs(count, settings.batch_size, rng), settings.steps))
    train_student(student, batches, optimizer, schedule, settings, relabel, progress)
    if relabel.head == "own":
        del student.aux_head
    return student


def view_labeller(
    student: VisionTransformer,
    ensemble: CombinedModels,
    synthetic: SyntheticSet,
    settings: DistillSettings,
    relabel: RelabelSettings,
    rng: torch.Generator,
) -> Callable[[Tensor], Batch]:
    """Return a function that draws a view of images `pick` (B,) and labels it, as the student learns it.

    It returns images (B, ch, H, W), the teacher's log-probabilities (B, C), labels (B,) and token targets
    (B, N, C).
    """
    background = None  # (n, C)
    if relabel.source == "background_cls":
        background = background_labels(ensemble, synthetic, relabel.temperature)

    def labelled_view(pick: Tensor) -> Batch:
        images, mask = view(student, synthetic, pick, settings, rng)
        labels, teacher = synthetic.labels[pick], ensemble.drawn(settings.per_class, rng)
        own_background = None if background is None else background[pick]
        log_probs, soft = soft_token_labels(teacher, images, own_background, relabel)
        return images, log_probs, labels, token_targets(labels, mask, soft, relabel)

    return labelled_view


def calibrated(
    ensemble: CombinedModels,
    student: VisionTransformer,
    synthetic: SyntheticSet,
    settings: DistillSettings,
    seed: int,
) -> CombinedModels:
    """Return the ensemble with class offsets fitted to labelled views of the synthetic set (`fit_offset`).

    This helps where the images' labels do not come from the ensemble itself: with inversion.teacher=owners
    they come from a client drawn by its share of the class.
    """
    rng = make_rng(seed, "calibration")

    def predicted_view(pick: Tensor) -> Batch:
        images = view(student, synthetic, pick, settings, rng)[0]
        with torch.no_grad():
            return ensemble.drawn(settings.per_class, rng)(images), synthetic.labels[pick]

    views = draw_views(predicted_view, len(synthetic), FIT_VIEWS, rng, images_at_once(student))
    return ensemble.calibrated(ensemble.offset + fit_offset(*views, settings.calibrate))


def student_optimizer(student: VisionTransformer, settings: DistillSettings, steps: int | None = None):
    """Return AdamW on what trains, and its one-cycle schedule over `steps`, default settings.steps."""
    optimizer = make_optimizer(set_trained(student, settings), "adamw", settings.lr, settings.weight_decay)
    return optimizer, make_schedule(optimizer, "one_cycle", steps or settings.steps)


def set_trained(student: VisionTransformer, settings: DistillSettings) -> VisionTransformer:
    """Let gradients reach all of the student or, with `settings.train` = "head", its classifiers alone."""
    student.requires_grad_(settings.train == "all")
    for head in (student.head, token_head(student)):
        head.requires_grad_(True)
    return student


def token_head(student: VisionTransformer) -> nn.Module:
    """Return the classifier of the student's patch tokens: its own where it has one, else that of CLS."""
    return getattr(student, "aux_head", student.head)


def train_student(
    student: VisionTransformer,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    settings: DistillSettings,
    relabel: RelabelSettings,
    progress: Callable[[int], object] | None = None,
) -> VisionTransformer:
    """Take one step on each batch: images, teacher's log-probabilities, labels, token targets.

    Returns the student in evaluation mode. Raises Diverged when it did. progress is called with 1 after
    each step.
    """
    set_trained(student, settings).train()
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        add_gradients(student, batch, settings, relabel)
        clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(1)
    if not all(torch.isfinite(p).all() for p in student.parameters()):
        raise Diverged(
            f"distill.lr={settings.lr} (student_lr of another method): the student diverged to NaN or Inf; "
            "allowed is a lower rate"
        )
    return student.eval()


def add_gradients(
    student: VisionTransformer, batch: Batch, settings: DistillSettings, relabel: RelabelSettings
) -> None:
    """Add the gradients of the batch's loss, a mean over images, to those of the student.

    On a CPU `images_in_training` images are forwarded at a time, to bound memory; on a GPU all at once.
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
    """Compute T²·KL(A_T ‖ softmax(z^0/T)) + λ_ce·CE(z^0, y) + λ_tok·(1/N) Σ_i CE(z^i, ℓ_i), mean over images.

    images (B, ch, H, W); teacher: log A^0 (B, C), A_T ∝ (A^0)^(1/T); labels y (B,); tokens: ℓ (B, N, C).
    """
    use_tokens = settings.token_weight > 0 and relabel.mode != "none"
    with autocast(settings.precision):
        if use_tokens:
            cls_logits, token_logits = student_logits(student, images)
        else:
            cls_logits, token_logits = image_logits(student, images), None
    temperature, cls_logits = settings.temperature, cls_logits.to(images)
    student_log_probs = F.log_softmax(cls_logits / temperature, dim=-1)
    loss = temperature**2 * F.kl_div(student_log_probs, tempered(teacher, temperature), reduction="batchmean")
    if settings.ce_weight:
        loss = loss + settings.ce_weight * F.cross_entropy(cls_logits, labels)
    if use_tokens:
        token_logits = token_logits.to(images).flatten(0, 1)  # (B·N, C)
        loss = loss + settings.token_weight * F.cross_entropy(token_logits, tokens.flatten(0, 1))
    return loss


def student_logits(student: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the student's class logits z^0 (B, C), and logits of every patch token, z^i (B, N, C)."""
    if isinstance(student, FeatureClassifier):
        return student.forward_tokens(images)
    features = patch_features(student, *kept_patches(student, images))  # (B, P + N, d)
    tokens = student.fc_norm(features[:, student.num_prefix_tokens :])  # (B, N, d)
    return student.forward_head(features), token_head(student)(tokens)


def fit_offset(log_probs: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Return class offsets o (C,) = argmin_o mean CE(log p + o, y) + λ |o|² for log p (n, C), labels y (n,).

    Vector scaling (Guo et al. 2017) with its bias alone: clients were trained apart, so their classes'
    logits differ in level. The problem is convex; it is solved by L-BFGS in double precision.
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
