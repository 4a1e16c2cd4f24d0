"""Synthetic images: what inversion (step 3) returns, the labels it is given, and the set on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..core.machine import device
from ..core.rng import make_rng
from ..core.store import read_tensors, write_tensors
from ..settings.schema import InversionSettings

COLUMNS = ("pixels", "labels", "mask", "loss")


@dataclass(frozen=True)
class SyntheticSet:
    """Images that inversion returns, their labels and their surviving patches.

    pixels (n, ch, H, W), normalised as models take them; labels (n,); mask (n, N), true where a patch
    survived every stop; loss (n,), cross-entropy of the returned pixels, never NaN. history holds curves
    over iterations and, under "frames", "frame_masks" and "frame_at", pictures on the way.
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
        """Join all parts in order; curves are averaged over the parts, frames are the first part's."""
        columns = {n: torch.cat([getattr(p, n) for p in parts]) for n in COLUMNS}
        history = {
            name: values
            if name.startswith("frame")
            else torch.stack([p.history[name] for p in parts]).mean(0)
            for name, values in parts[0].history.items()
        }
        return cls(**columns, history=history)


def balanced_labels(count: int, num_classes: int, rng: torch.Generator) -> Tensor:
    """Draw `count` labels in random order, every class as often as every other (to within one)."""
    order = torch.randperm(num_classes, generator=rng)
    labels = order[torch.arange(count) % num_classes]
    return labels[torch.randperm(count, generator=rng)]


def label_batches(settings: InversionSettings, classes: Tensor, seed: int) -> list[Tensor]:
    """Draw the target labels of every batch of a run, from these classes (C',)."""
    order = balanced_labels(settings.images, len(classes), make_rng(seed, "targets"))
    return list(classes[order].split(settings.batch_size))


def save_synthetic(synthetic: SyntheticSet, folder: Path) -> None:
    """Write a synthetic set to one safetensors file in the folder."""
    columns = {name: getattr(synthetic, name) for name in COLUMNS}
    write_tensors(
        columns | {f"history.{k}": v for k, v in synthetic.history.items()}, folder / "synthetic.safetensors"
    )


def load_synthetic(folder: Path) -> SyntheticSet:
    """Read what `save_synthetic` wrote, onto the device that computes."""
    tensors = read_tensors(folder / "synthetic.safetensors")
    history = {k.removeprefix("history."): v for k, v in tensors.items() if k.startswith("history.")}
    return SyntheticSet(*(tensors[name].to(device()) for name in COLUMNS), history=history)
