"""DP-SGD: local training whose weights are differentially private (Abadi et al., CCS 2016).

In every step each image enters with probability q, independently (Poisson sampling). Its gradient g_i is
scaled down to norm C where it is longer, and the step's gradient is

    ( Σ_i g_i · min(1, C / |g_i|) + N(0, (σ C)² I) ) / (q n).

Gradients of single images are those of `core.gradients`, since hooks on layers, as Opacus' modules set them,
miss a ViT's class token and position embedding. σ is Opacus' (`upload.privacy.noise_multiplier`).
"""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.gradients import sample_gradients, trained
from ..core.machine import device
from ..core.optimizers import make_optimizer, make_schedule
from ..data.tasks import Split
from ..settings.schema import ClientSettings
from ..upload import Noise
from ..upload.privacy import noise_multiplier
from ..vision.augment import random_maps, warp

AT_ONCE = 64  # images whose gradients are held together, each as large as the model
Loss = Callable[[VisionTransformer, Tensor, Tensor], Tensor]  # model, images (B, ch, H, W), labels (B,)


def training_noise(size: int, steps: int, settings: ClientSettings) -> Noise | None:
    """Return the noise of training on `size` images for `steps` steps; None for plain training.

    Its multiplier is calibrated so that all steps together have `dp_epsilon` at `dp_delta`. As many images
    as in plain training are expected in a step: q = batch_size / n, at most 1. Raises BadInput as
    `noise_multiplier`.
    """
    if settings.dp_epsilon is None:
        return None
    rate = min(1.0, settings.batch_size / size)
    found = noise_multiplier("client.dp_epsilon", settings.dp_epsilon, settings.dp_delta, rate, steps)
    return Noise(clip=settings.dp_clip, multiplier=found, sample_rate=rate, steps=steps)


def fit_private(
    vit: VisionTransformer,
    loss: Loss,
    decay: Callable[[], Tensor | float],
    shard: Split,
    settings: ClientSettings,
    noise: Noise,
    rng: torch.Generator,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Train a model, in place, by DP-SGD on random views of a shard.

    loss: of images, its mean over them. decay: a penalty of the weights that depends on no image, such as
    FedProx'; its gradient has no noise. An image has one view in a step. rng draws images, views and noise,
    and must be the client's secret. progress is called with 1 after each step.
    """
    torch.manual_seed(torch.randint(2**31, (1,), generator=rng).item())  # dropout in models that have it
    at = device()
    images, labels = shard.images.to(at), shard.labels.to(at)
    optimizer = make_optimizer(vit, settings.optimizer, settings.lr, settings.weight_decay)
    schedule = make_schedule(optimizer, settings.schedule, noise.steps)
    expected = noise.sample_rate * len(shard)
    for _ in range(noise.steps):
        drawn = torch.rand(len(shard), generator=rng, dtype=torch.double) < noise.sample_rate
        pick = drawn.nonzero()[:, 0]
        batch = images[pick.to(at)]  # (B, ch, H, W); B may be 0
        if settings.augment and len(pick):
            batch = warp(batch, random_maps(len(pick), settings.augment, rng))
        sums = clipped_gradients(vit, loss, batch, labels[pick.to(at)], noise.clip)
        optimizer.zero_grad(set_to_none=True)
        if isinstance(penalty := decay(), Tensor):
            penalty.backward()
        for name, weight in trained(vit).items():
            drawn_noise = torch.randn(weight.shape, generator=rng).to(at)
            own = (sums[name] + noise.multiplier * noise.clip * drawn_noise) / expected
            weight.grad = own if weight.grad is None else weight.grad + own
        optimizer.step()
        schedule.step()
        if progress:
            progress(1)


def clipped_gradients(
    vit: VisionTransformer, loss: Loss, images: Tensor, labels: Tensor, clip: float
) -> dict[str, Tensor]:
    """Sum the gradients of single images (B, ch, H, W), each scaled down to norm `clip`, by weight.

    The norm of an image's gradient is over all weights together. B may be 0: the sums are then zero.
    """
    sums = {name: torch.zeros_like(weight) for name, weight in trained(vit).items()}
    for start in range(0, len(images), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        each = sample_gradients(vit, loss, (images[part], labels[part]))
        square = sum(g.flatten(1).square().sum(1) for g in each.values())  # (B,)
        scale = (clip / square.sqrt()).clamp(max=1)
        for name, gradients in each.items():
            sums[name] += torch.einsum("b,b...->...", scale, gradients)
    return sums
