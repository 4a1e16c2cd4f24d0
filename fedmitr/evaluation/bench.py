"""How fast inversion runs here: seconds, FLOP/s, and how near a sparse iteration comes to what it saves.

Random teachers and `invert` itself, no copy of its loop. Dense runs, sparse ones and the matrix products
that show the machine's peak alternate, so that a machine that slows down slows all of them.
"""

import importlib.util
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from types import ModuleType
from typing import Any

import torch
from pydantic import BaseModel
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.errors import BadInput
from ..core.machine import describe, device, native_bf16
from ..core.paths import home
from ..core.progress import progress
from ..core.rng import make_rng
from ..server.ensemble import Ensemble
from ..server.inversion import invert, remaining
from ..settings.schema import EnsembleSettings, InversionSettings
from ..upload import ModelShape, Upload
from ..vision.patches import PatchGrid
from ..vision.tokens import image_logits
from ..vision.vit import create_vit
from .flops import image_flops

STOPS = (1, 2, 3, 4)  # the published ones, early: what is measured comes after the last
RATIOS = (0.3, 0.3, 0.3, 0.3)
TV = 1e-4
WARM = 2  # iterations after the last stop that are not measured
ROUNDS = 3
CLASSES = 10
SIDE = 2048  # of the square matrices whose product is the machine's peak
PLAIN = "benchmarks/plain_loop.py"


class Speed(BaseModel):
    """Of one kind of iteration, dense or sparse; share_of_peak is gflops over the report's peak_gflops."""

    seconds_per_iteration: float
    images_per_minute: float
    flops_per_iteration: int
    gflops: float
    share_of_peak: float


class Report(BaseModel):
    """What `fedmitr bench inversion` reports; seconds are medians, the plain loop's None without it.

    ratio is dense over sparse seconds and flop_ratio the same of floating-point operations, the most that
    ratio could be: ratio_of_ceiling is the one over the other. speedup_dense and speedup_sparse are the
    plain loop's seconds over ours. peak_memory_mb is, on CUDA, what a dense inversion allocates at most,
    and elsewhere the peak resident set of the whole process after it.
    """

    model: str
    image_size: int
    batch: int
    clients: int
    precision: str
    device: str
    threads: int
    patches: int
    patches_left: int
    iterations_per_image: int
    dense: Speed
    sparse: Speed
    ratio: float
    flop_ratio: float
    ratio_of_ceiling: float
    peak_gflops: float
    peak_memory_mb: float | None
    plain_dense_seconds_per_iteration: float | None = None
    plain_sparse_seconds_per_iteration: float | None = None
    speedup_dense: float | None = None
    speedup_sparse: float | None = None

    def rows(self) -> dict[str, str]:
        """Name and value as text of everything that is known."""
        flat: dict[str, Any] = {}
        for name, value in self.model_dump(exclude_none=True).items():
            flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        return {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in flat.items()}


def bench_inversion(
    model: str = "vit_micro",
    image_size: int | None = None,
    batch: int = 8,
    clients: int = 1,
    precision: str = "fp32",
    threads: int | None = None,
    iterations: int = 10,
    against: str | None = None,
) -> Report:
    """Measure inversion of one batch by an ensemble of random teachers.

    image_size: pixels, default the model's. threads: of torch, default its own number. iterations: how
    many of each run are measured. against: "plain" also measures benchmarks/plain_loop.py, in fp32.
    """
    if against and clients > 1:
        raise BadInput(f"against={against!r} knows a single teacher: allowed is clients=1, not {clients}")
    plain = plain_loop() if against else None
    precision = ("bf16" if native_bf16() else "fp32") if precision == "auto" else precision
    uploads = random_uploads(model, image_size, clients)
    ensemble = Ensemble(uploads, EnsembleSettings(mode="mean_logits", precision=precision)).to(device())
    vit = uploads[0].vit().to(device())  # what the plain loop gets, in float32 whatever the ensemble holds
    if plain:
        check_plain(plain, vit, model)
    with torch_threads(threads):
        return _Bench(ensemble, vit, batch, iterations, plain).report(model)


def random_uploads(model: str, image_size: int | None, clients: int) -> list[Upload]:
    """Uploads of that many different clients, random weights."""
    vit = create_vit(model, CLASSES, image_size=image_size)
    shape = ModelShape.of(model, vit)
    uploads = []
    for client in range(clients):
        rng = make_rng(0, "bench", client)
        weights = {k: v + 0.02 * torch.randn(v.shape, generator=rng) for k, v in vit.state_dict().items()}
        uploads.append(Upload(client, 1, shape, weights))
    return uploads


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """torch with that many threads; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Bench:
    """One batch, and the loops that invert it."""

    ensemble: Ensemble
    vit: VisionTransformer
    batch: int
    iterations: int
    plain: ModuleType | None

    def report(self, model: str) -> Report:
        shape = PatchGrid.of(self.ensemble.members[0])
        patches = {"dense": shape.patches, "sparse": remaining(shape.patches, RATIOS)}
        flops = {kind: self.batch * image_flops(self.ensemble, left) for kind, left in patches.items()}
        seconds, peak, memory = self._measure()
        speed = {kind: self._speed(_median(seconds["ours", kind]), flops[kind], peak) for kind in patches}
        ratio = speed["dense"].seconds_per_iteration / speed["sparse"].seconds_per_iteration
        flop_ratio = flops["dense"] / flops["sparse"]
        against = {}
        for kind in patches if self.plain else ():
            plain = seconds["plain", kind]
            against[f"plain_{kind}_seconds_per_iteration"] = _median(plain)
            against[f"speedup_{kind}"] = speedup(plain, seconds["ours", kind])
        return Report(
            model=model,
            image_size=shape.size[0],
            batch=self.batch,
            clients=len(self.ensemble.members),
            precision=self.ensemble.precision,
            device=describe()["device"],
            threads=torch.get_num_threads(),
            patches=patches["dense"],
            patches_left=patches["sparse"],
            iterations_per_image=InversionSettings().iterations,
            **speed,
            ratio=ratio,
            flop_ratio=flop_ratio,
            ratio_of_ceiling=ratio / flop_ratio,
            peak_gflops=peak,
            peak_memory_mb=memory,
            **against,
        )

    def _measure(self) -> tuple[dict[tuple[str, str], list[list[float]]], float, float | None]:
        """Seconds of each iteration, a list a run, by whose run and its kind; peak GFLOP/s; memory in MB."""
        loops = {"ours": self._ours} | ({"plain": self._plain} if self.plain else {})
        kinds = {"dense": (), "sparse": STOPS}
        taken: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
        peaks, memory = [], None
        if device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        total = ROUNDS * len(loops) * sum(map(self._length, kinds.values()))
        with progress(total, "inversion", "iteration") as bar:
            for _ in range(ROUNDS):
                for (kind, stops), who in product(kinds.items(), loops):
                    loop = partial(loops[who], stops)
                    taken[who, kind].append(stopwatch(loop, self._skip(stops), bar.update))
                    memory = memory or peak_memory_mb()  # after a dense run of ours, before any other
                peaks += peak_gflops(self.ensemble.precision)
        return taken, statistics.median(peaks), memory

    def _skip(self, stops: Sequence[int]) -> int:
        """Iterations of a run before those that are measured."""
        return 1 + max(stops, default=0) + WARM

    def _length(self, stops: Sequence[int]) -> int:
        return self._skip(stops) + self.iterations

    def _labels(self) -> Tensor:
        return (torch.arange(self.batch) % CLASSES).to(device())

    def _ours(self, stops: Sequence[int], tick: Callable[[int], object]) -> None:
        settings = InversionSettings(
            iterations=self._length(stops),
            stop_at=stops,
            stop_ratio=RATIOS[: len(stops)],
            teacher="ensemble",
            augment=0.0,
            tv=TV,
            jitter=1 / 8,
            flip=True,
            keep_best=True,
        )
        invert(self.ensemble, self._labels(), settings, 0, recorded=0, progress=tick)

    def _plain(self, stops: Sequence[int], tick: Callable[[int], object]) -> None:
        vit = self.vit
        ratios = ratios_rounded_down(vit.patch_embed.num_patches, RATIOS[: len(stops)])
        with fixed_randomness(), ExitStack() as stack:
            stack.enter_context(torch.device(device()))  # where the plain loop makes its images

            def first_then(step: int) -> None:
                stack.close()  # they are made; the measured iterations pay nothing for it
                tick(step)

            vit.requires_grad_(True)  # as published
            try:
                length = self._length(stops)
                self.plain.invert_plainly(
                    vit, self._labels(), length, stops, ratios, tv=TV, on_iteration=first_then
                )
            finally:
                vit.requires_grad_(False).zero_grad(set_to_none=True)

    def _speed(self, seconds: float, flops: int, peak: float) -> Speed:
        gflops = flops / seconds / 1e9
        return Speed(
            seconds_per_iteration=seconds,
            images_per_minute=60 * self.batch / (seconds * InversionSettings().iterations),
            flops_per_iteration=flops,
            gflops=gflops,
            share_of_peak=gflops / peak,
        )


def stopwatch(
    loop: Callable[[Callable[[int], object]], object], skip: int, update: Callable[[int], object]
) -> list[float]:
    """Seconds of each iteration of a loop after the first `skip` (at least one), by the calls it makes."""
    ends = []

    def tick(_: int) -> None:
        if device().type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        update(1)

    loop(tick)
    return [end - start for start, end in pairwise(ends[skip - 1 :])]


def _median(runs: list[list[float]]) -> float:
    return statistics.median(seconds for run in runs for seconds in run)


def speedup(slow: list[list[float]], fast: list[list[float]]) -> float:
    """How many times the seconds of `fast` those of `slow` are: median over neighbouring runs."""
    pairs = zip(slow, fast, strict=True)
    return statistics.median(statistics.median(one) / statistics.median(other) for one, other in pairs)


def peak_gflops(precision: str) -> list[float]:
    """GFLOP/s of the product of two square matrices, a few times."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    rng = make_rng(0, "bench", "peak")
    one, other, made = (torch.randn(SIDE, SIDE, generator=rng).to(device(), kind) for _ in range(3))
    each = 20 if device().type == "cuda" else 1  # enough work that waiting for its end costs little

    def loop(tick: Callable[[int], object]) -> None:
        for step in range(4):
            for _ in range(each):
                torch.mm(one, other, out=made)
            tick(step)

    return [2 * SIDE**3 * each / seconds / 1e9 for seconds in stopwatch(loop, 1, lambda _: None)]


def peak_memory_mb() -> float | None:
    """Most memory so far, MB: of this process; on CUDA, allocated there. None where that is not known."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, elsewhere KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# The plain loop: no part of the package, but a file of the checkout.


def plain_loop() -> ModuleType:
    """benchmarks/plain_loop.py as a module."""
    path = home() / PLAIN
    if not path.is_file():
        raise BadInput(f"against='plain' needs a checkout of the repository: {PLAIN} is not there")
    spec = importlib.util.spec_from_file_location("plain_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def check_plain(plain: ModuleType, vit: VisionTransformer, model: str) -> None:
    """BadInput where the plain loop, which knows plain blocks alone, computes other logits than timm."""
    images = torch.randn((2, *PatchGrid.of(vit).image), generator=make_rng(0, "bench")).to(device())
    places = torch.arange(vit.patch_embed.num_patches, device=device()).repeat(2, 1)
    try:
        found = plain.forward(vit, images, places)[0]
    except (RuntimeError, AttributeError):
        found = None
    if found is None or not torch.allclose(found, image_logits(vit, images), rtol=1e-2, atol=1e-3):
        raise BadInput(f"against='plain' knows Vision Transformers of the plain kind alone, not {model!r}")


def ratios_rounded_down(count: int, ratios: Sequence[float]) -> tuple[float, ...]:
    """Ratios with which a loop that rounds down keeps as many of `count` patches as ours at its stops."""
    left = [remaining(count, ratios[:stop]) for stop in range(len(ratios) + 1)]
    return tuple(1 - (after + 0.5) / before for before, after in pairwise(left))


@contextmanager
def fixed_randomness() -> Iterator[None]:
    """Python's and torch's random states are seeded, and put back after."""
    before = random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(before)
