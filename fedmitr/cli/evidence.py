"""Commands that make the evidence: `tune | study`."""

from pathlib import Path

import click

from ..core.paths import home
from ..methods import find
from ..settings import PROFILES, parse_assignment
from .options import HINT, backend_option, cluster_option, jobs_option, main

store_option = click.option(
    "--store", type=click.Path(path_type=Path), help="Folder of artefacts; default data/store."
)


@main.command(epilog=HINT)
@click.option("--methods", help="Comma-separated; default all that have something to try.")
@click.option("--starts", help="Comma-separated values of model.name; default both that ship.")
@click.option("--trials", type=click.IntRange(1), help="Of each method from each start; default 20.")
@click.option("--seeds", default="0-4", show_default=True, help="Such as 0-4 or 1,3,5.")
@click.option("--profile", default="laptop", show_default=True, metavar="P", help=", ".join(PROFILES))
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV of all trials; default results/tuning.csv.")
@click.option(
    "--tuned", type=click.Path(path_type=Path), help="YAML of what won; default results/tuned.yaml."
)
@store_option
@jobs_option
@backend_option
@cluster_option
def tune(methods, starts, trials, seeds, profile, assignments, out, tuned, store) -> None:
    """Tune every method in equally many trials, on validation images, and write what won."""
    chosen = [name.strip() for name in methods.split(",")] if methods else []
    for name in chosen:
        find(name)
    from ..experiments.compare import parse_seeds
    from ..study.tune import STARTS, TRIALS, Plan, best_values, write_tuned
    from ..study.tune import tune as tune_all

    plan = Plan(
        trials or TRIALS, tuple(parse_seeds(seeds)), profile, dict(map(parse_assignment, assignments))
    )
    begins = [name.strip() for name in starts.split(",")] if starts else STARTS
    table = tune_all(plan, chosen, begins, store, out or home() / "results" / "tuning.csv")
    write_tuned(best_values(table), profile, tuned or home() / "results" / "tuned.yaml")
    best = table[table["state"] == "complete"].groupby(["start", "method"], sort=False)["accuracy"]
    first = table[table["trial"] == 0].set_index(["start", "method"])["accuracy"]
    said = best.max().to_frame("best").assign(**{"first trial": first})
    click.echo(said.to_string(float_format="{:.3f}".format))


@main.command()
@click.option("--protocol", type=click.Path(path_type=Path), help="Default results/protocol.yaml.")
@click.option("--freeze", is_flag=True, help="Write all settings of now into the protocol; run nothing.")
@click.option("--report", is_flag=True, help="Judge what the table has; run nothing.")
@click.option("--again", metavar="PART", help="Run rows of a ground or panel again, beside what is stored.")
@click.option("--cells", help="With --again: methods or cells, comma-separated; default all.")
@click.option("--seeds", help="With --again: such as 30-32; default all.")
@click.option("--out", type=click.Path(path_type=Path), help="CSV of the study; default results/study.csv.")
@store_option
@jobs_option
@backend_option
@cluster_option
def study(protocol, freeze, report, again, cells, seeds, out, store) -> None:
    """Run the committed protocol, judge its claims, and write results/study.{csv,json}."""
    from ..experiments.compare import parse_seeds
    from ..study.protocol import PROTOCOL, freeze_settings, read_protocol
    from ..study.run import read_study, rerun
    from ..study.run import study as run_study
    from ..study.verdicts import summary, write_report

    if freeze:
        freeze_settings(protocol or home() / PROTOCOL)
        return
    plan, out = read_protocol(protocol), out or home() / "results" / "study.csv"
    if again:
        chosen = [name.strip() for name in cells.split(",")] if cells else []
        table = rerun(plan, read_study(out), again, chosen, parse_seeds(seeds) if seeds else [], store)
        click.echo(table.to_string(index=False, float_format="{:.6f}".format))
        return
    if not report:
        run_study(plan, store, out)
    runs = read_study(out)  # with the digits of the file, so that the report is always the same
    write_report(plan, runs, out.with_suffix(".json"))
    click.echo("\n".join(summary(plan, runs)))
