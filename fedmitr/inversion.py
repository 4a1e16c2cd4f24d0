"""Sparse model inversion: an ensemble and labels in, images and their surviving patches out.

Noise is optimised until the ensemble sees the wanted class in it. At each stop the patches that CLS
attends to least leave for good: from then on they get no forward, no gradient, no update
(method step 3; SMI, Hu et al. 2024). An empty schedule of stops is dense inversion.

Jitter and flip: a view is the image rolled by some pixels and perhaps mirrored, and the kept set
moves with it. Of the view only the patches at the moved places are embedded; `move` gives the places.
After a shift that is no multiple of the patch, the window at such a place also shows a few pixels of
its neighbours; where those have stopped, they are shown as they are and still get no update.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .ensemble import Ensemble
from .errors import BadInput
from .runtime import device, generator
from .settings import InversionSettings
from .store import read_tensors, write_tensors
from .vit import gather_tokens, grid_size, patch_features, patchify, unpatchify

COLUMNS = ("pixels", "labels", "mask", "loss")
FRAMES = 13  # pictures of a batch kept for plotting, from first noise to last iterate


@dataclass(frozen=True)
class SyntheticSet:
    """What inversion returns.

    pixels (n, ch, H, W) as the model sees them; labels (n,); mask (n, N) true where a patch survived
    every stop; loss (n,) cross-entropy of the returned iterate, NaN never. history holds curves over
    iterations and, under "frames", "frame_masks" and "frame_at", pictures on the way.
    """

    pixels: Tensor
    labels: Tensor
    mask: Tensor
    loss: Tensor
    history: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def concat(cls, parts: Sequence["SyntheticSet"]) -> "SyntheticSet":
        """All parts in order; curves are averaged over the parts, frames are the first part's."""
        columns = {n: torch.cat([getattr(p, n) for p in parts]) for n in COLUMNS}
        history = {
            name: values
            if name.startswith("frame")
            else torch.stack([p.history[name] for p in parts]).mean(0)
            for name, values in parts[0].history.items()
        }
        return cls(**columns, history=history)


def balanced_labels(count: int, num_classes: int, rng: torch.Generator) -> Tensor:
    """count labels in random order, every class as often as every other (to within one)."""
    order = torch.randperm(num_classes, generator=rng)
    labels = order[torch.arange(count) % num_classes]
    return labels[torch.randperm(count, generator=rng)]


def label_batches(settings: InversionSettings, num_classes: int, seed: int) -> list[Tensor]:
    """The target labels of every batch of a run."""
    labels = balanced_labels(settings.images, num_classes, generator(seed, "targets"))
    return list(labels.split(settings.batch_size))


def invert(
    ensemble: Ensemble,
    labels: Tensor,
    settings: InversionSettings,
    seed: int,
    *,
    rival: VisionTransformer | None = None,
    competition: float = 0.0,
    recorded: int = 20,
    progress: Callable[[int], object] | None = None,
) -> SyntheticSet:
    """Invert one batch of target labels (B,): min_x CE(A(x_S), y) + a_tv TV(x) + a_l2 |x|² over Adam.

    With a rival, a frozen student, `competition`·(1 − JS(ensemble, rival)) is added: images on which the
    two disagree (Adaptive DeepInversion, Yin et al. 2020). recorded: how many of the images are pictured
    on the way, in `history["frames"]`. progress is called with 1 after each iteration. The same arguments
    give the same images.
    """
    rng, at = generator(seed, "inversion"), labels.device
    member = ensemble.members[0]
    rows, columns = grid_size(member)
    patch, side = member.patch_embed.patch_size, member.patch_embed.img_size
    shape = (len(labels), member.patch_embed.proj.in_channels, *side)
    canvas = patchify(torch.randn(shape, generator=rng), patch).to(at)  # (B, N, ch·p·p)
    keep = torch.arange(rows * columns, device=at).expand(len(labels), -1)  # (B, M)
    live = _Live(canvas, settings)
    best = _Best(len(labels), at)
    stops = dict(zip(settings.stop_at, settings.stop_ratio, strict=True))
    log: dict[str, list[Tensor]] = {"loss": [], "cross_entropy": [], "confidence": [], "kept": []}
    frames: list[tuple[int, Tensor, Tensor]] = []
    wanted = {round(i * settings.iterations / (FRAMES - 1)) for i in range(FRAMES)} | set(settings.stop_at)

    for step in range(settings.iterations + 1):
        if step in wanted:
            laid = _scatter(canvas, keep, live.patches.detach())[:recorded]
            frames.append((step, laid, _mask(keep, rows * columns)[:recorded]))
        if step == settings.iterations:
            break
        if step in stops:
            survivors = _survivors(ensemble, live.patches.detach(), keep, stops[step])
            canvas = _freeze(canvas, keep, live.patches.detach(), survivors, settings.background, rng)
            keep = keep.gather(1, survivors)
            live.keep(survivors)
        image = unpatchify(_scatter(canvas, keep, live.patches), patch, side)
        seen = random_view(image, keep, patch, settings, rng)
        log_probs = ensemble.forward_patches(*seen)
        cross_entropy = F.nll_loss(log_probs, labels, reduction="none")
        loss = settings.ce * cross_entropy
        if settings.tv:
            loss = loss + settings.tv * total_variation(image)
        if settings.l2:
            loss = loss + settings.l2 * live.patches.square().sum(dim=(1, 2))
        if rival is not None and competition:
            of_rival = rival.forward_head(patch_features(rival, *seen))
            loss = loss + competition * (1 - jensen_shannon(log_probs, of_rival))
        if settings.keep_best and step >= max(settings.stop_at, default=0):
            best.update(loss.detach(), cross_entropy.detach(), live.patches.detach())
        live.step(loss.sum())
        log["loss"].append(loss.detach().mean())
        log["cross_entropy"].append(cross_entropy.detach().mean())
        log["confidence"].append(log_probs.detach().gather(1, labels[:, None]).exp().mean())
        log["kept"].append(torch.tensor(keep.shape[1] / (rows * columns), device=at))
        if progress:
            progress(1)

    if settings.keep_best:
        patches, final = best.patches, best.cross_entropy
    else:
        patches = live.patches.detach()
        with torch.no_grad():
            final = F.nll_loss(ensemble.forward_patches(patches, keep), labels, reduction="none")
    history = {name: torch.stack(values).cpu() for name, values in log.items()}
    history["frame_at"] = torch.tensor([f[0] for f in frames])
    history["frames"] = torch.stack([unpatchify(f[1], patch, side) for f in frames]).cpu()
    history["frame_masks"] = torch.stack([f[2] for f in frames]).cpu()
    pixels = unpatchify(_scatter(canvas, keep, patches), patch, side)
    if not pixels.isfinite().all():
        raise BadInput(
            f"inversion.lr={settings.lr}: the pixels diverged to NaN or Inf; allowed is a lower rate"
        )
    return SyntheticSet(pixels, labels, _mask(keep, rows * columns), final, history)


def random_view(
    image: Tensor, keep: Tensor, patch: tuple[int, int], settings: InversionSettings, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One random view of images (B, ch, H, W): the kept patches (B, M, ch·p·p) and their positions (B, M).

    The whole batch shares one shift of up to `jitter` of each side, in pixels, and one flip (as SMI).
    """
    sides = image.shape[-2:]
    limits = [round(settings.jitter * side) for side in sides]
    shift = tuple(int(torch.randint(-n, n + 1, (1,), generator=rng)) for n in limits)
    flip = settings.flip and bool(torch.rand(1, generator=rng) < 0.5)
    view = torch.roll(image, shift, dims=(-2, -1))
    view = view.flip(-1) if flip else view
    grid = (sides[0] // patch[0], sides[1] // patch[1])
    position = move(keep, shift, flip, grid, patch)
    return gather_tokens(patchify(view, patch), position), position


def move(
    index: Tensor, shift: tuple[int, int], flip: bool, grid: tuple[int, int], patch: tuple[int, int]
) -> Tensor:
    """Where patches (B, M) stand after rolling the image by shift pixels, then mirroring it.

    Rolling by whole patches moves each patch to exactly one place; a remainder of up to half a patch
    leaves it at the place that its centre lies in.
    """
    rows, columns = grid
    down, right = (math.floor(s / p + 0.5) for s, p in zip(shift, patch, strict=True))
    row = (index // columns + down) % rows
    column = (index % columns + right) % columns
    return row * columns + (columns - 1 - column if flip else column)


def total_variation(images: Tensor) -> Tensor:
    """L2 total variation (B,): sum of squared differences of neighbouring pixels."""
    down = (images[:, :, 1:] - images[:, :, :-1]).square().sum(dim=(1, 2, 3))
    right = (images[..., 1:] - images[..., :-1]).square().sum(dim=(1, 2, 3))
    return down + right


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


@torch.inference_mode()
def _survivors(ensemble: Ensemble, patches: Tensor, keep: Tensor, ratio: float) -> Tensor:
    """Rows (B, M') of the patches that CLS attends to most, in grid order."""
    importance = ensemble.importance(patches, keep)
    count = remaining(patches.shape[1], [ratio])
    return importance.topk(count, dim=1).indices.sort(dim=1).values.clone()


class _Live:
    """The surviving patches (B, M, ch·p·p) and Adam's moments for them alone."""

    def __init__(self, patches: Tensor, settings: InversionSettings) -> None:
        self.patches = patches.clone().requires_grad_(True)
        self.lr, self.betas, self.steps = settings.lr, settings.betas, 0
        self.mean, self.square = torch.zeros_like(patches), torch.zeros_like(patches)

    def keep(self, rows: Tensor) -> None:
        """Drop every patch but these rows (B, M'), with its moments."""
        self.mean, self.square = gather_tokens(self.mean, rows), gather_tokens(self.square, rows)
        self.patches = gather_tokens(self.patches.detach(), rows).requires_grad_(True)

    def step(self, loss: Tensor) -> None:
        """One step of Adam (Kingma & Ba 2015, Algorithm 1) on the pixels."""
        (gradient,) = torch.autograd.grad(loss, self.patches)
        self.steps += 1
        first, second = self.betas
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = self.lr / (1 - first**self.steps)
        denominator = (self.square / (1 - second**self.steps)).sqrt_().add_(1e-8)
        with torch.no_grad():
            self.patches.addcdiv_(self.mean, denominator, value=-scale)


class _Best:
    """Each image's iterate of least loss since the last stop: a copy, not the live tensor."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.loss = torch.full((batch,), math.inf, device=device)
        self.cross_entropy = torch.full((batch,), math.inf, device=device)
        self.patches: Tensor | None = None

    def update(self, loss: Tensor, cross_entropy: Tensor, patches: Tensor) -> None:
        better = loss < self.loss
        if self.patches is None:
            self.patches = patches.clone()
        self.patches = torch.where(better[:, None, None], patches, self.patches)
        self.loss = torch.where(better, loss, self.loss)
        self.cross_entropy = torch.where(better, cross_entropy, self.cross_entropy)


def _scatter(canvas: Tensor, keep: Tensor, patches: Tensor) -> Tensor:
    """The canvas (B, N, d) with live patches (B, M, d) laid at their places (B, M)."""
    return canvas.scatter(1, keep[:, :, None].expand_as(patches), patches)


def _mask(keep: Tensor, count: int) -> Tensor:
    return torch.zeros(len(keep), count, dtype=torch.bool, device=keep.device).scatter(1, keep, True)


def _freeze(
    canvas: Tensor, keep: Tensor, patches: Tensor, survivors: Tensor, background: str, rng: torch.Generator
) -> Tensor:
    """The canvas with the patches that stop now at their last pixels, or as `background` says."""
    canvas = _scatter(canvas, keep, patches)
    if background == "keep":
        return canvas
    count = canvas.shape[1]  # what stopped earlier stays as it is
    stopped = (_mask(keep, count) & ~_mask(keep.gather(1, survivors), count))[:, :, None]
    fill = {
        "zero": lambda: torch.zeros_like(canvas),
        "noise": lambda: torch.randn(canvas.shape, generator=rng).to(canvas.device),
        "mean": lambda: canvas.mean(dim=(1, 2), keepdim=True).expand_as(canvas),
    }[background]()
    return torch.where(stopped, fill, canvas)


def save_synthetic(synthetic: SyntheticSet, folder: Path) -> None:
    """Write a synthetic set as one safetensors file."""
    columns = {name: getattr(synthetic, name) for name in COLUMNS}
    write_tensors(
        columns | {f"history.{k}": v for k, v in synthetic.history.items()}, folder / "synthetic.safetensors"
    )


def load_synthetic(folder: Path) -> SyntheticSet:
    """Read what `save_synthetic` wrote, on the device that computes."""
    tensors = read_tensors(folder / "synthetic.safetensors")
    history = {k.removeprefix("history."): v for k, v in tensors.items() if k.startswith("history.")}
    return SyntheticSet(*(tensors[name].to(device()) for name in COLUMNS), history=history)
