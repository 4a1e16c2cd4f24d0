"""Commands that run methods: `run | compare | sweep | reproduce`."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from ..core.errors import BadInput
from ..methods import METHODS, find
from ..settings import Settings
from .options import (
    HINT,
    jobs_option,
    main,
    profile_option,
    read_overrides,
    read_settings,
    settings_options,
    store_option,
)


@main.command(epilog=HINT)
@click.option("--method", required=True, metavar="M", help=", ".join(METHODS))
@click.option("--seed", metavar="S", help="Fixes everything random.")
@click.option("--json", "as_json", is_flag=True, help="Last line of stdout: the result as one JSON object.")
@click.option(
    "--dry-run", is_flag=True, help="Print the plan (stages, operations, memory, bytes); run nothing."
)
@settings_options
def run(method, profile, task, model, clients, alpha, seed, assignments, store, as_json, dry_run) -> None:
    """Run one method once."""
    find(method)
    named = {"task": task, "model": model, "clients": clients, "alpha": alpha, "seed": seed}
    settings = read_settings(method, profile, assignments, **named)
    if dry_run:
        tell_plan(method, settings, as_json)
        return
    from ..experiments.run import run as run_one

    result = run_one(method, settings, store)
    if as_json:
        click.echo(result.model_dump_json())
        return
    click.echo(
        f"{method} on {result.task}, {result.clients} clients, seed {result.seed}: {result.accuracy:.3f}"
    )
    references = {
        "ensemble": result.ensemble_accuracy,
        "one-shot FedAvg": result.fedavg_accuracy,
        "best client alone": result.best_local_accuracy,
    }
    if told := " · ".join(f"{name} {value:.3f}" for name, value in references.items() if value is not None):
        click.echo(f"  {told}")
    click.echo(f"  uplink {result.upload_bytes / 1e6:.2f} MB · seconds {result.seconds}")
    if result.epsilon is not None:
        click.echo(f"  privacy of a client's upload: ε = {result.epsilon:.3f} at δ = {result.delta:g}")


def tell_plan(method: str, settings: Settings, as_json: bool) -> None:
    """Print what a run would do, computed from shapes: nothing is loaded, downloaded or trained."""
    from ..evaluation.plan import plan, plan_table

    stages = plan(method, settings)
    if as_json:
        click.echo(json.dumps([asdict(stage) for stage in stages]))
        return
    click.echo(plan_table(stages).to_string())
    click.echo("Computed, not measured: operations of the models alone; memory in float32.")


@main.command(epilog=HINT)
@click.option("--methods", default=",".join(METHODS), show_default=True, help="Comma-separated.")
@click.option("--seeds", default="0-4", show_default=True, help="Such as 0-4 or 1,3,5.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV with one row per run.")
@click.option("--json", "as_json", is_flag=True, help="Last line of stdout: the table as one JSON object.")
@settings_options
def compare(methods, seeds, profile, task, model, clients, alpha, assignments, store, out, as_json) -> None:
    """Run several methods on the same clients, seeds and skews."""
    chosen = [m.strip() for m in methods.split(",")]
    for name in chosen:
        find(name)
    from ..experiments.compare import parse_seeds, run_all, writer
    from ..experiments.differences import summarise, summarise_skews

    named = {"task": task, "model": model, "clients": clients}
    pairs = [
        (method, read_settings(method, profile, assignments, **named, alpha=each, seed=str(seed)))
        for each in (alpha.split(",") if alpha else [None])
        for seed in parse_seeds(seeds)
        for method in chosen
    ]
    runs = run_all(pairs, store, writer(out) if out else None)
    table = summarise(runs) if runs["alpha"].nunique() == 1 else summarise_skews(runs)
    click.echo(table.to_string(float_format="{:.3f}".format))
    if as_json:
        tell_tables(table, runs)


def tell_tables(summary, runs) -> None:
    """Print a summary and its runs as one JSON object; NaN, which JSON lacks, becomes null."""
    summary = summary.astype(object).where(summary.notna(), None).reset_index()
    click.echo(json.dumps({"summary": summary.to_dict("records"), "runs": runs.to_dict("records")}))


@main.command(epilog=HINT)
@click.option("--method", default="fedmitr", show_default=True, metavar="M", help=", ".join(METHODS))
@click.option("--seeds", default="0-4", show_default=True, help="Such as 0-4 or 1,3,5.")
@click.option("--grid", multiple=True, metavar="KEY=V1,V2", help="Repeatable: all combinations are run.")
@click.option(
    "--cells", type=click.Path(path_type=Path), help="YAML of panel: {cell: {setting: value}}, instead."
)
@click.option("--panel", "panels", multiple=True, help="Only this panel of --cells; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV with one row per run.")
@click.option("--json", "as_json", is_flag=True, help="Last line of stdout: the table as one JSON object.")
@settings_options
def sweep(
    method, seeds, grid, cells, panels, profile, task, model, clients, alpha, assignments, store, out, as_json
) -> None:
    """Run one method over a grid of settings, several seeds each."""
    find(method)
    if bool(grid) == bool(cells):
        raise BadInput("give either --grid KEY=V1,V2 (repeatable) or --cells FILE")
    if panels and not cells:
        raise BadInput("--panel needs --cells FILE, whose panels it names")
    from ..experiments.compare import parse_seeds
    from ..experiments.sweep import choose, grid_cells, read_cells, summarise_cells
    from ..experiments.sweep import sweep as sweep_all

    chosen = grid_cells(grid) if grid else choose(read_cells(cells), panels)
    overrides = read_overrides(assignments, task=task, model=model, clients=clients, alpha=alpha)
    table = sweep_all(chosen, parse_seeds(seeds), method, profile, overrides, store, out)
    summary = summarise_cells(table)
    click.echo(summary.to_string(float_format="{:.3f}".format))
    if as_json:
        tell_tables(summary, table)


@main.command()
@profile_option
@click.option("--only", help="Numbers of the notebooks to run, such as 03,04.")
@click.option("--seed", type=click.IntRange(0), metavar="S", help="Default: each notebook's own, 0.")
@store_option
@jobs_option
def reproduce(profile, only, seed, store) -> None:
    """Run the notebooks, into reproduced/PROFILE, and compare their numbers with the stored ones."""
    from papermill.exceptions import PapermillExecutionError

    from ..experiments.reproduce import reproduce as reproduce_all

    try:
        click.echo(reproduce_all(profile, only, store, seed))
    except PapermillExecutionError as error:
        raise click.ClickException(
            f"a notebook stopped at cell {error.exec_count}: {error.ename}: {error.evalue}"
        ) from None
