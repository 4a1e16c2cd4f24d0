"""Local training: from a shard and the shared initial model to one `Upload` (method step 1)."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core.machine import autocast, device
from ..core.optimizers import make_optimizer, make_schedule
from ..core.rng import make_rng
from ..data.tasks import Split
from ..settings.schema import ClientSettings
from ..upload import ModelShape, Upload
from ..vision.augment import random_maps, warp
from ..vision.tokens import kept_patches, patch_features, read_by_head, token_logits
from .private import fit_private, training_noise

Progress = Callable[[int], object]


def train_client(
    initial: VisionTransformer,
    shard: Split,
    settings: ClientSettings,
    *,
    client: int,
    name: str = "vit_micro",
    seed: int = 0,
    progress: Progress | None = None,
    noise_seed: int | None = None,
) -> Upload:
    """Train a copy of the shared model on a shard, with `local_loss` and `fedprox`; return the upload.

    name: the shared model's, as `create_vit` takes it. progress is called with 1 after each step. The upload
    carries the class counts c_k; `Upload.without_counts` drops them. With `dp_epsilon` training is DP-SGD,
    and the upload has no class counts, which DP-SGD does not protect. noise_seed: of DP-SGD's draws, which a
    client must keep to itself; by default `seed`, so that a run can be repeated. Raises BadInput where
    training diverges.
    """
    vit = copy.deepcopy(initial).to(device()).train()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return local_loss(vit, images, labels, settings) + fedprox(vit, initial, settings)

    noise = training_noise(len(shard), local_steps(len(shard), settings), settings)
    if noise:
        rng = make_rng(seed if noise_seed is None else noise_seed, "client", client)
        decay = partial(fedprox, vit, initial, settings)
        fit_private(vit, partial(local_loss, settings=settings), decay, shard, settings, noise, rng, progress)
    else:
        fit([vit], loss, shard, settings, settings.epochs, make_rng(seed, "client", client), progress)
    counts = torch.bincount(shard.labels, minlength=vit.num_classes)
    return Upload(
        client=client,
        size=len(shard),
        shape=ModelShape.of(name, vit),
        weights={k: v.detach().cpu().contiguous() for k, v in vit.state_dict().items()},
        class_counts=None if noise else tuple(counts.tolist()),
        training=noise,
    ).checked()  # training that diverged must not reach the store or the server


def fit(
    models: Sequence[nn.Module],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    shard: Split,
    settings: ClientSettings,
    epochs: int,
    rng: torch.Generator,
    progress: Progress | None = None,
) -> None:
    """Train models together, in place, on random views of a shard: the loop of all local training.

    loss_of takes images (B, ch, H, W) and labels (B,) to the loss. rng fixes the order of the images, their
    views and dropout; progress is called with 1 after each step.
    """
    torch.manual_seed(torch.randint(2**31, (1,), generator=rng).item())  # dropout in models that have it
    at = device()
    images, labels = shard.images.to(at), shard.labels.to(at)
    optimizer = _one_optimizer(models, settings)
    schedule = make_schedule(optimizer, settings.schedule, steps_of(len(shard), epochs, settings))
    parameters = [p for model in models for p in model.parameters()]
    for _ in range(epochs):
        for pick in torch.randperm(len(shard), generator=rng).split(settings.batch_size):
            batch = images[pick.to(at)]  # (B, ch, H, W)
            if settings.augment:
                batch = warp(batch, random_maps(len(pick), settings.augment, rng))
            loss = loss_of(batch, labels[pick.to(at)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if progress:
                progress(1)


def _one_optimizer(models: Sequence[nn.Module], settings: ClientSettings) -> torch.optim.Optimizer:
    """Make one optimiser of several models; in each its own names decide which weights decay."""
    how = (settings.optimizer, settings.lr, settings.weight_decay)
    first, *others = (make_optimizer(model, *how) for model in models)
    for group in (group for other in others for group in other.param_groups):
        first.add_param_group(group)
    return first


def local_loss(vit: VisionTransformer, images: Tensor, labels: Tensor, settings: ClientSettings) -> Tensor:
    """Compute the local loss of images (B, ch, H, W) with labels (B,): `token_loss` of the model's tokens."""
    patches = kept_patches(vit, images)
    return token_loss(vit, lambda rows: patch_features(vit, *patches, rows), labels, settings)


def token_loss(
    vit: VisionTransformer,
    tokens: Callable[[int | None], Tensor],
    labels: Tensor,
    settings: ClientSettings,
) -> Tensor:
    """Compute CE(z^0, y) + token_weight · (1/N) Σ_i CE(z^i, y), mean over the batch, with label smoothing.

    tokens(rows) returns the normalised output tokens (B, P + N, d), or with `rows` the first so many of
    them, which are all that the loss reads without token labels. labels: (B,).
    """
    smooth, weight = settings.label_smoothing, settings.token_weight
    with autocast(settings.precision):
        features = tokens(None if weight else read_by_head(vit))
        cls_logits = vit.forward_head(features)  # (B, C)
        patch_logits = token_logits(vit, features) if weight else None  # (B, N, C)
    loss = F.cross_entropy(cls_logits.to(vit.pos_embed), labels, label_smoothing=smooth)
    if not weight:
        return loss
    patch_labels = labels[:, None].expand(-1, patch_logits.shape[1]).flatten()  # (B·N,)
    patch_logits = patch_logits.to(vit.pos_embed).flatten(0, 1)  # (B·N, C)
    return loss + weight * F.cross_entropy(patch_logits, patch_labels, label_smoothing=smooth)


def fedprox(vit: VisionTransformer, initial: VisionTransformer, settings: ClientSettings) -> Tensor | float:
    """Compute (μ/2)‖w − w_shared‖², which holds a client near the shared model (FedProx, Li et al. 2020)."""
    if not settings.fedprox:
        return 0.0
    pairs = zip(vit.parameters(), initial.parameters(), strict=True)
    return settings.fedprox / 2 * sum((w - shared.detach().to(w)).square().sum() for w, shared in pairs)


def steps_of(size: int, epochs: int, settings: ClientSettings) -> int:
    """Count the optimiser steps of `epochs` passes over a shard of `size` images."""
    return epochs * -(-size // settings.batch_size)


def local_steps(size: int, settings: ClientSettings) -> int:
    """Count the optimiser steps of one client with a shard of `size` images."""
    return steps_of(size, settings.epochs, settings)
