"""Other ways to run what `fedmitr` runs, measured against each other on this machine, in alternation.

    python benchmarks/variants.py steps       a gradient step: timm's blocks, fused attention, ours, bf16;
                                              five teachers one after another, and stacked
    python benchmarks/variants.py student     a training step: timm's forward, ours, bf16
    python benchmarks/variants.py compiling   a gradient step as it is, and through torch.compile
    python benchmarks/variants.py batches     inversion of a batch in one piece, and in chunks
    python benchmarks/variants.py processes   two processes of one thread, and one process of two
    python benchmarks/variants.py             all five

Models have random weights. Every table is of medians, the first row the yardstick.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import click
import joblib
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import clip_grad_norm_

from fedmitr import BadInput, Ensemble, invert
from fedmitr.core.machine import autocast, device
from fedmitr.core.rng import make_rng
from fedmitr.evaluation.bench import CLASSES, random_uploads
from fedmitr.evaluation.timing import torch_threads
from fedmitr.settings.schema import EnsembleSettings, InversionSettings
from fedmitr.vision import attention
from fedmitr.vision.patches import PatchGrid
from fedmitr.vision.tokens import class_logits, embed_patches, image_logits
from fedmitr.vision.vit import create_vit

CHUNKS = (5, 10, 20, 50)
Run = Callable[[], object]


def alternate(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of every run: all take place once a round, the first of which warms up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device().type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in taken.items()}


def show(title: str, taken: dict[str, list[float]]) -> None:
    """Print a table: the median, and how many times faster than the first row (median over rounds)."""
    first = next(iter(taken.values()))
    click.echo(title)
    for name, values in taken.items():
        faster = statistics.median(a / b for a, b in zip(first, values, strict=True))
        click.echo(f"  {name:<44}{statistics.median(values):>10.2f} ms  × {faster:.2f}")


@contextmanager
def short(tokens: int) -> Iterator[None]:
    """Use our attention for at most so many tokens; with 0 always torch's fused kernel."""
    before, attention.SHORT = attention.SHORT, tokens
    try:
        yield
    finally:
        attention.SHORT = before


# A gradient step.


def grad_patches(logits: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
    """Return the gradient of class 0's log-probability with respect to patches (B, M, ch·p·p)."""
    patches = patches.detach().requires_grad_()
    loss = logits(patches).float().log_softmax(dim=-1)[..., 0].sum()
    return torch.autograd.grad(loss, patches)[0]


def random_patches(vit: nn.Module, batch: int, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return noise on the first `count` patches (default all), (B, M, ch·p·p), and their positions (1, M)."""
    grid = PatchGrid.of(vit)
    kept = min(count or grid.patches, grid.patches)
    width = grid.channels * grid.patch[0] * grid.patch[1]
    patches = torch.randn(batch, kept, width, generator=make_rng(0, "variants")).to(device())
    return patches, torch.arange(kept, device=device())[None]


def timm_logits(vit: nn.Module, patches: Tensor, positions: Tensor) -> Tensor:
    """Return logits (B, C) by timm's own blocks and head, which compute every token in every block."""
    return vit.forward_head(vit.norm(vit.blocks(embed_patches(vit, patches, positions))))


class OnPatches(nn.Module):
    """`class_logits` as the forward of a module, which functional_call needs."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        return class_logits(self.vit, patches, positions)


def stacked(vits: list[nn.Module], positions: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function to the logits (K, B, C) of teachers of one shape, computed for all at once."""
    models = [OnPatches(copy.deepcopy(vit)) for vit in vits]
    for block in models[0].vit.blocks:
        block.attn.fused_attn = False  # timm's plain products: vmap runs the fused kernel in a Python loop
    parameters, buffers = stack_module_state(models)
    parameters = {k: v.detach() for k, v in parameters.items()}
    one = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x, positions)), in_dims=(0, 0, None))
    return lambda patches: one(parameters, buffers, patches)


def one_by_one(vits: list[nn.Module], positions: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function to the same logits (K, B, C), one teacher after another, as in `Ensemble`."""
    return lambda patches: torch.stack([class_logits(vit, patches, positions) for vit in vits])


def step(logits: Callable[[Tensor], Tensor], patches: Tensor, tokens: int, precision: str = "fp32") -> Tensor:
    """Compute one gradient step, with our attention for up to so many tokens."""
    with short(tokens), autocast(precision):
        return grad_patches(logits, patches)


def step_variants(vits: list[nn.Module], patches: Tensor, positions: Tensor) -> tuple[dict[str, Run], ...]:
    """Return what `steps` measures: ways to run one teacher, and ways to run them all."""
    ours, timm = (partial(logits, vits[0], positions=positions) for logits in (class_logits, timm_logits))
    take = partial(partial, step, patches=patches)
    one = {
        "timm's blocks whole, fp32": take(timm, tokens=0),
        "ours, torch's fused attention, fp32": take(ours, tokens=0),
        "ours, fp32": take(ours, tokens=attention.SHORT),
        "timm's blocks whole, bf16": take(timm, tokens=0, precision="bf16"),
        "ours, bf16": take(ours, tokens=attention.SHORT, precision="bf16"),
    }
    apart, together = one_by_one(vits, positions), stacked(vits, positions)
    several = {
        "one after another": take(apart, tokens=attention.SHORT),
        "one after another, torch's fused attention": take(apart, tokens=0),
        # the hand-written gradient of our attention does not vmap
        "stacked (vmap), timm's plain attention": take(together, tokens=0),
    }
    return one, several


# Whole inversions.


def teacher(model: str, image_size: int | None) -> Ensemble:
    """Return an ensemble of one client with random weights."""
    uploads = random_uploads(model, image_size, 1)
    return Ensemble(uploads, EnsembleSettings(mode="mean_logits")).to(device())


def invert_in_chunks(ensemble: Ensemble, labels: Tensor, settings: InversionSettings, chunk: int) -> None:
    """Invert labels (B,), `chunk` images at a time."""
    for seed, part in enumerate(labels.split(chunk)):
        invert(ensemble, part, settings, seed, recorded=0)


def short_settings(iterations: int) -> InversionSettings:
    """Return settings whose stops are the default ones as shares of the iterations."""
    usual = InversionSettings()
    stops = tuple(max(k + 1, s * iterations // usual.iterations) for k, s in enumerate(usual.stop_at))
    return InversionSettings(
        teacher="ensemble", augment=0, iterations=iterations, stop_at=stops, stop_ratio=usual.stop_ratio
    )


def some_labels(count: int) -> Tensor:
    return (torch.arange(count) % CLASSES).to(device())


def work(model: str, image_size: int | None, batches: int, batch: int, iterations: int, threads: int) -> None:
    """Invert so many batches in this process with so many threads."""
    with torch_threads(threads):
        ensemble = teacher(model, image_size)
        invert_in_chunks(ensemble, some_labels(batches * batch), short_settings(iterations), batch)


# The command line.


def shared(command):
    """Give a command the options that all have."""
    options = [
        click.option("--model", default="vit_micro", show_default=True),
        click.option("--image-size", type=click.IntRange(1), help="Pixels; default the model's."),
        click.option("--rounds", type=click.IntRange(1), default=10, show_default=True),
    ]
    for option in reversed(options):
        command = option(command)
    return command


threads_option = click.option("--threads", type=click.IntRange(1), help="Default torch's own number.")
iterations_option = click.option("--iterations", type=click.IntRange(5), default=16, show_default=True)


@click.group(invoke_without_command=True)
@click.pass_context
def main(context) -> None:
    """Measure variants of inversion and of its gradient step in alternation."""
    if context.invoked_subcommand is None:
        for command in (steps, student, compiling, batches, processes):
            context.invoke(command)


@main.command()
@shared
@threads_option
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--patches", type=click.IntRange(1), help="Patches an image keeps; default all.")
@click.option("--clients", type=click.IntRange(1), default=5, show_default=True, help="Stacked teachers.")
def steps(model, image_size, rounds, threads, batch, patches, clients) -> None:
    """Measure a gradient step of one teacher on random patches, and of several."""
    vits = [u.vit().to(device()) for u in random_uploads(model, image_size, clients)]
    view, positions = random_patches(vits[0], batch, patches)
    with torch_threads(threads):
        title = f"{model}, {view.shape[1]} patches, batch {batch}, {torch.get_num_threads()} threads"
        one, several = step_variants(vits, view, positions)
        show(f"one teacher: {title}", alternate(one, rounds))
        show(f"{clients} teachers: {title}", alternate(several, rounds))


@main.command()
@shared
@threads_option
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True)
def student(model, image_size, rounds, threads, batch) -> None:
    """Measure a training step of one model on whole images: forward, gradient, clipping, AdamW."""
    vit = create_vit(model, CLASSES, image_size=image_size).to(device())
    images = torch.randn((batch, *PatchGrid.of(vit).image), generator=make_rng(0, "variants")).to(device())

    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-4, fused=True)

    def train(logits: Callable[[Tensor], Tensor], precision: str) -> None:
        with autocast(precision):
            class_scores = logits(images)  # (B, C)
        optimizer.zero_grad()
        F.cross_entropy(class_scores.float(), some_labels(batch)).backward()
        clip_grad_norm_(vit.parameters(), 1.0)
        optimizer.step()

    with torch_threads(threads):
        ours = partial(image_logits, vit)
        runs = {
            "timm's forward, fp32": partial(train, vit, "fp32"),
            "ours, fp32": partial(train, ours, "fp32"),
            "timm's forward, bf16": partial(train, vit, "bf16"),
            "ours, bf16": partial(train, ours, "bf16"),
        }
        show(
            f"training step: {model}, batch {batch}, {torch.get_num_threads()} threads",
            alternate(runs, rounds),
        )


@main.command()
@shared
@threads_option
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
def compiling(model, image_size, rounds, threads, batch) -> None:
    """Measure a gradient step of one teacher on all patches, as it is and through torch.compile."""
    (upload,) = random_uploads(model, image_size, 1)
    vit = upload.vit().to(device())
    patches, positions = random_patches(vit, batch)
    with torch_threads(threads):
        start = time.perf_counter()
        fast = partial(torch.compile(class_logits, dynamic=False), vit, positions=positions)
        grad_patches(fast, patches)
        click.echo(f"compiling took {time.perf_counter() - start:.0f} s")
        runs = {
            "as it is": partial(grad_patches, partial(class_logits, vit, positions=positions), patches),
            "through torch.compile": partial(grad_patches, fast, patches),
        }
        show(
            f"gradient step: {model}, batch {batch}, {torch.get_num_threads()} threads",
            alternate(runs, rounds),
        )


@main.command()
@shared
@threads_option
@iterations_option
@click.option("--batch", type=click.IntRange(1), default=100, show_default=True)
def batches(model, image_size, rounds, threads, iterations, batch) -> None:
    """Measure sparse inversion of a batch in one piece, and in chunks."""
    ensemble, labels, settings = teacher(model, image_size), some_labels(batch), short_settings(iterations)
    pieces = [batch, *(c for c in CHUNKS if c < batch)]
    runs = {f"chunks of {c}": partial(invert_in_chunks, ensemble, labels, settings, c) for c in pieces}
    with torch_threads(threads):
        title = f"{model}, {batch} images, {iterations} iterations, {torch.get_num_threads()} threads"
        show(title, alternate(runs, rounds))


@main.command()
@shared
@iterations_option
@click.option("--batch", type=click.IntRange(1), default=50, show_default=True)
@click.option("--each", type=click.IntRange(1), default=2, show_default=True, help="Batches of each process.")
def processes(model, image_size, rounds, iterations, batch, each) -> None:
    """Measure inversions in two processes of one thread each, and as many in one process of two threads."""
    one = partial(work, model, image_size, 2 * each, batch, iterations, 2)
    half = partial(work, model, image_size, each, batch, iterations, 1)
    with joblib.Parallel(n_jobs=2) as pool:  # its processes start in the round that warms up
        runs = {
            "one process of two threads": one,
            "two processes of one thread": lambda: pool(joblib.delayed(half)() for _ in range(2)),
        }
        show(f"{model}, {2 * each} batches of {batch}, {iterations} iterations", alternate(runs, rounds))


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        raise SystemExit(f"variants: {error}") from None
