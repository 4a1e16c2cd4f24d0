"""How much the start decides: methods against how long the shared model was pretrained on letters.

    python -m fedmitr.experiments.transfer

writes results/transfer.csv: the accuracy of every number of pretraining steps, method and seed. Other lengths
and settings, to try on the same images: --lengths and --set, which print the means alone.

The same clients start from a ViT-Micro that saw letters for fewer and fewer steps, down to none, so that its
features transfer less and less. It is a study of the ground, not of who wins: seeds are those of tuning, and
images those of validation.

The starts that ship are taken as they are; the others are pretrained once and kept in the store, as every
accuracy is, so that the same command goes on where it was stopped.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch

from ..core.errors import BadInput
from ..core.paths import default_store, home
from ..core.processes import parallel
from ..core.progress import progress
from ..core.store import Store, check_output, fingerprint, write_csv, write_tensors
from ..data.letters import LETTERS
from ..settings import Settings, parse_assignment
from ..vision.vit import MICROS, VIT_MICRO, create_vit
from .compare import Pair, check_all, parse_seeds
from .pretrain import BATCH, LR, SEED, STEPS, pretrain
from .run import Experiment

LENGTHS = (0, 100, 200, 400, 1000, 3600)  # pretraining steps
METHODS = (
    "ridge",
    "ridge_plus",
    "ensemble",
    "ensemble_statistics",
    "fedavg",
    "fedmitr",
    "fedmitr_plus",
    "central",
)
COLUMNS = ("steps", "seed", "method", "accuracy")
EARLY = "vit_micro_early"
# The models that ship in this shape, by their number of steps.
SHIPPED = {STEPS[name]: name for name, shape in MICROS.items() if shape == VIT_MICRO}


def transfer(
    overrides: Mapping[str, Any] | None = None,
    profile: str = "laptop",
    lengths: Sequence[int] = LENGTHS,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = range(5),
    store: Path | str | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """Return one row for each number of pretraining steps, seed and method, with its validation accuracy.

    profile, overrides: of all runs, but for their start and their seed. A method has the values that were
    tuned for it from a start that ships, and at other lengths those from the early one. Rewrites the CSV
    `out` whenever all methods of a length and a seed are done. Raises BadInput, before any work, for a method
    or a setting that cannot work.
    """
    if out:
        check_output(out, f"out={str(out)!r}")
    kept = Store(store or default_store())

    def pairs(start: Mapping[str, Any], seed: int) -> list[Pair]:
        """Return every method with its settings from a start, on a seed."""
        own = {**(overrides or {}), **start, "seed": seed}
        return [(method, Settings.load(profile, own, method)) for method in methods]

    check_all([pair for seed in seeds for pair in pairs({}, seed)], kept)
    threads = Settings.load(profile, overrides).threads
    longest_first = sorted(lengths, reverse=True)
    grid = [(steps, seed) for steps in lengths for seed in seeds]
    starts: dict[int, dict[str, str]] = {}
    rows: dict[int, list[dict[str, Any]]] = {}
    with progress(len(lengths) + len(grid), "starts and seeds", "part") as bar:
        for index, start in parallel(partial(_start, kept, threads), longest_first):
            starts[longest_first[index]] = start
            bar.update(1)
        runs = [pairs(starts[steps], seed) for steps, seed in grid]
        for index, scores in parallel(partial(_accuracies, kept), runs):
            rows[index] = [dict(zip(COLUMNS, (*grid[index], *score), strict=True)) for score in scores]
            bar.update(1)
            if out:
                write_csv(_table(rows), out, digits=6)
    return _table(rows)


def _table(rows: Mapping[int, list[dict[str, Any]]]) -> pd.DataFrame:
    """Return the rows of what is finished as a table, in the order of the grid."""
    return pd.DataFrame([row for index in sorted(rows) for row in rows[index]], columns=list(COLUMNS))


def _start(store: Store, threads: int, steps: int) -> dict[str, str]:
    """Return the settings of the start after so many steps on letters: one that ships, or one in the store.

    What neither has is trained now. No step: the weights that training on letters begins with.
    """
    if steps in SHIPPED:
        return {"model.name": SHIPPED[steps]}
    torch.set_num_threads(threads)
    key = fingerprint("letters", VIT_MICRO, steps, BATCH, LR, SEED)
    weights = store.path("letters", key) / "weights.safetensors"
    if not store.has("letters", key):
        model = pretrain("vit_micro", steps) if steps else create_vit("vit_micro", len(LETTERS))
        store.put("letters", key, lambda folder: write_tensors(model.state_dict(), folder / weights.name))
    return {"model.name": EARLY, "model.checkpoint": str(weights)}


def _accuracies(store: Store, pairs: Sequence[Pair]) -> list[tuple[str, float]]:
    """Return every method with its validation accuracy under its settings."""
    return [(method, Experiment(settings, store).validation_accuracy(method)) for method, settings in pairs]


def parse_lengths(text: str) -> list[int]:
    """Return the numbers of `400,3600`; BadInput for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise BadInput(f"lengths={text!r} cannot be read: allowed are steps such as 400,3600")
    return list(dict.fromkeys(map(int, parts)))


@click.command()
@click.option("--methods", default=",".join(METHODS), show_default=True, help="Comma-separated.")
@click.option("--lengths", help=f"Pretraining steps; default {','.join(map(str, LENGTHS))}.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting; repeatable.")
@click.option("--seeds", default="0-4", show_default=True, help="Such as 0-4 or 1,3,5.")
@click.option("--profile", default="laptop", show_default=True)
@click.option("--store", type=click.Path(path_type=Path), help="Folder of artefacts; default data/store.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="CSV with one row per run; default results/transfer.csv, or none with --lengths or --set.",
)
def main(
    methods: str,
    lengths: str | None,
    assignments: Sequence[str],
    seeds: str,
    profile: str,
    store: Path | None,
    out: Path | None,
) -> None:
    """Measure how much the pretraining of the shared model decides, and write a row for each run."""
    chosen = [name.strip() for name in methods.split(",")]
    if not (out or lengths or assignments):
        out = home() / "results" / "transfer.csv"
    try:
        steps = parse_lengths(lengths) if lengths else LENGTHS
        overrides = dict(map(parse_assignment, assignments))
        table = transfer(overrides, profile, steps, chosen, parse_seeds(seeds), store, out)
    except BadInput as error:
        raise click.ClickException(str(error)) from None
    means = table.pivot_table(index="method", columns="steps", values="accuracy", sort=False)
    click.echo(means.to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
