"""Many uploads seen as one teacher A(x) (method step 2)."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.errors import BadInput
from ..core.machine import autocast, compiled, uses_bf16
from ..core.rng import make_rng
from ..settings.schema import EnsembleSettings
from ..upload import Upload, check_same_images
from ..vision.patches import PatchGrid, Seen, cut_patches, regrid, regrid_importance, regrid_tokens
from ..vision.tokens import MODELS_AT_ONCE, class_logits, forward_tokens, images_at_once, patch_importance
from ..vision.vit import normalisation

ON_LOGITS = ("mean_logits", "class")  # the other modes combine probabilities


class Ensemble(nn.Module):
    """K frozen uploaded models and the weights that combine them.

    weights is (K, 1), or (K, C) when each class has its own; columns sum to one. shares (K, C) is each
    client's share of every class, None where an upload does not say. The modes are
    `mean_probs` and `mean_logits` (1/K each), `size` (n_k / n, on probabilities) and `class`
    (c_k[y] / Σ_j c_j[y], on logits: who has seen a class decides on it; FedFTG, Zhang et al. 2022).
    offset (C,) is added to the log-probabilities of all; zero unless the ensemble is calibrated.

    Members may be any ViTs that see images of one size. Patches, positions and masks are those of one grid,
    `grid`: of the model `like`, by default the first member; a member with other patches cuts its own.
    """

    def __init__(
        self,
        uploads: Sequence[Upload],
        settings: EnsembleSettings | None = None,
        like: VisionTransformer | None = None,
    ) -> None:
        super().__init__()
        check_same_images(uploads)
        settings = settings or EnsembleSettings()
        self.mode, self.precision = settings.mode, settings.precision
        self.class_logits = compiled(class_logits) if settings.compile else class_logits
        self.members = nn.ModuleList(u.vit(share=True) for u in uploads)
        self.grids = [PatchGrid.of(m) for m in self.members]
        self.grid = PatchGrid.of(like) if like else self.grids[0]
        self.stats = normalisation(like or self.members[0])  # of the pixels that are shown to it
        if uses_bf16(self.precision):  # once, instead of at every product: autocast keeps no frozen weights
            for layer in filter(lambda m: isinstance(m, nn.Linear), self.members.modules()):
                layer.to(torch.bfloat16)
        self.register_buffer("weights", client_weights(uploads, self.mode))
        known = all(u.class_counts is not None for u in uploads)
        self.register_buffer("shares", class_weights(uploads) if known else None)
        self.register_buffer("offset", torch.zeros(uploads[0].shape.num_classes))
        self.num_classes = uploads[0].shape.num_classes

    def forward(self, images: Tensor, keep: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Log-probabilities (B, C) of images (B, ch, H, W), seen on the kept patches (B, M) alone."""
        return self.combine(self.logits(images, keep), temperature)

    def logits(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Every client's class logits (K, B, C), not yet combined."""
        few = len(images) if images.requires_grad else self._at_once(len(images))
        starts = range(0, max(1, len(images)), few)
        parts = [
            self._logits(*self.cut(images[i : i + few], None if keep is None else keep[i : i + few]))
            for i in starts
        ]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _at_once(self, count: int) -> int:
        """Of `count` images how many to show to all members together: of many members few."""
        return count if len(self.members) <= MODELS_AT_ONCE else min(count, images_at_once(self))

    def cut(self, images: Tensor, keep: Tensor | None = None) -> Seen:
        """The kept patches of images, as `vit.kept_patches` has them, on the ensemble's grid."""
        return cut_patches(images, self.grid.patch, keep)

    def forward_patches(self, patches: Tensor, position: Tensor) -> Tensor:
        """Log-probabilities (B, C) of patches (B, M, ch·p·p) at grid positions (B, M), or (1, M) for all."""
        return self.combine(self._logits(patches, position))

    def opponent_logits(self, model: VisionTransformer, patches: Tensor, position: Tensor) -> Tensor:
        """Class logits (B, C) of a model on the ensemble's grid that is no member, at its precision."""
        with autocast(self.precision):
            return self.class_logits(model, patches, position).to(patches)

    def _logits(self, patches: Tensor, position: Tensor) -> Tensor:
        with autocast(self.precision):
            each = self.each(self.logits_of, patches, position)
        return torch.stack([logits.to(patches) for logits in each])

    def each(self, look: Callable[..., Tensor], patches: Tensor, position: Tensor) -> list[Tensor]:
        """look(k, patches, position) of every member k.

        Of many members a backward pass holds the activations of one, computed again when its turn comes.
        """
        if len(self.members) <= MODELS_AT_ONCE or not patches.requires_grad:
            return [look(k, patches, position) for k in range(len(self.members))]
        again = partial(checkpoint, look, use_reentrant=False, preserve_rng_state=False)
        return [again(k, patches, position) for k in range(len(self.members))]

    def seen_by(self, k: int, patches: Tensor, position: Tensor) -> Seen:
        """Patches and positions as member k cuts them."""
        other = self.grids[k]
        return (patches, position) if other == self.grid else regrid(patches, position, self.grid, other)

    def logits_of(self, k: int, patches: Tensor, position: Tensor) -> Tensor:
        """Class logits (B, C) of member k."""
        return self.class_logits(self.members[k], *self.seen_by(k, patches, position))

    def importance_of(self, k: int, patches: Tensor, position: Tensor) -> Tensor:
        """CLS attention (B, M) of member k to the patches."""
        own_patches, seen = self.seen_by(k, patches, position)
        attention = patch_importance(self.members[k], own_patches, seen)
        if self.grids[k] == self.grid:
            return attention
        return regrid_importance(attention, seen, self.grids[k], position, self.grid)

    def tokens_of(self, k: int, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, C) of member k, and its token logits (B, N, C) on the ensemble's grid."""
        of_cls, of_tokens = forward_tokens(self.members[k], images)
        if self.grids[k] == self.grid:
            return of_cls, of_tokens
        return of_cls, regrid_tokens(of_tokens, self.grids[k], self.grid)

    def forward_tokens(self, images: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities of CLS (B, C) and of every patch token (B, N, C): A^0 and A^i.

        Of many members fewer images at a time, so that their token logits (K, B, N, C) take no more room.
        """
        parts = [self._tokens(batch, temperature) for batch in images.split(self._at_once(len(images)))]
        of_cls, of_tokens = map(torch.cat, zip(*parts, strict=True))
        return of_cls, of_tokens

    def _tokens(self, images: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        with autocast(self.precision):
            each = zip(*(self.tokens_of(k, images) for k in range(len(self.members))), strict=True)
        of_cls, of_tokens = (torch.stack(logits).to(images) for logits in each)
        return self.combine(of_cls, temperature), self.combine(of_tokens, temperature)

    def importance(self, patches: Tensor, position: Tensor) -> Tensor:
        """CLS attention (B, M) to the patches, averaged over clients with the ensemble's weights."""
        with autocast(self.precision):
            attention = torch.stack(self.each(self.importance_of, patches, position))
        return torch.einsum("kbm,k->bm", attention.to(patches), self.weights.mean(dim=1))

    def combine(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Clients' logits (K, ..., C) to the ensemble's log-probabilities (..., C)."""
        together = combine(logits, self.weights, self.mode, temperature)
        return (together + self.offset / temperature).log_softmax(dim=-1)

    def calibrated(self, offset: Tensor) -> "Ensemble":
        """The same members with another offset (C,)."""
        other = copy.copy(self)
        other._buffers = self._buffers | {"offset": offset.to(self.offset)}
        return other

    def drawn(self, per_class: int | None, rng: torch.Generator) -> "Ensemble":
        """For each class so many of the members, drawn by their shares of it; itself where per_class is None.

        Of class y the logits of those drawn are averaged: in expectation those of mode `class`, at a cost
        that does not grow with the number of clients. Raises BadInput where an upload has no class histogram,
        and with another mode.
        """
        if per_class is None:
            return self
        if self.shares is None or self.mode != "class":
            raise BadInput(
                f"distill.per_class={per_class} needs every upload's class_counts and ensemble.mode='class': "
                "allowed otherwise is none"
            )
        picks = torch.multinomial(self.shares.T.cpu(), per_class, replacement=True, generator=rng)  # (C, m)
        weights = torch.zeros(self.shares.T.shape)
        weights.scatter_add_(1, picks, torch.full(picks.shape, 1 / per_class))
        some = weights.any(dim=0).nonzero()[:, 0].tolist()
        other = copy.copy(self)
        other._modules = self._modules | {"members": nn.ModuleList(self.members[k] for k in some)}
        buffers = {"weights": weights.T[some].to(self.weights), "shares": self.shares[some]}
        other._buffers = self._buffers | buffers
        other.grids = [self.grids[k] for k in some]
        return other


class Owners:
    """A batch of images, each seen by one client alone: `owner` (B,), the one that answers for its label.

    Seen from inversion it is a teacher like `Ensemble`, for one forward of one client an image.
    """

    def __init__(self, ensemble: Ensemble, owner: Tensor) -> None:
        self.ensemble, self.owner = ensemble, owner
        self.rows = [(owner == k).nonzero()[:, 0] for k in range(len(ensemble.members))]
        self.back = torch.cat(self.rows).argsort()  # from client after client to the order of the batch

    @classmethod
    def draw(cls, ensemble: Ensemble, labels: Tensor, seed: int) -> "Owners":
        """An owner for each label (B,), drawn by the clients' shares of that class.

        Raises BadInput where an upload has no class histogram.
        """
        if ensemble.shares is None:
            raise BadInput(
                "inversion.teacher='owners' needs every upload's class_counts: "
                "allowed without them is 'ensemble'"
            )
        shares = ensemble.shares.T.cpu()[labels.cpu()]
        drawn = torch.multinomial(shares, 1, generator=make_rng(seed, "owners"))[:, 0]
        return cls(ensemble, drawn.to(labels.device))

    def forward_patches(self, patches: Tensor, position: Tensor) -> Tensor:
        """The owners' log-probabilities (B, C) of patches (B, M, ch·p·p) at positions (B, M) or (1, M)."""
        with autocast(self.ensemble.precision):
            logits = self._each(self.ensemble.logits_of, patches, position)
        return logits.to(patches).log_softmax(dim=-1)

    def importance(self, patches: Tensor, position: Tensor) -> Tensor:
        """The owners' CLS attention (B, M) to the patches."""
        with autocast(self.ensemble.precision):
            return self._each(self.ensemble.importance_of, patches, position).to(patches)

    def opponent_logits(self, model: VisionTransformer, patches: Tensor, position: Tensor) -> Tensor:
        return self.ensemble.opponent_logits(model, patches, position)

    def _each(self, look: Callable[..., Tensor], patches: Tensor, position: Tensor) -> Tensor:
        """What every member that owns some of the images makes of them, (B, ...) in their order."""
        seen = [
            look(k, patches[rows], position[rows] if len(position) > 1 else position)
            for k, rows in enumerate(self.rows)
            if len(rows)
        ]
        return torch.cat(seen)[self.back]


def combine(logits: Tensor, weights: Tensor, mode: str, temperature: float = 1.0) -> Tensor:
    """Clients' logits (K, ..., C) with weights (K, 1) or (K, C) to log-probabilities (..., C)."""
    weights = weights.view(len(logits), *[1] * (logits.ndim - 2), -1)
    if mode in ON_LOGITS:
        return F.log_softmax((weights * logits).sum(dim=0) / temperature, dim=-1)
    return torch.logsumexp(F.log_softmax(logits / temperature, dim=-1) + weights.log(), dim=0)


def held_classes(uploads: Sequence[Upload]) -> Tensor:
    """The classes that some client holds (C',), all where an upload does not say; nobody can show another."""
    if any(u.class_counts is None for u in uploads):
        return torch.arange(uploads[0].shape.num_classes)
    return histograms(uploads).sum(dim=0).nonzero()[:, 0]


def client_weights(uploads: Sequence[Upload], mode: str) -> Tensor:
    """The weights (K, 1) or (K, C) of an ensemble mode; columns sum to one."""
    if mode in ("mean_probs", "mean_logits"):
        return torch.full((len(uploads), 1), 1 / len(uploads))
    if mode == "size":
        sizes = torch.tensor([float(u.size) for u in uploads])
        return (sizes / sizes.sum())[:, None]
    return class_weights(uploads)


def class_weights(uploads: Sequence[Upload]) -> Tensor:
    """Each client's share of every class, c_k[y] / Σ_j c_j[y]: (K, C) (FedFTG)."""
    counts = histograms(uploads)
    # a class that nobody holds falls back to equal weights
    counts = torch.where(counts.sum(dim=0) > 0, counts, torch.ones_like(counts))
    return counts / counts.sum(dim=0)


def histograms(uploads: Sequence[Upload]) -> Tensor:
    """The uploads' class histograms c_k: (K, C). Raises BadInput for an upload without one."""
    without = [u.client for u in uploads if u.class_counts is None]
    if without:
        raise BadInput(
            f"class_counts are needed (ensemble.mode='class', fedftg): upload of client {without[0]} has none"
        )
    return torch.tensor([u.class_counts for u in uploads], dtype=torch.float32)
