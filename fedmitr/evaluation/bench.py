"""How fast inversion runs here: seconds, FLOP/s, and how much of the operations that it saves is time saved.

`invert` itself is measured, with teachers of random weights. Dense runs, sparse runs and the matrix products
that show the machine's peak alternate, so that a machine that slows down slows all of them.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import torch
from pydantic import BaseModel
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.errors import BadInput
from ..core.machine import describe, device, native_bf16
from ..core.progress import progress
from ..core.rng import make_rng
from ..server.ensemble import Ensemble
from ..server.inversion import invert, remaining
from ..settings.schema import EnsembleSettings, InversionSettings
from ..upload import ModelShape, Upload
from ..vision.patches import PatchGrid
from ..vision.vit import create_vit
from .flops import image_flops
from .plain import check_plain, load_plain_loop, run_plain
from .timing import Tick, median, peak_gflops, peak_memory_mb, speedup, stopwatch, torch_threads

STOPS = (1, 2, 3, 4)  # the published ones, early: what is measured comes after the last
RATIOS = (0.3, 0.3, 0.3, 0.3)
TV = 1e-4
WARM = 2  # iterations after the last stop that are not measured
ROUNDS = 3
CLASSES = 10


class Speed(BaseModel):
    """The speed of one kind of iteration, dense or sparse.

    share_of_peak: gflops over the report's peak_gflops.
    """

    seconds_per_iteration: float
    images_per_minute: float
    flops_per_iteration: int
    gflops: float
    share_of_peak: float


class Report(BaseModel):
    """The report of `fedmitr bench inversion`; seconds are medians, those of the plain loop None without it.

    ratio: dense over sparse seconds. flop_ratio: dense over sparse floating-point operations, the most that
    ratio could be. ratio_of_ceiling: ratio over flop_ratio. speedup_dense, speedup_sparse: the plain loop's
    seconds over ours. peak_memory_mb: on CUDA what a dense inversion allocates at most, elsewhere the peak
    resident set of the whole process after it.
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
        """Return the name and the value, as text, of everything that is not None."""
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
    """Measure inversion of one batch by an ensemble of teachers with random weights.

    image_size: in pixels, default the model's. threads: of torch, default its own number. iterations: how
    many of each run are measured. against: "plain" also measures benchmarks/plain_loop.py, in float32.
    Raises BadInput for several clients, or a model of another kind, against the plain loop.
    """
    if against and clients > 1:
        raise BadInput(f"against={against!r} knows a single teacher: allowed is clients=1, not {clients}")
    plain = load_plain_loop() if against else None
    precision = ("bf16" if native_bf16() else "fp32") if precision == "auto" else precision
    uploads = random_uploads(model, image_size, clients)
    ensemble = Ensemble(uploads, EnsembleSettings(mode="mean_logits", precision=precision)).to(device())
    vit = uploads[0].vit().to(device())  # what the plain loop gets, in float32 whatever the ensemble holds
    if plain:
        check_plain(plain, vit, model)
    with torch_threads(threads):
        return _Bench(ensemble, vit, batch, iterations, plain).report(model)


def random_uploads(model: str, image_size: int | None, clients: int) -> list[Upload]:
    """Return the uploads of so many clients, each with other random weights."""
    vit = create_vit(model, CLASSES, image_size=image_size)
    shape = ModelShape.of(model, vit)
    uploads = []
    for client in range(clients):
        rng = make_rng(0, "bench", client)
        weights = {k: v + 0.02 * torch.randn(v.shape, generator=rng) for k, v in vit.state_dict().items()}
        uploads.append(Upload(client, 1, shape, weights))
    return uploads


@dataclass(frozen=True)
class _Bench:
    """One batch, and the loops that invert it: ours and, where it is given, the plain one."""

    ensemble: Ensemble
    vit: VisionTransformer
    batch: int
    iterations: int
    plain: ModuleType | None

    def report(self, model: str) -> Report:
        """Measure both kinds of iteration and put their numbers together."""
        grid = PatchGrid.of(self.ensemble.members[0])
        patches = {"dense": grid.patches, "sparse": remaining(grid.patches, RATIOS)}
        flops = {kind: self.batch * image_flops(self.ensemble, left) for kind, left in patches.items()}
        seconds, peak, memory = self._measure()
        speed = {kind: self._speed(median(seconds["ours", kind]), flops[kind], peak) for kind in patches}
        ratio = speed["dense"].seconds_per_iteration / speed["sparse"].seconds_per_iteration
        flop_ratio = flops["dense"] / flops["sparse"]
        against = {}
        for kind in patches if self.plain else ():
            plain = seconds["plain", kind]
            against[f"plain_{kind}_seconds_per_iteration"] = median(plain)
            against[f"speedup_{kind}"] = speedup(plain, seconds["ours", kind])
        return Report(
            model=model,
            image_size=grid.size[0],
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
        """Return seconds, peak GFLOP/s and memory in MB.

        The seconds are of each iteration, one list a run, under ("ours" or "plain", "dense" or "sparse").
        """
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
        """Count the iterations of a run before those that are measured."""
        return 1 + max(stops, default=0) + WARM

    def _length(self, stops: Sequence[int]) -> int:
        return self._skip(stops) + self.iterations

    def _labels(self) -> Tensor:
        return (torch.arange(self.batch) % CLASSES).to(device())

    def _ours(self, stops: Sequence[int], tick: Tick) -> None:
        settings = InversionSettings(
            iterations=self._length(stops),
            stop_at=stops,
            stop_ratio=RATIOS[: len(stops)],
            teacher="ensemble",
            augment=0.0,
            tv=TV,
            tv_norm="norms",
            clip=True,
            jitter=1 / 8,
            flip=True,
            keep_best=True,
        )
        invert(self.ensemble, self._labels(), settings, 0, recorded=0, progress=tick)

    def _plain(self, stops: Sequence[int], tick: Tick) -> None:
        ratios = RATIOS[: len(stops)]
        run_plain(self.plain, self.vit, self._labels(), self._length(stops), stops, ratios, tv=TV, tick=tick)

    def _speed(self, seconds: float, flops: int, peak: float) -> Speed:
        gflops = flops / seconds / 1e9
        return Speed(
            seconds_per_iteration=seconds,
            images_per_minute=60 * self.batch / (seconds * InversionSettings().iterations),
            flops_per_iteration=flops,
            gflops=gflops,
            share_of_peak=gflops / peak,
        )
