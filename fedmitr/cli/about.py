"""Commands that tell what is there: `info | methods | settings | bench`."""

import json
from typing import Any

import click

from ..methods import METHODS, Method
from ..settings import Settings, fields
from .options import main, settings_page


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def info(as_json) -> None:
    """Show versions, device, threads and optional packages."""
    from ..core.machine import describe

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
    from ..evaluation.bench import bench_inversion as measure

    report = measure(**options)
    if as_json:
        click.echo(report.model_dump_json())
        return
    for name, value in report.rows().items():
        click.echo(f"{name:>34}: {value}")
