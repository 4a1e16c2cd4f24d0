"""What sparse inversion (step 3) holds from one iteration to the next: live patches, best iterate, record."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..settings.schema import InversionSettings
from ..vision.patches import PatchGrid, gather_tokens
from .views import halo, kept_mask, total_variation, total_variation_gradient, windows

FRAMES = 13  # pictures of a batch kept for plotting, from first noise to last iterate


class LivePatches:
    """A batch of images under optimisation: flat pixels, the patches that still change, and Adam on those.

    image (B, ch·H·W); keep holds the patches that survive, (1, N) while every image keeps all, then (B, M);
    pixels (B, M·ch·p·p) are theirs, in the order of keep, and `home` says where they stand in image.
    """

    def __init__(self, image: Tensor, grid: PatchGrid, settings: InversionSettings) -> None:
        self.image, self.grid, self.settings = image, grid, settings
        self._set_keep(torch.arange(grid.patches, device=image.device)[None])
        self.pixels = image.gather(1, self.home)
        self.adam = self._adam()

    @property
    def patches(self) -> Tensor:
        """The live pixels as patches (B, M, ch·p·p)."""
        return self.pixels.view(*self.around.shape[:2], -1)

    @property
    def mask(self) -> Tensor:
        """The surviving patches as a mask (B, N)."""
        return kept_mask(self.keep, self.grid, len(self.image))

    def retain(self, rows: Tensor) -> None:
        """Drop every live patch but these rows (B, M') of keep, and Adam's moments of the dropped."""
        moments, width = self.adam.state.pop(self.pixels, {}), self.patches.shape[1]

        def survivors(values: Tensor) -> Tensor:
            return gather_tokens(values.view(len(rows), width, -1), rows).flatten(1)

        self._set_keep(self.keep.expand(len(rows), -1).gather(1, rows))
        self.pixels = survivors(self.pixels)
        self.adam = self._adam()
        self.adam.state[self.pixels] = {k: v if k == "step" else survivors(v) for k, v in moments.items()}

    def regulariser(self) -> Tensor:
        """Return a_tv TV(x) + a_l2 |x_S|² (B,)."""
        value = torch.zeros(len(self.image), device=self.image.device)
        if self.settings.tv:
            value = value + self.settings.tv * total_variation(self.image.unflatten(1, self.grid.image))
        if self.settings.l2:
            value = value + self.settings.l2 * self.pixels.square().sum(dim=1)
        return value

    def gradient(self, grad_image: Tensor) -> Tensor:
        """Return the whole loss's gradient at the live pixels.

        grad_image (B, ch·H·W) is the gradient of all but the regulariser, which is added here.
        """
        gradient = grad_image.gather(1, self.home)
        if self.settings.tv:
            around = self.image.gather(1, self.around.flatten(1)).view(self.around.shape)
            gradient.add_(total_variation_gradient(around), alpha=self.settings.tv)
        if self.settings.l2:
            gradient.add_(self.pixels, alpha=2 * self.settings.l2)
        return gradient

    def step(self, gradient: Tensor, lr: float) -> None:
        """Take one step of Adam at this rate, given the gradient at the live pixels."""
        self.pixels.grad = gradient
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.image.scatter_(1, self.home, self.pixels)

    def restore(self, pixels: Tensor) -> None:
        """Write other values of the live pixels into the images."""
        self.image.scatter_(1, self.home, pixels)

    def _set_keep(self, keep: Tensor) -> None:
        """Set keep, and the flat pixels of these patches (home), and with those that touch them (around)."""
        batch = len(self.image)
        self.keep = keep
        self.home = windows(keep, (0, 0), False, self.grid)[0].expand(batch, -1)
        self.around = halo(keep, self.grid).expand(batch, -1, -1, -1, -1)

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam([self.pixels], self.settings.lr, self.settings.betas, fused=True)


@dataclass(frozen=True)
class Loss:
    """One evaluation of the loss: each image's value, cross-entropy and p(y), (B,).

    gradient (B, M·ch·p·p) is that of the value at the live pixels.
    """

    value: Tensor
    cross_entropy: Tensor
    confidence: Tensor
    gradient: Tensor


class BestIterate:
    """Each image's live pixels of least loss so far, copied, with their loss and cross-entropy (B,)."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.loss = torch.full((batch,), math.inf, device=device)
        self.cross_entropy = torch.full((batch,), math.inf, device=device)
        self.pixels: Tensor | None = None

    def update(self, loss: Loss, pixels: Tensor) -> None:
        """Take over the images whose loss is less than their best."""
        better = loss.value < self.loss
        if self.pixels is None:
            self.pixels = pixels.clone()
        torch.where(better[:, None], pixels, self.pixels, out=self.pixels)
        torch.where(better, loss.cross_entropy, self.cross_entropy, out=self.cross_entropy)
        torch.where(better, loss.value, self.loss, out=self.loss)


class Recorder:
    """The history of one batch: curves over iterations, and pictures of its first `recorded` images."""

    def __init__(self, settings: InversionSettings, recorded: int) -> None:
        spread = {round(i * settings.iterations / (FRAMES - 1)) for i in range(FRAMES)}
        self.wanted, self.recorded = spread | set(settings.stop_at), recorded
        self.curves: dict[str, list[Tensor]] = {"loss": [], "cross_entropy": [], "confidence": []}
        self.kept: list[float] = []
        self.frames: list[tuple[int, Tensor, Tensor]] = []

    def picture(self, step: int, live: LivePatches) -> None:
        """Keep images and masks before this step, if it is one of the `FRAMES` spread evenly or a stop."""
        if step in self.wanted:
            self.frames.append((step, live.image[: self.recorded].clone(), live.mask[: self.recorded]))

    def add(self, loss: Loss, live: LivePatches) -> None:
        """Add one iteration to the curves: means over the batch, and the share of patches kept."""
        self.curves["loss"].append(loss.value.mean())
        self.curves["cross_entropy"].append(loss.cross_entropy.mean())
        self.curves["confidence"].append(loss.confidence.mean())
        self.kept.append(live.keep.shape[1] / live.grid.patches)

    def history(self, grid: PatchGrid) -> dict[str, Tensor]:
        """Return curves (iterations,), and frames (F, recorded, ch, H, W), their masks and steps (F,)."""
        steps, pictures, masks = zip(*self.frames, strict=True)
        history = {name: torch.stack(values).cpu() for name, values in self.curves.items()}
        history |= {"kept": torch.tensor(self.kept), "frame_at": torch.tensor(steps)}
        history["frames"] = torch.stack(pictures).unflatten(2, grid.image).cpu()
        history["frame_masks"] = torch.stack(masks).cpu()
        return history
