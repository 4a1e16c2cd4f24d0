"""What sparse inversion (step 3) holds from one iteration to the next: live patches, best iterate, record."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..settings.schema import InversionSettings
from ..vision.patches import PatchGrid, gather_tokens
from .views import (
    batch_variation,
    batch_variation_gradient,
    halo,
    kept_mask,
    total_variation,
    total_variation_gradient,
    windows,
)

FRAMES = 13  # pictures of a batch kept for plotting, from first noise to finished images


class LivePatches:
    """A batch of images under optimisation: flat pixels, the patches that still change, and Adam on those.

    image (B, ch·H·W); keep holds the patches that survive, (1, N) while every image keeps all, then (B, M);
    pixels (B, M·ch·p·p) are theirs, in the order of keep, and `home` says where they stand in image.
    bounds: least and greatest value of each channel's pixels (ch, 1), to which every step clips live pixels.
    """

    def __init__(
        self,
        image: Tensor,
        grid: PatchGrid,
        settings: InversionSettings,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.image, self.grid, self.settings, self.bounds = image, grid, settings, bounds
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
        """Return a_tv TV(x) + a_l2 |x_S|² (B,).

        With tv_norm = "norms" TV is that of the whole batch, for every image.
        """
        value = torch.zeros(len(self.image), device=self.image.device)
        if self.settings.tv:
            variation = batch_variation if self.settings.tv_norm == "norms" else total_variation
            value = value + self.settings.tv * variation(self.image.unflatten(1, self.grid.image))
        if self.settings.l2:
            value = value + self.settings.l2 * self.pixels.square().sum(dim=1)
        return value

    def gradient(self, grad_image: Tensor) -> Tensor:
        """Return the gradient of the loss, summed over the batch, at the live pixels.

        grad_image (B, ch·H·W) is the gradient of all but the regulariser, which is added here.
        """
        gradient = grad_image.gather(1, self.home)
        if self.settings.tv:
            gradient.add_(self._variation_gradient(), alpha=self.settings.tv)
        if self.settings.l2:
            gradient.add_(self.pixels, alpha=2 * self.settings.l2)
        return gradient

    def step(self, gradient: Tensor, lr: float) -> None:
        """Take one step of Adam at this rate, given the gradient at the live pixels, and clip these."""
        self.pixels.grad = gradient
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        if self.bounds:
            self.patches.unflatten(2, (self.grid.channels, -1)).clamp_(*self.bounds)
        self.image.scatter_(1, self.home, self.pixels)

    def restore(self, pixels: Tensor) -> None:
        """Write other values of the live pixels into the images."""
        self.image.scatter_(1, self.home, pixels)

    def _variation_gradient(self) -> Tensor:
        """Return the gradient of the images' total variation, summed over the batch, at the live pixels."""
        if self.settings.tv_norm == "norms":
            gradient = batch_variation_gradient(self.image.unflatten(1, self.grid.image))
            return len(gradient) * gradient.flatten(1).gather(1, self.home)  # it is a term of every image
        around = self.image.gather(1, self.around.flatten(1)).view(self.around.shape)
        return total_variation_gradient(around)

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

    def picture(self, step: int, live: LivePatches, mask: Tensor | None = None) -> None:
        """Keep images and masks before this step, if it is one of the `FRAMES` spread evenly or a stop.

        mask (B, N): by default the live patches.
        """
        if step in self.wanted:
            mask = live.mask if mask is None else mask
            self.frames.append((step, live.image[: self.recorded].clone(), mask[: self.recorded]))

    def add(self, loss: Loss, live: LivePatches) -> None:
        """Add one iteration to the curves: means over the batch, and the share of patches kept."""
        self.curves["loss"].append(loss.value.mean())
        self.curves["cross_entropy"].append(loss.cross_entropy.mean())
        self.curves["confidence"].append(loss.confidence.mean())
        self.kept.append(live.keep.shape[1] / live.grid.patches)

    def history(self, grid: PatchGrid) -> dict[str, Tensor]:
        """Return curves (iterations,), and frames (F, recorded, ch, H, W), their masks and steps (F,).

        The last frame shows the images that inversion returns, with their mask.
        """
        steps, pictures, masks = zip(*self.frames, strict=True)
        history = {name: torch.stack(values).cpu() for name, values in self.curves.items()}
        history |= {"kept": torch.tensor(self.kept), "frame_at": torch.tensor(steps)}
        history["frames"] = torch.stack(pictures).unflatten(2, grid.image).cpu()
        history["frame_masks"] = torch.stack(masks).cpu()
        return history
