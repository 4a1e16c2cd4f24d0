"""What the methods with a generator share: the network, its optimiser, a loss, the rounds."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core.machine import device
from ..core.progress import progress
from ..core.rng import make_rng
from ..core.store import Store
from ..server.ensemble import held_classes
from ..server.synthetic import balanced_labels
from ..settings import Settings
from ..settings.schema import Count, Positive, setting
from ..upload import Upload
from ..vision.vit import normalisation
from ._method import Outcome, Range, Search, Work, find
from ._student import Generation, Student, StudentSettings, alternate, portions, stored, student_search

COARSEST = 8  # largest side of the map that the noise becomes first


class GeneratorSettings(StudentSettings):
    """A generator, its rounds, and the student that learns from its images."""

    rounds: Count = setting(4, "rounds of generation, then distillation", "DENSE, Co-Boosting: 200")
    generator_steps: Count = setting(15, "optimiser steps of the generator in a round", "DENSE: 30")
    lr: Positive = setting(5e-3, "Adam's learning rate of the generator", "DENSE, Co-Boosting: 1e-3")
    latent: Count = setting(100, "length of the noise z", "FedFTG; DENSE: 256")
    width: Count = setting(16, "channels of the generator", "DENSE: 64")
    images: Count = setting(400, "synthetic images in all, under budget=own")
    student_steps: Count = setting(400, "student steps in all, under budget=own")


def generator_search(block: str) -> Search:
    """List what tuning may try for a generator and its student, in a method's block of settings.

    At most 240 steps of the generator, each through all clients: about the work of FedMITR's inversion.
    """
    return {
        **student_search(block),
        f"{block}.lr": Range(5e-4, 1e-1, log=True),
        f"{block}.rounds": (1, 2, 4, 8),
        f"{block}.generator_steps": (8, 15, 30),
    }


class Generator(nn.Module):
    """A network from noise z (B, latent), and labels (B,) if `conditional`, to images (B, ch, H, W).

    A linear layer to a coarse map, doublings with 3×3 convolutions, batch normalisation and LeakyReLU. What
    comes then, and the initial weights, are of two public forms. "dense" (DENSE, Co-Boosting): a sigmoid
    gives the brightness, which is normalised as for the models; weights are drawn by `draw_small_weights`.
    "dafl" (DAFL, FedFTG): tanh and batch normalisation give normalised images; weights are torch's defaults.
    A conditional generator makes half of the coarse map's channels of the noise and half of the label, as
    FedFTG's: batch normalisation then makes the two equally strong.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        settings: GeneratorSettings,
        rng: torch.Generator,
        form: Literal["dense", "dafl"] = "dense",
        conditional: bool = False,
    ) -> None:
        """Build the generator of images for `vit`; rng fixes its initial weights."""
        super().__init__()
        self.side, width, channels = (
            vit.patch_embed.img_size,
            settings.width,
            vit.patch_embed.proj.in_channels,
        )
        doublings = max(0, math.ceil(math.log2(max(self.side) / COARSEST)))
        self.coarse = tuple(math.ceil(s / 2**doublings) for s in self.side)
        self.classes = vit.num_classes if conditional else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.randint(2**31, (1,), generator=rng).item())
            cells = math.prod(self.coarse)
            self.start = nn.Linear(settings.latent, (1 if conditional else 2) * width * cells)
            self.label = nn.Linear(self.classes, width * cells) if conditional else None
            self.body = nn.Sequential(nn.BatchNorm2d(2 * width))
            for index in range(doublings):
                self.body.append(nn.Upsample(scale_factor=2))
                self.body.extend(_convolution(2 * width, width if index == doublings - 1 else 2 * width))
            self.body.append(nn.Conv2d(width if doublings else 2 * width, channels, 3, padding=1))
            if form == "dense":
                self.apply(draw_small_weights)
        self.standardise = nn.BatchNorm2d(channels, affine=False) if form == "dafl" else None
        for name, value in zip(("mean", "std"), normalisation(vit), strict=True):
            self.register_buffer(name, value)
        self.to(device())

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return normalised images (B, ch, H, W) for noise z (B, latent) and labels (B,)."""
        coarse = self.start(z)  # (B, 2·width·h·w), or half of that beside the label's half
        if self.label is not None:
            coarse = torch.cat([coarse, self.label(F.one_hot(labels, self.classes).to(z))], dim=1)
        image = self.body(coarse.view(len(z), -1, *self.coarse))
        image = image[..., : self.side[0], : self.side[1]]
        if self.standardise is not None:
            return self.standardise(image.tanh())
        return (image.sigmoid() - self.mean) / self.std


def _convolution(channels: int, out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.LeakyReLU(0.2, inplace=True),
    ]


@torch.no_grad()
def draw_small_weights(layer: nn.Module) -> None:
    """Draw a layer's weights as DENSE and Co-Boosting do, from torch's global random state.

    Linear layers and convolutions from N(0, 0.02²), scales of batch normalisation from N(1, 0.02²); biases 0.
    """
    if isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
        layer.weight.normal_(1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0, 0.02)
        if layer.bias is not None:
            layer.bias.zero_()


def make_adam(parameters, settings: GeneratorSettings) -> torch.optim.Adam:
    """Make Adam with DENSE's betas, 0.5 and 0.999."""
    return torch.optim.Adam(parameters, settings.lr, betas=(0.5, 0.999))


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, generator: Generator) -> None:
    """Take one step of the generator, its gradient clipped at norm 10 as in DENSE's code."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(generator.parameters(), 10.0)
    optimizer.step()


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T²·KL(teacher ‖ student) of each image (B,), from logits or log-probabilities (B, C)."""
    p, q = ((x / temperature).log_softmax(dim=-1) for x in (teacher, student))
    return temperature**2 * F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)


def noise(count: int, settings: GeneratorSettings, rng: torch.Generator) -> Tensor:
    """Draw z ~ N(0, I), (count, latent), on the CPU, and move it to the device."""
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
    """Make images (B, ch, H, W) for labels (B,): fit a fresh generator and its noise to this batch.

    Returns the iterate of least loss, as DENSE and Co-Boosting do. progress is called with 1 after each step.
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


# --- rounds -----------------------------------------------------------------------------------------


def budget(settings: Settings, own: GeneratorSettings) -> tuple[int, int]:
    """Return a method's synthetic images and student steps: everyone's, or those of its own block."""
    if settings.budget == "equal":
        return settings.inversion.images, settings.distill.steps
    return own.images, own.student_steps


def generator_work(settings: Settings, own: GeneratorSettings) -> Work:
    """Return the passes through models that a method with a generator takes."""
    images, steps = budget(settings, own)
    rounds = min(own.rounds, images)
    return Work(
        images=images,
        generator_steps=rounds * own.generator_steps,
        generator_batch=getattr(own, "batch_size", math.ceil(images / rounds)),  # else all of a round
        student_steps=steps,
        calibrate=own.calibrate,
    )


# student, number of images of each round, random stream, progress callback -> how images are made
Begin = Callable[[Student, Sequence[int], torch.Generator, Callable[[int], object]], Generation]


def distil_generated(
    method: str, uploads: Sequence[Upload], settings: Settings, store: Store, begin: Begin
) -> Outcome:
    """Turn uploads into one global model by rounds of generation and distillation, or take it from the store.

    begin is called once, before the first round, with the student, the number of images of each round, the
    method's random stream, and what it must call with 1 after each step of its generator.
    """
    own: GeneratorSettings = getattr(settings, method)

    def make() -> Outcome:
        images, steps = budget(settings, own)
        rng = make_rng(settings.seed, method)
        student = Student(uploads, settings, method, steps)
        rounds = min(own.rounds, images)
        with progress(rounds * own.generator_steps + steps, find(method).label, "step") as bar:
            counts = portions(images, rounds)
            generation = begin(student, counts, rng, bar.update)
            return alternate(student, generation, steps, counts, stage="generation", progress=bar.update)

    return stored(method, uploads, settings, store, make)


def balanced_targets(
    uploads: Sequence[Upload], counts: Sequence[int], rng: torch.Generator
) -> tuple[Tensor, ...]:
    """Draw the target labels of each round, (counts[r],), balanced over the classes that clients hold."""
    held = held_classes(uploads)
    return held[balanced_labels(sum(counts), len(held), rng)].split(list(counts))
