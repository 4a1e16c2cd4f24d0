"""The uploads as one teacher A(x), or one client for each image of a batch (method step 2)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import BadInput
from ..core.machine import autocast, uses_bf16
from ..core.rng import make_rng
from ..settings.schema import EnsembleSettings
from ..upload import Upload, check_same_images
from ..vision.patches import PatchGrid, cut_patches, regrid, regrid_importance, regrid_tokens
from ..vision.tokens import MODELS_AT_ONCE, class_logits, forward_tokens, images_at_once, patch_importance
from ..vision.vit import normalisation

ON_LOGITS = ("mean_logits", "class")  # the other modes combine probabilities


class CombinedModels(nn.Module):
    """K frozen models and the weights that combine them into one teacher A(x).

    weights is (K, 1), or (K, C) when each class has its own; columns sum to one. shares (K, C) is each
    client's share of every class, None where an upload does not say. offset (C,) is added to the
    log-probabilities of CLS, to which it was fitted. stats are the mean and standard deviation of the pixels
    that the models are given.

    Members may be any ViTs for images of one size. Patches, their positions and masks are those of one
    grid, `grid`; a member with other patches cuts its own (`grids`). The models are shared, never copied.
    """

    def __init__(
        self,
        members: Iterable[VisionTransformer],
        weights: Tensor,
        shares: Tensor | None,
        offset: Tensor,
        *,
        mode: str,
        precision: str,
        grid: PatchGrid,
        stats: tuple[Tensor, Tensor],
    ) -> None:
        """Take mode and precision as in `EnsembleSettings`."""
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("weights", weights)
        self.register_buffer("shares", shares)
        self.register_buffer("offset", offset)
        self.mode, self.precision = mode, precision
        self.grid, self.stats, self.num_classes = grid, stats, len(offset)
        self.grids = [PatchGrid.of(member) for member in self.members]

    def forward(self, images: Tensor, keep: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Return log-probabilities (B, C) of images (B, ch, H, W), from the kept patches (B, M) alone."""
        return self.combine(self.logits(images, keep), temperature)

    def logits(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return every member's class logits (K, B, C), not yet combined."""
        few = len(images) if images.requires_grad else self._batch_size(len(images))
        starts = range(0, max(1, len(images)), few)
        parts = [
            self._patch_logits(*self.cut(images[i : i + few], None if keep is None else keep[i : i + few]))
            for i in starts
        ]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def forward_patches(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return log-probabilities (B, C) of patches (B, M, ch·p·p) at positions (B, M) or (1, M)."""
        return self.combine(self._patch_logits(patches, positions))

    def forward_tokens(self, images: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of CLS, A^0 (B, C), and of every patch token, A^i (B, N, C).

        With many members fewer images are forwarded at a time, to bound the token logits (K, B, N, C).
        """
        parts = [self._forward_tokens(b, temperature) for b in images.split(self._batch_size(len(images)))]
        cls_log_probs, token_log_probs = map(torch.cat, zip(*parts, strict=True))
        return cls_log_probs, token_log_probs

    def importance(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return CLS attention (B, M) to the patches, averaged over members with their mean weights."""
        with autocast(self.precision):
            attention = torch.stack(self.map_members(self.member_importance, patches, positions))  # (K, B, M)
        return torch.einsum("kbm,k->bm", attention.to(patches), self.weights.mean(dim=1))

    def combine(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Combine members' logits (K, ..., C) into log-probabilities (..., C), offset included."""
        log_probs = combine(logits, self.weights, self.mode, temperature)
        return (log_probs + self.offset / temperature).log_softmax(dim=-1)

    def cut(self, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cut images into patches (B, M, ch·p·p) of the ensemble's grid; return them and their positions.

        Positions are `keep` (B, M), or (1, N) for all images where every patch is kept.
        """
        return cut_patches(images, self.grid.patch, keep)

    def opponent_logits(self, model: VisionTransformer, patches: Tensor, positions: Tensor) -> Tensor:
        """Return class logits (B, C) of a model that is no member, on the ensemble's grid and precision."""
        with autocast(self.precision):
            return class_logits(model, patches, positions).to(patches)

    # One member, on its own patches.

    def map_members(self, forward: Callable[..., Tensor], patches: Tensor, positions: Tensor) -> list[Tensor]:
        """Return forward(k, patches, positions) of every member k.

        With many members a backward pass holds one member's activations and computes them again for each.
        """
        if len(self.members) > MODELS_AT_ONCE and patches.requires_grad:
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        return [forward(k, patches, positions) for k in range(len(self.members))]

    def patches_for(self, k: int, patches: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return patches and positions as member k cuts them, on its own grid."""
        own = self.grids[k]
        return (patches, positions) if own == self.grid else regrid(patches, positions, self.grid, own)

    def member_logits(self, k: int, patches: Tensor, positions: Tensor) -> Tensor:
        """Return class logits (B, C) of member k."""
        return class_logits(self.members[k], *self.patches_for(k, patches, positions))

    def member_importance(self, k: int, patches: Tensor, positions: Tensor) -> Tensor:
        """Return CLS attention (B, M) of member k to patches of the ensemble's grid."""
        own_patches, own_positions = self.patches_for(k, patches, positions)
        attention = patch_importance(self.members[k], own_patches, own_positions)  # (B, M'), on its own grid
        if self.grids[k] == self.grid:
            return attention
        return regrid_importance(attention, own_positions, self.grids[k], positions, self.grid)

    def member_tokens(self, k: int, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits (B, C) of member k, and its token logits (B, N, C) on the ensemble's grid."""
        cls_logits, token_logits = forward_tokens(self.members[k], images)
        if self.grids[k] != self.grid:
            token_logits = regrid_tokens(token_logits, self.grids[k], self.grid)
        return cls_logits, token_logits

    def _batch_size(self, count: int) -> int:
        """Return how many of `count` images all members forward together; with many members, few."""
        return count if len(self.members) <= MODELS_AT_ONCE else min(count, images_at_once(self))

    def _patch_logits(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return every member's class logits (K, B, C)."""
        with autocast(self.precision):
            logits = self.map_members(self.member_logits, patches, positions)
        return torch.stack([member.to(patches) for member in logits])

    def _forward_tokens(self, images: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        with autocast(self.precision):
            logits = zip(*(self.member_tokens(k, images) for k in range(len(self.members))), strict=True)
        cls_logits, token_logits = (torch.stack(z).to(images) for z in logits)  # (K, B, C), (K, B, N, C)
        token_log_probs = combine(token_logits, self.weights, self.mode, temperature)  # without the offset
        return self.combine(cls_logits, temperature), token_log_probs

    # The same models with other weights.

    def calibrated(self, offset: Tensor) -> "CombinedModels":
        """Return the same members with another offset (C,)."""
        return self._combined(self.members, self.weights, self.shares, offset.to(self.offset))

    def drawn(self, per_class: int | None, rng: torch.Generator) -> "CombinedModels":
        """Draw `per_class` members for each class, by their shares of it; return itself where that is None.

        Class y gets the mean logit of the members drawn for it: in expectation that of mode `class`, at a
        cost that does not grow with the number of clients. Raises BadInput where an upload has no class
        histogram, and with another mode.
        """
        if per_class is None:
            return self
        if self.shares is None or self.mode != "class":
            raise BadInput(
                f"distill.per_class={per_class} needs every upload's class_counts and ensemble.mode='class': "
                "allowed otherwise is none"
            )
        picks = torch.multinomial(self.shares.T.cpu(), per_class, replacement=True, generator=rng)  # (C, m)
        weights = torch.zeros(self.shares.T.shape)  # (C, K)
        weights.scatter_add_(1, picks, torch.full(picks.shape, 1 / per_class))
        some = weights.any(dim=0).nonzero()[:, 0].tolist()
        members = [self.members[k] for k in some]
        return self._combined(members, weights.T[some].to(self.weights), self.shares[some], self.offset)

    def _combined(
        self, members: Iterable[VisionTransformer], weights: Tensor, shares: Tensor | None, offset: Tensor
    ) -> "CombinedModels":
        return CombinedModels(
            members,
            weights,
            shares,
            offset,
            mode=self.mode,
            precision=self.precision,
            grid=self.grid,
            stats=self.stats,
        )


class Ensemble(CombinedModels):
    """The uploaded models, weighted by n_k or c_k as `settings.mode` sets.

    The modes are `mean_probs` and `mean_logits` (1/K each), `size` (n_k / n, on probabilities) and `class`
    (c_k[y] / Σ_j c_j[y], on logits: a client counts for a class as much as it holds of it; FedFTG, Zhang et
    al. 2022). The grid is that of the model `like`, by default the first member's. The offset is zero until
    the ensemble is `calibrated`.
    """

    def __init__(
        self,
        uploads: Sequence[Upload],
        settings: EnsembleSettings | None = None,
        like: VisionTransformer | None = None,
    ) -> None:
        """Build the models on the uploads' tensors, without a copy. Raises BadInput where they do not fit."""
        check_same_images(uploads)
        settings = settings or EnsembleSettings()
        members = [u.vit(share=True) for u in uploads]
        if uses_bf16(settings.precision):  # once, not at every product: autocast keeps no frozen weights
            for layer in (m for member in members for m in member.modules() if isinstance(m, nn.Linear)):
                layer.to(torch.bfloat16)
        counted = all(u.class_counts is not None for u in uploads)
        super().__init__(
            members,
            client_weights(uploads, settings.mode),
            class_weights(uploads) if counted else None,
            torch.zeros(uploads[0].shape.num_classes),
            mode=settings.mode,
            precision=settings.precision,
            grid=PatchGrid.of(like or members[0]),
            stats=normalisation(like or members[0]),
        )


class Owners:
    """A teacher of one batch that forwards each image through one client's model, its owner's.

    owner (B,) holds each image's client. It has the methods of `Ensemble` that inversion needs, and costs
    one model an image instead of K.
    """

    def __init__(self, ensemble: Ensemble, owner: Tensor) -> None:
        self.ensemble, self.owner = ensemble, owner
        # rows[k]: indices in the batch of client k's images; back: the inverse permutation (B,)
        self.rows = [(owner == k).nonzero()[:, 0] for k in range(len(ensemble.members))]
        self.back = torch.cat(self.rows).argsort()

    @classmethod
    def draw(cls, ensemble: Ensemble, labels: Tensor, seed: int) -> "Owners":
        """Draw an owner for each label (B,), by the clients' shares of that class.

        Raises BadInput where an upload has no class histogram.
        """
        if ensemble.shares is None:
            raise BadInput(
                "inversion.teacher='owners' needs every upload's class_counts: "
                "allowed without them is 'ensemble'"
            )
        shares = ensemble.shares.T.cpu()[labels.cpu()]  # (B, K)
        drawn = torch.multinomial(shares, 1, generator=make_rng(seed, "owners"))[:, 0]
        return cls(ensemble, drawn.to(labels.device))

    def forward_patches(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return the owners' log-probabilities (B, C) of patches at positions (B, M), or (1, M) for all."""
        with autocast(self.ensemble.precision):
            logits = self._map_owners(self.ensemble.member_logits, patches, positions)
        return logits.to(patches).log_softmax(dim=-1)

    def importance(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return the owners' CLS attention (B, M) to the patches."""
        with autocast(self.ensemble.precision):
            return self._map_owners(self.ensemble.member_importance, patches, positions).to(patches)

    def opponent_logits(self, model: VisionTransformer, patches: Tensor, positions: Tensor) -> Tensor:
        """Return `CombinedModels.opponent_logits` (B, C): the opponent is one model for all images."""
        return self.ensemble.opponent_logits(model, patches, positions)

    def _map_owners(self, forward: Callable[..., Tensor], patches: Tensor, positions: Tensor) -> Tensor:
        """Return forward(k, patches, positions) of every image's owner k, (B, ...) in the batch's order."""
        parts = [
            forward(k, patches[rows], positions[rows] if len(positions) > 1 else positions)
            for k, rows in enumerate(self.rows)
            if len(rows)
        ]
        return torch.cat(parts)[self.back]


def combine(logits: Tensor, weights: Tensor, mode: str, temperature: float = 1.0) -> Tensor:
    """Combine logits (K, ..., C) with weights (K, 1) or (K, C) into log-probabilities (..., C).

    log softmax(Σ_k w_k ⊙ z_k / T) in the modes `ON_LOGITS`, else log Σ_k w_k ⊙ softmax(z_k / T).
    """
    weights = weights.view(len(logits), *[1] * (logits.ndim - 2), -1)  # (K, 1, ..., 1 or C)
    if mode in ON_LOGITS:
        return F.log_softmax((weights * logits).sum(dim=0) / temperature, dim=-1)
    return torch.logsumexp(F.log_softmax(logits / temperature, dim=-1) + weights.log(), dim=0)


def client_weights(uploads: Sequence[Upload], mode: str) -> Tensor:
    """Return the weights (K, 1) or (K, C) of an ensemble mode; columns sum to one."""
    if mode in ("mean_probs", "mean_logits"):
        return torch.full((len(uploads), 1), 1 / len(uploads))
    if mode == "size":
        sizes = torch.tensor([float(u.size) for u in uploads])
        return (sizes / sizes.sum())[:, None]
    return class_weights(uploads)


def class_weights(uploads: Sequence[Upload]) -> Tensor:
    """Return each client's share of every class, c_k[y] / Σ_j c_j[y]: (K, C) (FedFTG)."""
    counts = histograms(uploads)
    # a class that nobody holds falls back to equal weights
    counts = torch.where(counts.sum(dim=0) > 0, counts, torch.ones_like(counts))
    return counts / counts.sum(dim=0)


def histograms(uploads: Sequence[Upload]) -> Tensor:
    """Return the uploads' class histograms c_k: (K, C). Raises BadInput for an upload without one."""
    without = [u.client for u in uploads if u.class_counts is None]
    if without:
        raise BadInput(
            f"upload of client {without[0]} has no class_counts: ensemble.mode='class' or the method needs it"
        )
    return torch.tensor([u.class_counts for u in uploads], dtype=torch.float32)


def held_classes(uploads: Sequence[Upload]) -> Tensor:
    """Return the classes (C',) that some client holds; all C where an upload has no histogram."""
    if any(u.class_counts is None for u in uploads):
        return torch.arange(uploads[0].shape.num_classes)
    return histograms(uploads).sum(dim=0).nonzero()[:, 0]
