"""The measurements of notebook 07: results/theory.csv and results/theory_inversion.csv.

    python -m fedmitr.theory.experiment

From both starts and on five seeds, FedMITR's student is trained on {sparse, dense} inversion × {distillation
alone, pseudo-label tokens, relabel}, once by plain SGD, which the theorems are about, and once by the
package's AdamW. Beside SGD's students train others on sets in which one image is another. Dense inversion has
no stopped patches: what is relabelled there are as many patches as a sparse one would stop, those that CLS
attends to least in the finished image.

What is measured is reduced to a time of about an hour and a half on two cores: students take `STEPS` steps,
and are measured at the shares `SHARES` of them. A gradient's variance is that of `SAMPLES` views drawn at
random, with its standard error beside it. Patch gradients are those of `WATCHED` images.

Every trajectory is kept in the store, so the same command goes on where it was stopped.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import pandas as pd
import torch

from ..core.errors import BadInput
from ..core.machine import device
from ..core.paths import default_store, home
from ..core.processes import parallel
from ..core.progress import progress
from ..core.rng import derive_seed
from ..core.store import Store, check_output, fingerprint, write_csv, write_json
from ..evaluation.metrics import accuracy
from ..experiments.compare import check_all, parse_seeds, train_clients
from ..experiments.run import Experiment
from ..methods._start import build_ensemble
from ..methods._student import student_start
from ..methods.fedmitr import inversion_keys, synthetic_set
from ..server.ensemble import held_classes
from ..server.inversion import invert
from ..server.synthetic import label_batches
from ..settings import Settings, parse_assignment
from ..upload import Upload
from ..vision.vit import weights_digest
from .patches import PatchGradients
from .stability import curvature
from .students import RATE, SAMPLES, Material, loss_of, masked, measure, prepare, students, subset

STARTS = ("vit_micro_early", "vit_micro")
INVERSIONS = ("sparse", "dense")
LABELS = {"distillation": "none", "pseudo-label tokens": "pseudo", "relabel": "relabel"}  # relabel.mode
OPTIMIZERS = ("sgd", "adamw")
STEPS = 160  # of a student, at most
SHARES = (0, 1 / 16, 1 / 4, 1 / 2, 1)  # of the student's steps: when it is measured
REPLACED = 2  # images that are replaced, each in a set of its own; SGD's students alone have such twins
HELD_OUT = 100  # synthetic images that the student does not see, beside those that replace one
WATCHED = 64  # images whose gradient is followed through the inversion
# As in the protocol's panel of FedMITR's components; float32, so that small distances are no rounding.
SHARED = {"inversion.mask": "survivors", "relabel.head": "shared", "distill.precision": "fp32"}
NO_STOPS = {"inversion.stop_at": [], "inversion.stop_ratio": []}
FORMAT = 2  # raised when the same settings are measured otherwise
WHERE = ("start", "seed", "inversion", "labels", "images", "optimizer", "step")
MEASURED = (
    "rate",  # of SGD
    "variance",  # of the gradient over samples; its parts are from_images and from_labels
    "variance_error",  # its standard error over the samples
    "from_images",
    "from_labels",
    "signal",  # ‖E g‖²
    "curvature",  # β, of SGD's student
    "distance",  # ‖θ − θ'‖, mean over the images that are replaced; of SGD's students, as the next two
    "loss_distance",  # |ℓ(θ; ξ) − ℓ(θ'; ξ)|, mean over held-out images ξ
    "loss_distance_max",  # its largest value over them
    "train",  # the student's own loss
    "held_out",
    "train_kd",  # the loss of distillation alone, the same for all labels of tokens
    "held_out_kd",
    "test_kd",
    "accuracy",  # on test images
)
COLUMNS = (*WHERE, *MEASURED)
PATCH_COLUMNS = ("start", "seed", "inversion", "iteration", "patches", "count", "norm", "agreement")


class Cell(NamedTuple):
    """What a student is trained on, and how; images: all of them divided by this number."""

    inversion: str
    labels: str
    optimizer: str
    divided: int = 1


CELLS = [Cell(*cell) for cell in product(INVERSIONS, LABELS, OPTIMIZERS)]
CELLS.append(Cell("sparse", "relabel", "sgd", divided=4))  # the bound is of order 1/n


def theory(
    overrides: Mapping[str, Any] | None = None,
    profile: str = "laptop",
    starts: Sequence[str] = STARTS,
    seeds: Sequence[int] = range(5),
    cells: Sequence[Cell] = CELLS,
    store: Path | str | None = None,
    out: Path | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of students, `COLUMNS`, and that of inversions, `PATCH_COLUMNS`.

    overrides: of all settings but the start and the seed; FedMITR has the values that were tuned for it. The
    CSV `out`, and `inversion_file(out)` beside it, are rewritten whenever a student or an inversion is done.
    Raises BadInput, before any work, for settings that cannot work.
    """
    if out:
        check_output(out, f"out={str(out)!r}")
    kept = Store(store or default_store())
    grid = [settings_of(start, seed, profile, overrides) for start in starts for seed in seeds]
    train_clients(check_all([("fedmitr", s) for s in grid], kept), kept)
    students = list(product(grid, _with_one_pool(cells)))
    found: dict[str, dict[int, list[dict[str, Any]]]] = {"inversions": {}, "students": {}}
    with progress(len(grid) + len(students), "theory", "part") as bar:
        for stage, work, items, columns in (
            ("inversions", _patch_rows, grid, PATCH_COLUMNS),
            ("students", _student_rows, students, COLUMNS),
        ):
            for index, rows in parallel(partial(work, kept), items):
                found[stage][index] = rows
                bar.update(1)
                if out:
                    file = out if stage == "students" else inversion_file(out)
                    write_csv(_table(found[stage], columns), file, digits=8)
    return _table(found["students"], COLUMNS), _table(found["inversions"], PATCH_COLUMNS)


def settings_of(
    start: str | None, seed: int, profile: str = "laptop", overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Return the settings of a start, None for the profile's, and a seed; of `STEPS` steps at most.

    Steps in `overrides` are taken as they are. Raises BadInput for settings under which nothing can be
    measured.
    """
    own = {**SHARED, **(overrides or {}), "seed": seed}
    own |= {"model.name": start} if start else {}
    s = Settings.load(profile, own, "fedmitr")
    if not s.distill.views:
        raise BadInput("distill.views=0 cannot be measured: allowed are 1 and more, the views of a sample")
    if not s.inversion.stop_at:
        raise BadInput("inversion.stop_at=[] cannot be compared with dense inversion: allowed are some stops")
    for name in ("ce_weight", "calibrate"):
        if value := getattr(s.distill, name):
            raise BadInput(f"distill.{name}={value} is no part of FedMITR's loss: allowed is 0")
    steps = own.get("distill.steps", min(s.distill.steps, STEPS))
    return s.changed({"distill.steps": steps})


def inversion_file(out: Path) -> Path:
    """Return the path of the table of inversions, beside that of students."""
    return out.with_name(f"{out.stem}_inversion{out.suffix}")


def _table(rows: Mapping[int, list[dict[str, Any]]], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame([row for index in sorted(rows) for row in rows[index]], columns=list(columns))


def _stored(store: Store, stage: str, key: str, make: Any) -> list[dict[str, Any]]:
    """Return rows from the store, or make and keep them."""
    file = "rows.json"
    return store.get(
        stage,
        key,
        read=lambda folder: json.loads((folder / file).read_text()),
        make=make,
        write=lambda rows, folder: write_json(folder / file, rows),
    )


# The inversion's gradient.


def inverted_as(settings: Settings, inversion: str) -> Settings:
    """Return the settings of sparse or of dense inversion, with as many iterations."""
    return settings.changed(NO_STOPS) if inversion == "dense" else settings


def _patch_rows(store: Store, settings: Settings) -> list[dict[str, Any]]:
    """Return the rows of both inversions of a start and seed; their images are then in the store, too."""
    uploads = Experiment(settings, store).uploads_for("fedmitr")
    for inversion in INVERSIONS:
        under = inverted_as(settings, inversion)
        for one in (under, held_out_settings(under)):
            synthetic_set(uploads, one, store)
    key = fingerprint("theory_inversion", FORMAT, WATCHED, inversion_keys(uploads, settings)[0])
    rows = _stored(store, "theory_inversion", key, lambda: patch_rows(uploads, settings))
    return [{"start": settings.model.name, "seed": settings.seed} | row for row in rows]


def patch_rows(uploads: Sequence[Upload], settings: Settings) -> list[dict[str, Any]]:
    """Invert `WATCHED` images sparsely and densely; return the curves of their gradient by patch.

    Both inversions have the same labels and noise, so they are the same until the first stop. Which patches
    survive is decided by the sparse one.
    """
    count = min(WATCHED, settings.inversion.images)
    few = settings.changed({"inversion.images": count, "inversion.batch_size": count})
    ensemble, seed = build_ensemble(uploads, few), derive_seed(few.seed, "batch", 0)
    labels = label_batches(few.inversion, held_classes(uploads), few.seed)[0].to(device())
    watched = {name: PatchGradients() for name in INVERSIONS}
    for name, watch in watched.items():
        invert(ensemble, labels, inverted_as(few, name).inversion, seed, recorded=0, watch=watch)
    survivors = ~watched["sparse"].norms[-1].isnan()  # (B, N)
    return [{"inversion": name} | row for name, watch in watched.items() for row in watch.curves(survivors)]


# The students.


def held_out_settings(settings: Settings) -> Settings:
    """Return the settings under which images for the same clients are made from other noise and labels."""
    seed = derive_seed(settings.seed, "held out") % 2**32
    count = min(HELD_OUT, settings.inversion.images) + REPLACED
    return settings.changed({"seed": seed, "inversion.images": count, "inversion.batch_size": count})


def _with_one_pool(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group cells whose students learn from the same labelled images, which are then labelled once."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.inversion, cell.labels), []).append(cell)
    return list(groups.values())


def _student_rows(store: Store, item: tuple[Settings, Sequence[Cell]]) -> list[dict[str, Any]]:
    """Return the rows of cells that share their labelled images."""
    settings, cells = item
    experiment, found = Experiment(settings, store), []
    uploads = experiment.uploads_for("fedmitr")
    pool_of = cache(partial(material_of, experiment, uploads, *cells[0][:2]))  # by Cell.divided
    constants = [FORMAT, RATE, SHARES, REPLACED, SAMPLES, HELD_OUT]
    for cell in cells:
        made_by = [inversion_keys(uploads, inverted_as(settings, cell.inversion)), settings.model_dump()]
        key = fingerprint("theory", constants, made_by, weights_digest(settings.model), cell)
        rows = _stored(store, "theory", key, partial(student_rows, experiment, uploads, cell, pool_of))
        where = {"start": settings.model.name, "seed": settings.seed, "inversion": cell.inversion}
        where |= {"labels": cell.labels, "images": settings.inversion.images // cell.divided}
        found += [where | {"optimizer": cell.optimizer} | row for row in rows]
    return found


def material_of(
    experiment: Experiment, uploads: Sequence[Upload], inversion: str, labels: str, divided: int
) -> Material:
    """Label what the students of a cell learn from and are measured on."""
    settings = experiment.settings.changed({"relabel.mode": LABELS[labels]})
    ensemble, start = build_ensemble(uploads, settings), student_start(uploads, settings)
    under, test = inverted_as(settings, inversion), experiment.task.test
    sets = [synthetic_set(uploads, one, experiment.store) for one in (under, held_out_settings(under))]
    train, held = (masked(ensemble, one, settings) for one in sets)
    parts = (
        subset(train, torch.arange(len(train) // divided)),
        subset(held, torch.arange(REPLACED)),
        subset(held, torch.arange(REPLACED, len(held))),
    )
    return prepare(start, ensemble, *parts, (test.images.to(device()), test.labels.to(device())), settings)


def student_rows(
    experiment: Experiment, uploads: Sequence[Upload], cell: Cell, pool_of: Callable[[int], Material]
) -> list[dict[str, Any]]:
    """Train a cell's students side by side and return a row for each step at which they are measured.

    pool_of: from `Cell.divided` to the material of the cell. SGD's student has twins, whose sets differ from
    its own in one image.
    """
    settings = experiment.settings.changed({"relabel.mode": LABELS[cell.labels]})
    start, material, sgd = student_start(uploads, settings), pool_of(cell.divided), cell.optimizer == "sgd"
    steps = sorted({round(share * settings.distill.steps) for share in SHARES})
    runs = [
        students(copy.deepcopy(start), pool, steps, settings, cell.optimizer)
        for pool in (material.pool, *(material.others if sgd else ()))
    ]
    rows = []
    for step, student, *others in zip(steps, *runs, strict=True):
        row = measure(student, others, material, settings.distill, settings.relabel)
        if sgd:
            part = tuple(column[: SAMPLES // 2] for column in material.pool)
            beta = curvature(student, loss_of(settings.distill, settings.relabel), part, seed=settings.seed)
            row |= {"rate": RATE, "curvature": beta}
        rows.append({"step": step, **row, "accuracy": accuracy(student, experiment.task.test)})
    return rows


@click.command()
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting; repeatable.")
@click.option("--seeds", default="0-4", show_default=True, help="Such as 0-4 or 1,3,5.")
@click.option("--profile", default="laptop", show_default=True)
@click.option("--store", type=click.Path(path_type=Path), help="Folder of artefacts; default data/store.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV; default results/theory.csv.")
def main(assignments: Sequence[str], seeds: str, profile: str, store: Path | None, out: Path | None) -> None:
    """Measure what the theory claims, and write a row for each student and step."""
    if not out and (assignments or (seeds, profile) != ("0-4", "laptop")):
        raise click.ClickException(
            "results/theory.csv has seeds 0-4 of the laptop profile: give another --out"
        )
    try:
        overrides = dict(map(parse_assignment, assignments))
        out = out or home() / "results" / "theory.csv"
        theory(overrides, profile, seeds=parse_seeds(seeds), store=store, out=out)
    except BadInput as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}, {inversion_file(out)}")


if __name__ == "__main__":
    main()
