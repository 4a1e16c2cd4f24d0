"""Sparse model inversion: an ensemble and labels in, images and their surviving patches out.

Noise is optimised until its teacher sees the wanted class in it: one client that knows the class, or the
ensemble (`inversion.teacher`). At each stop the patches that CLS
attends to least leave for good: from then on they get no forward, no gradient, no update
(method step 3; SMI, Hu et al. 2024). An empty schedule of stops is dense inversion.

Only what the views show of surviving patches is differentiated: `_look` cuts it out of the images and
says where it belongs, and the gradient of the regularisers is written out.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.errors import BadInput
from ..core.optimizers import rate_factor
from ..core.rng import make_rng
from ..settings.schema import InversionSettings
from ..vision.augment import random_maps, warp, warp_coverage
from ..vision.patches import PatchGrid, gather_tokens, patchify
from .ensemble import Ensemble, Owners
from .synthetic import SyntheticSet
from .views import halo, random_move, total_variation, total_variation_gradient, windows

FRAMES = 13  # pictures of a batch kept for plotting, from first noise to last iterate


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
) -> SyntheticSet:
    """Invert one batch of target labels (B,): min_x CE(A(x_S), y) + a_tv TV(x) + a_l2 |x|² over Adam.

    A is the ensemble or, with `settings.teacher` = "owners", for each image one client drawn by its share
    of the class. With an opponent, a frozen student, `competition`·(1 − JS(A, opponent)) is added: images on
    which the two disagree (Adaptive DeepInversion, Yin et al. 2020). recorded: how many of the images are pictured
    on the way, in `history["frames"]`. progress is called with 1 after each iteration. On CPUs the
    same arguments give the same images; a CUDA device may round affine views' gradients differently.
    """
    rng, at, batch = make_rng(seed, "inversion"), labels.device, len(labels)
    teacher = Owners.draw(ensemble, labels, seed) if settings.teacher == "owners" else ensemble
    grid = ensemble.grid
    image = torch.randn((batch, *grid.image), generator=rng).flatten(1).to(at)  # (B, ch·H·W)
    keep = torch.arange(grid.patches, device=at)[None]  # (1, N) while every image keeps all; then (B, M)
    live = _Live(image, keep, grid, settings)
    best = _Best(batch, at)
    stops = dict(zip(settings.stop_at, settings.stop_ratio, strict=True))
    log: dict[str, list[Tensor]] = {"loss": [], "cross_entropy": [], "confidence": []}
    kept: list[float] = []
    frames: list[tuple[int, Tensor, Tensor]] = []
    wanted = {round(i * settings.iterations / (FRAMES - 1)) for i in range(FRAMES)} | set(settings.stop_at)

    for step in range(settings.iterations + 1):
        if step in wanted:
            frames.append((step, image[:recorded].clone(), _mask(keep, grid, batch)[:recorded]))
        if step == settings.iterations:
            break
        if step in stops:
            rows = _survivors(teacher, live.patches, keep, stops[step])
            survivors = keep.expand(batch, -1).gather(1, rows)
            _fill(image, keep, survivors, grid, settings.background, rng)
            keep = survivors
            live.keep(rows, keep)
        view, place, back = _look(image, keep, grid, settings, rng)
        log_probs = teacher.forward_patches(view, place)
        cross_entropy = F.nll_loss(log_probs, labels, reduction="none")
        loss = settings.ce * cross_entropy
        if opponent is not None and competition:
            opponent_logits = teacher.opponent_logits(opponent, view, place)
            loss = loss + competition * (1 - jensen_shannon(log_probs, opponent_logits))
        (of_view,) = torch.autograd.grad(loss.sum(), view)
        log_probs, cross_entropy = log_probs.detach(), cross_entropy.detach()
        loss = loss.detach() + live.penalty()
        if settings.keep_best and step >= max(settings.stop_at, default=0):
            best.update(loss, cross_entropy, live.pixels)
        lr = settings.lr * rate_factor(settings.schedule, settings.iterations, step)
        live.step(back(of_view), lr)
        log["loss"].append(loss.mean())
        log["cross_entropy"].append(cross_entropy.mean())
        log["confidence"].append(log_probs.gather(1, labels[:, None]).exp().mean())
        kept.append(keep.shape[1] / grid.patches)
        if progress:
            progress(1)

    if settings.keep_best:
        image.scatter_(1, live.home, best.pixels)
        final = best.cross_entropy
    else:
        with torch.no_grad():
            final = F.nll_loss(teacher.forward_patches(live.patches, keep), labels, reduction="none")
    if not image.isfinite().all():
        raise BadInput(
            f"inversion.lr={settings.lr}: the pixels diverged to NaN or Inf; allowed is a lower rate"
        )
    steps, pictures, masks = zip(*frames, strict=True)
    history = {name: torch.stack(values).cpu() for name, values in log.items()}
    history |= {"kept": torch.tensor(kept), "frame_at": torch.tensor(steps)}
    history["frames"] = torch.stack(pictures).unflatten(2, grid.image).cpu()
    history["frame_masks"] = torch.stack(masks).cpu()
    return SyntheticSet(image.view(batch, *grid.image), labels, _mask(keep, grid, batch), final, history)


View = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]


def _look(
    image: Tensor, keep: Tensor, grid: PatchGrid, settings: InversionSettings, rng: torch.Generator
) -> View:
    """A random view of flat images (B, ch·H·W) on as many patches as are kept (B, M), or (1, M) for all.

    It is rolled and mirrored or, with `augment`, which shifts as well, goes through an affine map instead.
    Returns its patches (B, M, ch·p·p), which want a gradient, their places (B, M) or (1, M), and a function
    that takes this gradient back to the images.
    """
    shift, mirrored = random_move(grid, settings.jitter, settings.flip, rng)
    if settings.augment:
        maps = random_maps(len(image), settings.augment, rng)
        maps[:, :, 0] *= -1 if mirrored else 1
        return _warped(image, keep, grid, maps)
    index, place = windows(keep, shift, mirrored, grid)
    index = index.expand(len(image), -1)  # one row while all images keep the same patches
    patches = image.gather(1, index).view(len(image), keep.shape[1], -1).requires_grad_()
    return patches, place, lambda g: torch.zeros_like(image).scatter_(1, index, g.flatten(1))


def _warped(image: Tensor, keep: Tensor, grid: PatchGrid, maps: Tensor) -> View:
    """`_look` through affine maps (B, 2, 3), at the places where most is seen of kept patches."""
    whole = image.view(len(image), *grid.image).detach().requires_grad_()
    patches, place = patchify(warp(whole, maps), grid.patch), keep
    if keep.shape[1] < grid.patches:
        coverage = warp_coverage(_mask(keep, grid, len(image)), maps, grid.shape)
        place = coverage.topk(keep.shape[1], dim=1).indices.sort(dim=1).values
        patches = gather_tokens(patches, place)
    view = patches.detach().requires_grad_()
    return view, place, lambda g: torch.autograd.grad(patches, whole, g)[0].flatten(1)


def jensen_shannon(teacher: Tensor, student: Tensor, temperature: float = 3.0) -> Tensor:
    """JS divergence (B,) of softened predictions, in bits: 0 where they agree, at most 1.

    Takes logits or log-probabilities (B, C). T = 3 as in the DeepInversion code.
    """
    p, q = ((x / temperature).log_softmax(dim=-1) for x in (teacher, student))
    middle = torch.logaddexp(p, q) - math.log(2)
    both = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(dim=-1)
    return both / (2 * math.log(2))


def remaining(count: int, ratios: Sequence[float]) -> int:
    """Patches left of count after stops that each take a share of the remaining (at least one stays)."""
    for ratio in ratios:
        count = max(1, math.floor(count * (1 - ratio) + 0.5))
    return count


@torch.no_grad()
def _survivors(teacher: Ensemble | Owners, patches: Tensor, keep: Tensor, ratio: float) -> Tensor:
    """Rows (B, M') of the patches that CLS attends to most, in grid order."""
    importance = teacher.importance(patches, keep)
    count = remaining(patches.shape[1], [ratio])
    return importance.topk(count, dim=1).indices.sort(dim=1).values


class _Live:
    """The pixels (B, M·ch·p·p) of the surviving patches, where they belong, and Adam on them alone."""

    def __init__(self, image: Tensor, keep: Tensor, grid: PatchGrid, settings: InversionSettings) -> None:
        self.image, self.grid, self.settings = image, grid, settings
        self._place(keep)
        self.pixels = image.gather(1, self.home)
        self.adam = self._adam()

    def _place(self, keep: Tensor) -> None:
        """home and around: flat pixels of the patches `keep`, and with those that touch them."""
        batch = len(self.image)
        self.home = windows(keep, (0, 0), False, self.grid)[0].expand(batch, -1)
        self.around = halo(keep, self.grid).expand(batch, -1, -1, -1, -1)

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam([self.pixels], self.settings.lr, self.settings.betas, fused=True)

    @property
    def patches(self) -> Tensor:
        """(B, M, ch·p·p)"""
        return self.pixels.view(*self.around.shape[:2], -1)

    def keep(self, rows: Tensor, keep: Tensor) -> None:
        """Drop every patch but these rows (B, M'), which are the patches `keep`, with Adam's moments."""
        before, width = self.adam.state.pop(self.pixels, {}), self.patches.shape[1]

        def survivors(values: Tensor) -> Tensor:
            return gather_tokens(values.view(len(rows), width, -1), rows).flatten(1)

        self._place(keep)
        self.pixels = survivors(self.pixels)
        self.adam = self._adam()
        self.adam.state[self.pixels] = {k: v if k == "step" else survivors(v) for k, v in before.items()}

    def penalty(self) -> Tensor:
        """a_tv TV(x) + a_l2 |x|² (B,)."""
        value = torch.zeros(len(self.image), device=self.image.device)
        if self.settings.tv:
            value = value + self.settings.tv * total_variation(self.image.unflatten(1, self.grid.image))
        if self.settings.l2:
            value = value + self.settings.l2 * self.pixels.square().sum(dim=1)
        return value

    def step(self, of_image: Tensor, lr: float) -> None:
        """One step of Adam at this rate, given the gradient (B, ch·H·W) of the loss without its penalty."""
        gradient = of_image.gather(1, self.home)
        if self.settings.tv:
            around = self.image.gather(1, self.around.flatten(1)).view(self.around.shape)
            gradient.add_(total_variation_gradient(around), alpha=self.settings.tv)
        if self.settings.l2:
            gradient.add_(self.pixels, alpha=2 * self.settings.l2)
        self.pixels.grad = gradient
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.image.scatter_(1, self.home, self.pixels)


class _Best:
    """Each image's iterate of least loss since the last stop: a copy, not the live tensor."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.loss = torch.full((batch,), math.inf, device=device)
        self.cross_entropy = torch.full((batch,), math.inf, device=device)
        self.pixels: Tensor | None = None

    def update(self, loss: Tensor, cross_entropy: Tensor, pixels: Tensor) -> None:
        better = loss < self.loss
        if self.pixels is None:
            self.pixels = pixels.clone()
        torch.where(better[:, None], pixels, self.pixels, out=self.pixels)
        torch.where(better, cross_entropy, self.cross_entropy, out=self.cross_entropy)
        torch.where(better, loss, self.loss, out=self.loss)


def _mask(keep: Tensor, grid: PatchGrid, batch: int) -> Tensor:
    """Kept patches (B, M), or (1, M) for all, as a mask (B, N)."""
    empty = torch.zeros(batch, grid.patches, dtype=torch.bool, device=keep.device)
    return empty.scatter(1, keep.expand(batch, -1), True)


def _fill(
    image: Tensor, keep: Tensor, survivors: Tensor, grid: PatchGrid, background: str, rng: torch.Generator
) -> None:
    """Paint the patches that stop now as `background` says, in place; what stopped earlier stays as it is."""
    if background == "keep":
        return
    batch = len(image)
    stopped = _mask(keep, grid, batch) & ~_mask(survivors, grid, batch)
    count = int(stopped[0].sum())
    index = windows(stopped.int().topk(count, dim=1).indices, (0, 0), False, grid)[0]
    fill = {
        "zero": lambda: torch.zeros_like(image),
        "noise": lambda: torch.randn(image.shape, generator=rng).to(image.device),
        "mean": lambda: image.mean(dim=1, keepdim=True).expand_as(image),
    }[background]()
    image.scatter_(1, index, fill.gather(1, index))
