"""The gradient that inverts an image, patch by patch: how large it is, and how often its signs stay."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..server.iterate import LivePatches, Loss

GROUPS = ("will survive", "will stop")


class PatchGradients:
    """A record of the teacher's gradient at every live patch, for `watch` of `server.inversion.invert`.

    The regulariser's gradient is left out: it is the same for every teacher. norms and agreement hold a
    tensor (B, N) for each iteration, NaN where a patch has stopped: ‖g_i‖, and the share of the patch's
    pixels, in [0, 1], whose gradient has the sign of the iteration before. Independent signs agree in half
    of the pixels.
    """

    def __init__(self) -> None:
        self.norms: list[Tensor] = []
        self.agreement: list[Tensor] = []
        self._before: Tensor | None = None

    def __call__(self, live: LivePatches, loss: Loss) -> None:
        """Add one iteration."""
        teacher = loss.gradient - live.gradient(torch.zeros_like(live.image))  # without the regulariser
        gradient = on_grid(teacher.view(live.patches.shape), live.keep, live.grid.patches)  # (B, N, ch·p·p)
        before = torch.full_like(gradient, torch.nan) if self._before is None else self._before
        same = (gradient.sign() == before.sign()).float().mean(dim=2)
        unknown = (gradient + before).isnan().any(dim=2)
        self.norms.append(gradient.norm(dim=2))
        self.agreement.append(same.masked_fill(unknown, torch.nan))
        self._before = gradient

    def curves(self, mask: Tensor) -> list[dict[str, float | int | str]]:
        """Return a row for each iteration and group: means over its live patches, NaN where it has none.

        mask (B, N): the patches that survive in the end. Each row: iteration, patches (one of `GROUPS`),
        count (live patches), norm, agreement.
        """
        rows = []
        groups: Mapping[str, Tensor] = dict(zip(GROUPS, (mask, ~mask), strict=True))
        for iteration, (norm, same) in enumerate(zip(self.norms, self.agreement, strict=True)):
            for name, group in groups.items():
                row = {"iteration": iteration, "patches": name, "count": int((~norm[group].isnan()).sum())}
                rows.append(row | {"norm": _mean(norm[group]), "agreement": _mean(same[group])})
        return rows


def on_grid(values: Tensor, keep: Tensor, patches: int) -> Tensor:
    """Lay values (B, M, w) of patches keep (B, M) on a grid of so many patches: (B, patches, w), else NaN.

    keep is (1, M) where all images keep the same.
    """
    grid = torch.full((len(values), patches, values.shape[2]), torch.nan, device=values.device)
    index = keep.expand(len(values), -1)[:, :, None].expand_as(values)
    return grid.scatter(1, index, values)


def _mean(values: Tensor) -> float:
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else float("nan")
