"""Local training: a shard and the shared initial model in, one Upload out (method step 1)."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from .augment import random_maps, warp
from .optim import make_optimizer, make_schedule
from .runtime import device, generator
from .settings import ClientSettings
from .tasks import Split
from .upload import ModelShape, Upload
from .vit import forward_tokens


def train_client(
    initial: VisionTransformer,
    shard: Split,
    settings: ClientSettings,
    *,
    client: int,
    name: str = "vit_micro",
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Upload:
    """Minimise cross-entropy on the shard from the shared model; the initial model is left as it is.

    name is the shared model's name as `create_vit` takes it. progress is called with 1 after each
    step. The upload carries the class histogram; `Upload.without_counts` drops it.
    """
    at, rng = device(), generator(seed, "client", client)
    torch.manual_seed(torch.randint(2**31, (1,), generator=rng).item())  # dropout in models that have it
    vit = copy.deepcopy(initial).to(at).train()
    images, labels = shard.images.to(at), shard.labels.to(at)
    optimizer = make_optimizer(vit, settings.optimizer, settings.lr, settings.weight_decay, settings.momentum)
    schedule = make_schedule(optimizer, settings.schedule, local_steps(len(shard), settings))
    for _ in range(settings.epochs):
        for pick in torch.randperm(len(shard), generator=rng).split(settings.batch_size):
            batch = images[pick.to(at)]
            if settings.augment:
                batch = warp(batch, random_maps(len(pick), settings.augment, rng))
            loss = local_loss(vit, batch, labels[pick.to(at)], settings)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress:
                progress(1)
    counts = torch.bincount(shard.labels, minlength=vit.num_classes)
    return Upload(
        client=client,
        size=len(shard),
        shape=ModelShape.of(name, vit),
        weights={k: v.detach().cpu().contiguous() for k, v in vit.state_dict().items()},
        class_counts=tuple(counts.tolist()),
    ).checked()  # training that diverged must not reach the store or the server


def local_loss(vit: VisionTransformer, images, labels, settings: ClientSettings):
    """CE(z^0, y) + token_weight · (1/N) Σ_i CE(z^i, y), with label smoothing."""
    smooth = settings.label_smoothing
    if not settings.token_weight:
        return F.cross_entropy(vit(images), labels, label_smoothing=smooth)
    of_cls, of_tokens = forward_tokens(vit, images)
    each = labels[:, None].expand(-1, of_tokens.shape[1])
    tokens = F.cross_entropy(of_tokens.flatten(0, 1), each.flatten(), label_smoothing=smooth)
    return F.cross_entropy(of_cls, labels, label_smoothing=smooth) + settings.token_weight * tokens


def local_steps(size: int, settings: ClientSettings) -> int:
    """Optimiser steps of one client with a shard of `size` images."""
    return settings.epochs * -(-size // settings.batch_size)
