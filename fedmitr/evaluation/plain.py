"""The published loop in benchmarks/plain_loop.py, run as `bench` needs it: found, checked and timed fairly.

It is no part of the package but a file of the checkout, so it is loaded by its path.
"""

import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from types import ModuleType

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.errors import BadInput
from ..core.machine import device
from ..core.paths import home
from ..core.rng import make_rng
from ..server.inversion import remaining
from ..vision.patches import PatchGrid
from ..vision.tokens import image_logits

PLAIN = "benchmarks/plain_loop.py"


def load_plain_loop() -> ModuleType:
    """Load benchmarks/plain_loop.py as a module; BadInput where there is no checkout."""
    path = home() / PLAIN
    if not path.is_file():
        raise BadInput(f"against='plain' needs a checkout of the repository: {PLAIN} is not there")
    spec = importlib.util.spec_from_file_location("plain_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def check_plain(plain: ModuleType, vit: VisionTransformer, model: str) -> None:
    """Raise BadInput if the plain loop and timm give different logits for this model."""
    images = torch.randn((2, *PatchGrid.of(vit).image), generator=make_rng(0, "bench")).to(device())
    keep = torch.arange(vit.patch_embed.num_patches, device=device()).repeat(2, 1)  # (2, N)
    try:
        found = plain.forward(vit, images, keep)[0]
    except (RuntimeError, AttributeError):
        found = None
    if found is None or not torch.allclose(found, image_logits(vit, images), rtol=1e-2, atol=1e-3):
        raise BadInput(f"against='plain' knows Vision Transformers of the plain kind alone, not {model!r}")


def run_plain(
    plain: ModuleType,
    vit: VisionTransformer,
    labels: Tensor,
    iterations: int,
    stops: Sequence[int],
    ratios: Sequence[float],
    *,
    tv: float,
    tick: Callable[[int], object],
) -> None:
    """Invert labels (B,) with the plain loop, as published: the teacher's parameters require gradients.

    ratios: of our stops; the plain loop keeps as many patches. tick is called after each iteration. The
    teacher and all random states are left as they were.
    """
    ratios = ratios_rounded_down(vit.patch_embed.num_patches, ratios)
    with fixed_randomness(), ExitStack() as stack:
        stack.enter_context(torch.device(device()))  # where the plain loop makes its images

        def first_then(step: int) -> None:
            stack.close()  # the images are made; the measured iterations pay nothing for the context
            tick(step)

        vit.requires_grad_(True)
        try:
            plain.invert_plainly(vit, labels, iterations, stops, ratios, tv=tv, on_iteration=first_then)
        finally:
            vit.requires_grad_(False).zero_grad(set_to_none=True)


def ratios_rounded_down(count: int, ratios: Sequence[float]) -> tuple[float, ...]:
    """Return the stop ratios that make a loop which rounds down keep as many of `count` patches as ours.

    Ours keeps `remaining`(count, ratios), which rounds to the nearest number.
    """
    left = [remaining(count, ratios[:stop]) for stop in range(len(ratios) + 1)]
    return tuple(1 - (after + 0.5) / before for before, after in pairwise(left))


@contextmanager
def fixed_randomness() -> Iterator[None]:
    """Seed the random states of Python and torch, and put them back afterwards."""
    before = random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(before)
