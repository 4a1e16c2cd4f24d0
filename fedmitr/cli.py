"""The command line: `fedmitr info | methods | settings | run | compare | sweep | reproduce | bench`.

Progress goes to stderr. Bad input is one line on stderr and exit status 2, before any work.
"""

import json
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .core.errors import BadInput
from .methods import METHODS, Method, find
from .settings import PROFILES, Settings, fields, parse_assignment


def settings_page() -> str:
    """Return one line a setting: default, what is allowed, meaning, source."""
    lines = []
    for row in fields():
        limits = f" [{row['allowed']}]" if row["allowed"] else ""
        lines.append(f"{row['setting']} = {row['default']}{limits}: {row['meaning']} ({row['source']})")
    return "\n".join(lines)


HINT = "\b\nSettings for --set, with their defaults and where these are from:\n" + settings_page()


class OneLine(click.Group):
    """A group of commands whose bad input is one line on stderr and exit status 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command, and turn its errors into one line and an exit status."""
        try:
            return super().main(*args, **kwargs | {"standalone_mode": False})
        except BadInput as error:
            click.echo(f"fedmitr: {error}", err=True)
            sys.exit(2)
        except click.ClickException as error:
            click.echo(f"fedmitr: {error.format_message()}", err=True)
            sys.exit(error.exit_code)
        except BrokenProcessPool:
            click.echo(
                "fedmitr: a worker process was killed, perhaps for want of memory; "
                "the same command goes on where this one stopped (--jobs 1 needs least)",
                err=True,
            )
            sys.exit(1)
        except click.Abort:
            sys.exit(130)


@click.group(cls=OneLine)
@click.version_option(package_name="fedmitr")
def main() -> None:
    """One-shot federated learning with Vision Transformers: FedMITR, reproducible."""


def set_jobs(context: click.Context, option: click.Parameter, jobs: int | None) -> None:
    """Set FEDMITR_JOBS, which worker processes and notebooks read too."""
    if jobs is not None:
        os.environ["FEDMITR_JOBS"] = str(jobs)


jobs_option = click.option(
    "--jobs",
    type=click.IntRange(1),
    callback=set_jobs,
    expose_value=False,
    metavar="N",
    help="Processes; default one per core, up to 8, fewer where memory is short. Any number gives the same.",
)


def set_backend(context: click.Context, option: click.Parameter, value: str | None) -> None:
    """Set FEDMITR_BACKEND or FEDMITR_CLUSTER, which `core.processes` reads."""
    os.environ |= {f"FEDMITR_{option.name.upper()}": value} if value is not None else {}


backend_option = click.option(
    "--backend",
    type=click.Choice(["loky", "dask", "ray"]),
    callback=set_backend,
    expose_value=False,
    help="What starts the workers; default loky, processes here. All give the same results.",
)
cluster_option = click.option(
    "--cluster",
    callback=set_backend,
    expose_value=False,
    metavar="ADDRESS",
    help="A Dask or Ray cluster that runs already and reaches the store; else one is started here.",
)


def settings_options(command: click.Command) -> click.Command:
    """Add the options that say what is run, shared by `run`, `compare` (--alpha: several) and `sweep`."""
    options = [
        click.option("--profile", default="laptop", show_default=True, metavar="P", help=", ".join(PROFILES)),
        click.option("--task", metavar="T", help="task.name"),
        click.option("--model", metavar="M", help="model.name: the shared start, such as vit_micro_early"),
        click.option("--clients", metavar="K", help="partition.clients"),
        click.option("--alpha", metavar="A", help="partition.alpha; for compare A,B,… too"),
        click.option(
            "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting; repeatable."
        ),
        click.option(
            "--store", type=click.Path(path_type=Path), help="Folder of artefacts; default data/store."
        ),
        jobs_option,
        backend_option,
        cluster_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def read_overrides(assignments: tuple[str, ...], **named: str | None) -> dict[str, Any]:
    """Return dotted names with values of --set, then of the named options; BadInput for unreadable ones."""
    names = {"task": "task.name", "model": "model.name", "clients": "partition.clients"}
    names |= {"alpha": "partition.alpha", "seed": "seed"}
    return dict(map(parse_assignment, assignments)) | {names[n]: v for n, v in named.items() if v is not None}


def read_settings(profile: str, assignments: tuple[str, ...], **named: str | None) -> Settings:
    """Return a profile's settings with the overrides that `read_overrides` reads."""
    return Settings.load(profile, read_overrides(assignments, **named))


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
    settings = read_settings(profile, assignments, **named)
    if dry_run:
        tell_plan(method, settings, as_json)
        return
    from .experiments.run import run as run_one

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


def tell_plan(method: str, settings: Settings, as_json: bool) -> None:
    """Print what a run would do, computed from shapes: nothing is loaded, downloaded or trained."""
    from .evaluation.plan import plan, plan_table

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
    from .experiments.compare import compare as compare_all
    from .experiments.compare import parse_seeds
    from .experiments.differences import summarise, summarise_skews

    named = {"task": task, "model": model, "clients": clients}
    settings = [
        read_settings(profile, assignments, **named, alpha=each, seed=str(seed))
        for each in (alpha.split(",") if alpha else [None])
        for seed in parse_seeds(seeds)
    ]
    runs = compare_all(chosen, settings, store, out)
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
    from .experiments.compare import parse_seeds
    from .experiments.sweep import choose, grid_cells, read_cells, summarise_cells
    from .experiments.sweep import sweep as sweep_all

    chosen = grid_cells(grid) if grid else choose(read_cells(cells), panels)
    overrides = read_overrides(assignments, task=task, model=model, clients=clients, alpha=alpha)
    table = sweep_all(chosen, parse_seeds(seeds), method, profile, overrides, store, out)
    summary = summarise_cells(table)
    click.echo(summary.to_string(float_format="{:.3f}".format))
    if as_json:
        tell_tables(summary, table)


@main.command()
@click.option("--profile", default="laptop", show_default=True, metavar="P", help=", ".join(PROFILES))
@click.option("--only", help="Numbers of the notebooks to run, such as 03,04.")
@click.option("--seed", type=click.IntRange(0), metavar="S", help="Default: each notebook's own, 0.")
@click.option("--store", type=click.Path(path_type=Path), help="Folder of artefacts; default data/store.")
@jobs_option
def reproduce(profile, only, seed, store) -> None:
    """Run the notebooks, into reproduced/PROFILE, and compare their numbers with the stored ones."""
    from papermill.exceptions import PapermillExecutionError

    from .experiments.reproduce import reproduce as reproduce_all

    try:
        click.echo(reproduce_all(profile, only, store, seed))
    except PapermillExecutionError as error:
        raise click.ClickException(
            f"a notebook stopped at cell {error.exec_count}: {error.ename}: {error.evalue}"
        ) from None


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def info(as_json) -> None:
    """Show versions, device, threads and optional packages."""
    from .core.machine import describe

    facts = describe()
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name:>14}: {value if value is not None else 'not installed'}")


@main.command("methods")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_methods(as_json) -> None:
    """List every method: label, family, what clients send, exchanges, models a prediction, citation."""
    rows = list(map(method_row, METHODS.values()))
    if as_json:
        click.echo("\n".join(map(json.dumps, rows)))
        return
    import pandas as pd

    table = pd.DataFrame([row | {"sends": ", ".join(row["sends"]) or "nothing"} for row in rows]).astype(str)
    table = table.rename(columns={"sends": "clients send", "citation": "source"})
    table = table.apply(lambda column: column.str.ljust(column.str.len().max()))
    click.echo(table.to_string(index=False, justify="left"))
    click.echo("models: how many run at each prediction; K is the number of clients.")


def method_row(method: Method) -> dict[str, Any]:
    """Return what `fedmitr methods` lists of a record."""
    return {
        "name": method.name,
        "label": method.label,
        "family": method.family,
        "sends": method.sent_under(Settings()),
        "exchanges": method.exchanges,
        "models": 1 if method.single_model else "K",
        "citation": method.citation,
    }


@main.command("settings")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_settings(as_json) -> None:
    """List every setting: default, allowed values, meaning, source."""
    click.echo("\n".join(map(json.dumps, fields())) if as_json else settings_page())


@main.group()
def bench() -> None:
    """Measure how fast this machine is."""


@bench.command("inversion")
@click.option("--model", default="vit_micro", show_default=True, metavar="M", help="As model.name.")
@click.option("--image-size", type=click.IntRange(1), metavar="S", help="Pixels; default the model's.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, metavar="B")
@click.option("--clients", type=click.IntRange(1), default=1, show_default=True, metavar="K")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "auto"]), default="fp32", show_default=True)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads; default torch's number.")
@click.option(
    "--iterations", type=click.IntRange(1), default=10, show_default=True, help="Measured ones of each run."
)
@click.option("--against", type=click.Choice(["plain"]), help="Also time benchmarks/plain_loop.py.")
@click.option("--json", "as_json", is_flag=True, help="Last line of stdout: the result as one JSON object.")
def bench_inversion(as_json, **options) -> None:
    """Time sparse and dense inversion with random teachers: seconds, GFLOP/s, memory."""
    from .evaluation.bench import bench_inversion as measure

    report = measure(**options)
    if as_json:
        click.echo(report.model_dump_json())
        return
    for name, value in report.rows().items():
        click.echo(f"{name:>34}: {value}")


if __name__ == "__main__":
    main()
