"""The generator of the methods that train one, its optimiser, and the losses that several share."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..blocks import GeneratorSettings
from ..runtime import device
from ..vit import normalisation

COARSEST = 8  # largest side of the map that the noise becomes first


class Generator(nn.Module):
    """Noise z (B, latent), and a class (B,) if `conditional`, to images (B, ch, H, W) as the models see them.

    As in DENSE and FedFTG: a linear layer to a coarse map, doublings with 3×3 convolutions, batch
    normalisation and LeakyReLU; a sigmoid gives the brightness, which is normalised as for the models.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        settings: GeneratorSettings,
        rng: torch.Generator,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        self.side, width = vit.patch_embed.img_size, settings.width
        doublings = max(0, math.ceil(math.log2(max(self.side) / COARSEST)))
        self.coarse = tuple(math.ceil(s / 2**doublings) for s in self.side)
        self.classes = vit.num_classes if conditional else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.randint(2**31, (1,), generator=rng).item())
            self.start = nn.Linear(settings.latent + self.classes, 2 * width * math.prod(self.coarse))
            self.body = nn.Sequential(nn.BatchNorm2d(2 * width))
            for index in range(doublings):
                self.body.append(nn.Upsample(scale_factor=2))
                self.body.extend(_convolution(2 * width, width if index == doublings - 1 else 2 * width))
            last = width if doublings else 2 * width
            self.body.append(nn.Conv2d(last, vit.patch_embed.proj.in_channels, 3, padding=1))
        for name, value in zip(("mean", "std"), normalisation(vit), strict=True):
            self.register_buffer(name, value)
        self.to(device())

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.classes:
            z = torch.cat([z, F.one_hot(labels, self.classes).to(z)], dim=1)
        brightness = self.body(self.start(z).view(len(z), -1, *self.coarse)).sigmoid()
        brightness = brightness[..., : self.side[0], : self.side[1]]
        return (brightness - self.mean) / self.std


def _convolution(channels: int, out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.LeakyReLU(0.2, inplace=True),
    ]


def make_adam(parameters, settings: GeneratorSettings) -> torch.optim.Adam:
    """Adam as in DENSE: betas 0.5 and 0.999."""
    return torch.optim.Adam(parameters, settings.lr, betas=(0.5, 0.999))


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, generator: Generator) -> None:
    """One step of the generator, its gradient clipped at norm 10 as in DENSE's code."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(generator.parameters(), 10.0)
    optimizer.step()


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T²·KL(teacher ‖ student) of each image (B,), from logits or log-probabilities (B, C)."""
    p, q = ((x / temperature).log_softmax(dim=-1) for x in (teacher, student))
    return temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)


def noise(count: int, settings: GeneratorSettings, rng: torch.Generator) -> Tensor:
    """z ~ N(0, I) (count, latent), drawn on the CPU and moved."""
    return torch.randn(count, settings.latent, generator=rng).to(device())


Loss = Callable[[Tensor, Tensor], Tensor]  # images (B, ch, H, W) and labels (B,) to a scalar


def learned_batch(
    student: VisionTransformer,
    labels: Tensor,
    loss_of: Loss,
    settings: GeneratorSettings,
    rng: torch.Generator,
    progress: Callable[[int], object],
) -> Tensor:
    """Images (B, ch, H, W) for labels (B,): a fresh generator and its noise, both fitted to this batch.

    The best iterate by loss is returned, as DENSE and Co-Boosting do.
    """
    generator = Generator(student, settings, rng)
    z = noise(len(labels), settings, rng).requires_grad_(True)
    optimizer = make_adam([*generator.parameters(), z], settings)
    best, least = None, torch.tensor(math.inf, device=labels.device)
    for _ in range(settings.generator_steps):
        images = generator(z)
        loss = loss_of(images, labels)
        better = loss.detach() < least
        best = images.detach() if best is None else torch.where(better, images.detach(), best)
        least = torch.where(better, loss.detach(), least)
        take_step(optimizer, loss, generator)
        progress(1)
    return best
