"""What differential privacy costs: accuracy of methods against ε, at one δ.

    python -m fedmitr.privacy.cost

writes results/dp.csv: a row for each start, method, ε and seed. ε is that of one upload, whatever it carries:
a client that sends weights and sums has less of it for each. An empty ε is no protection. Images are those of
test, of seeds on which no setting was chosen. All settings but those of privacy are those of plain runs; how
the noise is shared between sums was chosen on validation images of other seeds. Everything is kept in the
store, so that the same command goes on where it was stopped.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import pandas as pd

from ..core.errors import BadInput
from ..core.paths import default_store, home
from ..core.processes import parallel
from ..core.progress import progress
from ..core.store import Store, check_output, write_csv
from ..experiments.compare import Pair, check_all, parse_seeds, train_clients
from ..experiments.run import Experiment
from ..methods import find
from ..settings import Settings, parse_assignment
from ..upload import Noise
from ..upload.privacy import epsilon, noise_multiplier

EPSILONS = (1.0, 3.0, 10.0, 30.0)
DELTA = 1e-5
METHODS = ("ridge", "ridge_plus", "fedavg", "fedmitr", "fedmitr_plus")
STARTS = ("vit_micro",)
COLUMNS = ("start", "method", "epsilon", "spent", "delta", "seed", "accuracy")


def protection(method: str, settings: Settings, target: float | None, delta: float = DELTA) -> dict[str, Any]:
    """Return the dotted settings that protect what a method's clients send at ε = target; None: nothing.

    A client that sends weights and sums has half of the budget for each, in the sense of Rényi divergence:
    two Gaussian releases with √2 times the noise of one are worth that one (`half_of`). Where the settings
    need class histograms, which only noisy sums replace, clients weigh by n_k instead.
    """
    record = find(method)
    if target is None:
        return {}
    parts = {"client": record.needs_weights, "statistics": record.needs_statistics_under(settings)}
    parts = [block for block, sent in parts.items() if sent]
    each = target if len(parts) == 1 else half_of(target, delta)
    values = {"dp_epsilon": each, "dp_delta": delta}
    found: dict[str, Any] = {f"{block}.{name}": value for block in parts for name, value in values.items()}
    if record.needs_weights and settings.uses_counts:  # no noise protects a histogram without sums
        found |= {"ensemble.mode": "size", "inversion.teacher": "ensemble"}
    return found


def half_of(target: float, delta: float) -> float:
    """Return the ε of one of two Gaussian releases that have ε = target together, at the same δ."""
    both = noise_multiplier("epsilon", target, delta)
    return epsilon([Noise(clip=1.0, multiplier=both * math.sqrt(2))], delta)


def cost(
    overrides: Mapping[str, Any] | None = None,
    profile: str = "laptop",
    methods: Sequence[str] = METHODS,
    epsilons: Sequence[float] = EPSILONS,
    starts: Sequence[str] = STARTS,
    seeds: Sequence[int] = range(10, 15),
    store: Path | str | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """Return one row for each start, method, ε and seed, without protection first.

    spent is the ε that the accountant finds for the noise of the client that has spent most; for weights and
    sums together it is near `epsilon`. overrides: of all runs. Rewrites the CSV `out` after every run. Raises
    BadInput, before any work, for a method or a setting that cannot work.
    """
    if out:
        check_output(out, f"out={str(out)!r}")
    grid = [
        (start, method, target, seed)
        for start in starts
        for seed in seeds
        for method in methods
        for target in (None, *epsilons)
    ]
    pairs = [pair_of(profile, dict(overrides or {}), *one) for one in grid]
    kept = Store(store or default_store())
    train_clients(check_all(pairs, kept), kept)
    rows: dict[int, dict[str, Any]] = {}
    with progress(len(pairs), "runs", "run") as bar:
        for index, found in parallel(partial(_row, kept), pairs):
            start, method, target, seed = grid[index]
            who = {"start": start, "method": method, "epsilon": target, "delta": DELTA, "seed": seed}
            rows[index] = who | found
            bar.update(1)
            if out:
                write_csv(_table(rows), out, digits=6)
    return _table(rows)


def pair_of(
    profile: str, overrides: Mapping[str, Any], start: str, method: str, target: float | None, seed: int
) -> Pair:
    """Return a method with its settings at an ε, on a seed, from a start."""
    own = {**overrides, "model.name": start, "seed": seed}
    plain = Settings.load(profile, own, method)
    return method, plain.changed(protection(method, plain, target))


def _row(store: Store, pair: Pair) -> dict[str, Any]:
    method, settings = pair
    result = Experiment(settings, store).result(method)
    return {"spent": result.epsilon, "accuracy": result.accuracy}


def _table(rows: Mapping[int, dict[str, Any]]) -> pd.DataFrame:
    """Return the rows of what is finished as a table, in the order of the grid."""
    return pd.DataFrame([rows[index] for index in sorted(rows)], columns=list(COLUMNS))


def parse_epsilons(text: str) -> list[float]:
    """Return the numbers of `1,10`; BadInput for anything else."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < one < math.inf for one in found):
        raise BadInput(f"epsilons={text!r} cannot be read: allowed are numbers above 0, such as 1,10")
    return list(dict.fromkeys(found))


@click.command()
@click.option("--methods", default=",".join(METHODS), show_default=True, help="Comma-separated.")
@click.option("--epsilons", default=",".join(f"{e:g}" for e in EPSILONS), show_default=True)
@click.option("--starts", default=",".join(STARTS), show_default=True, help="Values of model.name.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting; repeatable.")
@click.option("--seeds", default="10-14", show_default=True, help="Such as 0-4 or 1,3,5.")
@click.option("--profile", default="laptop", show_default=True)
@click.option("--store", type=click.Path(path_type=Path), help="Folder of artefacts; default data/store.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="CSV with one row per run; default results/dp.csv."
)
def main(
    methods: str,
    epsilons: str,
    starts: str,
    assignments: Sequence[str],
    seeds: str,
    profile: str,
    store: Path | None,
    out: Path | None,
) -> None:
    """Measure accuracy against ε, and write a row for each run."""
    names, begins = ([one.strip() for one in text.split(",")] for text in (methods, starts))
    try:
        table = cost(
            dict(map(parse_assignment, assignments)),
            profile,
            names,
            parse_epsilons(epsilons),
            begins,
            parse_seeds(seeds),
            store,
            out or home() / "results" / "dp.csv",
        )
    except BadInput as error:
        raise click.ClickException(str(error)) from None
    table = table.assign(epsilon=table["epsilon"].fillna(math.inf))
    means = table.pivot_table(index=["start", "method"], columns="epsilon", values="accuracy", sort=False)
    click.echo(means.to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
