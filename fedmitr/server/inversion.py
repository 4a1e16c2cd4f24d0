"""Sparse model inversion: an ensemble and labels in, images and their surviving patches out (method step 3).

Noise is optimised until its teacher predicts the wanted class: a client that holds the class, or the
ensemble (`inversion.teacher`). At each stop the patches that CLS attends to least leave for good: from then
on they get no forward, no gradient, no update (SMI, Hu et al. 2024). An empty schedule of stops is dense
inversion.

Stopped pixels stand still here. In SMI's public code they are only left out of the forward pass: total
variation and Adam's moments go on moving them, and where a view is rolled by parts of a patch, so does the
cross-entropy.

`loss_at` is the equation, `invert` the algorithm; `iterate.py` holds the patches that are still optimised.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.errors import Diverged
from ..core.optimizers import rate_factor
from ..core.rng import make_rng
from ..settings.schema import InversionSettings
from ..vision.patches import PatchGrid, cut_patches
from .ensemble import Ensemble, Owners
from .iterate import BestIterate, LivePatches, Loss, Recorder
from .synthetic import SyntheticSet
from .views import kept_mask, random_view, windows


def invert(
    ensemble: Ensemble,
    labels: Tensor,
    settings: InversionSettings,
    seed: int,
    *,
    opponent: VisionTransformer | None = None,
    competition: float = 0.0,
    recorded: int = 20,
    progress: Callable[[int], object] | None = None,
    watch: Callable[[LivePatches, Loss], object] | None = None,
) -> SyntheticSet:
    """Invert one batch of target labels (B,): minimise `loss_at` over the live pixels by Adam.

    The teacher is the ensemble or, with `settings.teacher` = "owners", for each image one client drawn by
    its share of the class. opponent: a frozen student on which the images should disagree with the teacher,
    weighed by competition. recorded: how many of the images are pictured on the way and at the end, in
    `history["frames"]`. progress is called with 1 after each iteration, watch with the live patches and their
    loss before each step, to measure and not to change. On CPUs the same arguments give the
    same images; a CUDA device may round affine views' gradients differently. Raises BadInput where pixels
    diverge.

    `settings.clip` clips live pixels after each step, as SMI and DeepInversion do: a patch that stopped keeps
    the pixels of its last step, and noise painted over it (`background`) may leave the range.
    """
    rng, grid, batch = make_rng(seed, "inversion"), ensemble.grid, len(labels)
    teacher = Owners.draw(ensemble, labels, seed) if settings.teacher == "owners" else ensemble
    noise = torch.randn((batch, *grid.image), generator=rng)  # (B, ch, H, W)
    bounds = pixel_range(ensemble.stats, labels.device) if settings.clip else None
    live = LivePatches(noise.flatten(1).to(labels.device), grid, settings, bounds)
    best, record = BestIterate(batch, labels.device), Recorder(settings, recorded)
    stops = dict(zip(settings.stop_at, settings.stop_ratio, strict=True))

    for step in range(settings.iterations):
        record.picture(step, live)
        if step in stops:
            rows = surviving_rows(teacher, live, stops[step])
            paint_stopped(live, rows, settings.background, rng)
            live.retain(rows)
        loss = loss_at(live, teacher, labels, settings, rng, opponent, competition)
        if watch:
            watch(live, loss)
        if settings.keep_best and step >= max(settings.stop_at, default=0):
            best.update(loss, live.pixels)
        live.step(loss.gradient, settings.lr * rate_factor(settings.schedule, settings.iterations, step))
        record.add(loss, live)
        if progress:
            progress(1)

    if settings.keep_best:
        live.restore(best.pixels)
        cross_entropy = best.cross_entropy
    else:
        with torch.no_grad():
            log_probs = teacher.forward_patches(live.patches, live.keep)  # (B, C)
            cross_entropy = F.nll_loss(log_probs, labels, reduction="none")
    if not live.image.isfinite().all():
        raise Diverged(
            f"inversion.lr={settings.lr}: the pixels diverged to NaN or Inf; allowed is a lower rate"
        )
    images, mask = live.image.view(batch, *grid.image), live.mask
    if settings.mask == "attention":
        mask = attention_mask(teacher, images, grid, remaining(grid.patches, settings.stop_ratio))
    record.picture(settings.iterations, live, mask)
    return SyntheticSet(images, labels, mask, cross_entropy, record.history(grid))


def loss_at(
    live: LivePatches,
    teacher: Ensemble | Owners,
    labels: Tensor,
    settings: InversionSettings,
    rng: torch.Generator,
    opponent: VisionTransformer | None = None,
    competition: float = 0.0,
) -> Loss:
    """Evaluate each image's loss on one random view, and its gradient at the live pixels:

        L(x) = a_ce CE(A(x_S), y) + a_tv TV(x) + a_l2 |x_S|² + competition (1 − JS(A(x_S), opponent(x_S)))

    x_S: the live patches S of x, as the view shows them to the networks. TV(x): squares over this image, or
    SMI's norms over the whole batch (`settings.tv_norm`); images' losses are added up, so that weights mean
    what they mean in SMI's loss, a mean over images. The last term (Adaptive DeepInversion, Yin et al. 2020)
    needs an opponent. The networks' terms are differentiated through the view's patches alone; the gradients
    of TV and |x_S|² are written out (`LivePatches.gradient`).
    """
    patches, positions, grad_to_image = random_view(live.image, live.keep, live.grid, settings, rng)
    log_probs = teacher.forward_patches(patches, positions)  # log A(x_S), (B, C)
    cross_entropy = F.nll_loss(log_probs, labels, reduction="none")  # (B,)
    loss = settings.ce * cross_entropy
    if opponent is not None and competition:
        opponent_logits = teacher.opponent_logits(opponent, patches, positions)  # (B, C)
        loss = loss + competition * (1 - jensen_shannon(log_probs, opponent_logits))
    (grad_patches,) = torch.autograd.grad(loss.sum(), patches)  # (B, M, ch·p·p)
    return Loss(
        value=loss.detach() + live.regulariser(),
        cross_entropy=cross_entropy.detach(),
        confidence=log_probs.detach().gather(1, labels[:, None])[:, 0].exp(),
        gradient=live.gradient(grad_to_image(grad_patches)),
    )


def jensen_shannon(teacher: Tensor, student: Tensor, temperature: float = 3.0) -> Tensor:
    """Return the JS divergence (B,) of softened predictions, in bits: 0 where they agree, at most 1.

    JS = (KL(p ‖ m) + KL(q ‖ m)) / 2 with m = (p + q) / 2. Takes logits or log-probabilities (B, C). T = 3 as
    in the DeepInversion code, which has another divergence: in nats, KL(m ‖ p) + KL(m ‖ q) in place of the
    sum, of probabilities clamped to [0.01, 0.99]; Yin et al. (2020) weigh it by 0.2.
    """
    p, q = ((x / temperature).log_softmax(dim=-1) for x in (teacher, student))  # log-probabilities
    middle = torch.logaddexp(p, q) - math.log(2)
    both = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(dim=-1)
    return both / (2 * math.log(2))


def remaining(count: int, ratios: Sequence[float]) -> int:
    """Return how many of `count` patches are left when each stop takes its ratio of them; at least one."""
    for ratio in ratios:
        count = max(1, math.floor(count * (1 - ratio) + 0.5))
    return count


def pixel_range(stats: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the values (ch, 1) of black and of white, brightness 0 and 1, after normalisation by stats."""
    mean, std = (s.flatten(1).to(device) for s in stats)  # (ch, 1)
    return -mean / std, (1 - mean) / std


@torch.no_grad()
def attention_mask(teacher: Ensemble | Owners, images: Tensor, grid: PatchGrid, count: int) -> Tensor:
    """Return the `count` patches of each whole image that CLS attends to most, as a mask (B, N)."""
    importance = teacher.importance(*cut_patches(images, grid.patch))  # (B, N)
    return kept_mask(importance.topk(count, dim=1).indices, grid, len(images))


@torch.no_grad()
def surviving_rows(teacher: Ensemble | Owners, live: LivePatches, ratio: float) -> Tensor:
    """Return the rows (B, M') of the live patches that CLS attends to most, in grid order."""
    importance = teacher.importance(live.patches, live.keep)  # (B, M)
    count = remaining(live.patches.shape[1], [ratio])
    return importance.topk(count, dim=1).indices.sort(dim=1).values


def paint_stopped(live: LivePatches, rows: Tensor, background: str, rng: torch.Generator) -> None:
    """Paint the patches that stop now, all live ones but `rows` (B, M'), as `background` says, in place.

    Patches that stopped earlier stay as they are.
    """
    if background == "keep":
        return
    image, survivors = live.image, live.keep.expand(len(rows), -1).gather(1, rows)
    stopped = live.mask & ~kept_mask(survivors, live.grid, len(rows))  # (B, N)
    count = int(stopped[0].sum())
    index = windows(stopped.int().topk(count, dim=1).indices, (0, 0), False, live.grid)[0]  # flat pixels
    fill = {
        "zero": lambda: torch.zeros_like(image),
        "noise": lambda: torch.randn(image.shape, generator=rng).to(image.device),
        "mean": lambda: image.mean(dim=1, keepdim=True).expand_as(image),
    }[background]()
    image.scatter_(1, index, fill.gather(1, index))
