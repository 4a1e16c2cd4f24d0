"""Commands that make the evidence: `tune | study | audit`."""

from pathlib import Path

import click

from ..core.errors import BadInput
from ..core.paths import home
from ..methods import find
from ..settings import parse_assignment
from ..settings.load import TUNED
from .options import (
    HINT,
    backend_option,
    cluster_option,
    jobs_option,
    main,
    profile_option,
    set_option,
    store_option,
)


@main.command(epilog=HINT)
@click.option("--methods", help="Comma-separated; default all that have something to try.")
@click.option("--starts", help="Comma-separated values of model.name; default both that ship.")
@click.option("--trials", type=click.IntRange(1), help="Of each method from each start; default 20.")
@click.option("--seeds", help="Such as 0-4, the default, or 1,3,5.")
@profile_option
@set_option
@click.option("--out", type=click.Path(path_type=Path), help="CSV of all trials; default results/tuning.csv.")
@click.option(
    "--tuned", type=click.Path(path_type=Path), help="YAML of what won; default results/tuned.yaml."
)
@store_option
@jobs_option
@backend_option
@cluster_option
def tune(methods, starts, trials, seeds, profile, assignments, out, tuned, store) -> None:
    """Tune every method in equally many trials, on validation images, and write what won.

    Without --trials, --seeds, --profile and --set these are the trials that the book shows, and what won
    becomes the laptop profile's settings of each method. With them, --out is needed, and what won is written
    with --tuned alone.
    """
    chosen = [name.strip() for name in methods.split(",")] if methods else []
    for name in chosen:
        find(name)
    from ..core.paths import DEFAULT_PROFILE
    from ..core.store import check_output
    from ..experiments.compare import parse_seeds
    from ..study.tables import trials_table
    from ..study.tune import SCENES, SEEDS, STARTS, TRIALS, Plan, best_values, write_tuned
    from ..study.tune import tune as tune_all

    overrides = dict(SCENES) | dict(map(parse_assignment, assignments))
    plan = Plan(trials or TRIALS, tuple(parse_seeds(seeds)) if seeds else SEEDS, profile, overrides)
    if plan == Plan(profile=DEFAULT_PROFILE):
        out, tuned = out or home() / "results" / "tuning.csv", tuned or home() / TUNED
    elif out is None:
        raise BadInput("other trials, seeds, profile or settings than the book's need --out FILE")
    if tuned:
        check_output(tuned, f"tuned={str(tuned)!r}")
    begins = [name.strip() for name in starts.split(",")] if starts else STARTS
    table = tune_all(plan, chosen, begins, store, out)
    if tuned:
        write_tuned(best_values(table), profile, tuned)
    click.echo(trials_table(table).to_string(float_format="{:.3f}".format))


@main.command()
@click.option("--protocol", type=click.Path(path_type=Path), help="Default results/protocol.yaml.")
@click.option("--freeze", is_flag=True, help="Write all settings of now into the protocol; run nothing.")
@click.option("--report", is_flag=True, help="Judge what the table has; run nothing.")
@click.option("--again", metavar="PART", help="Run rows of a ground or panel again, beside what is stored.")
@click.option("--cell", "cells", multiple=True, help="With --again: a method or cell, repeatable.")
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
    from ..study.run import finished, read_study, rerun
    from ..study.run import study as run_study
    from ..study.tune import SEEDS
    from ..study.verdicts import summary, write_report

    if sum(map(bool, (freeze, report, again))) > 1 or ((cells or seeds) and not again):
        raise BadInput("allowed is one of --freeze, --report and --again; --cell and --seeds go with --again")
    if freeze:
        freeze_settings(protocol or home() / PROTOCOL, SEEDS)
        return
    if protocol and not out:
        raise BadInput(f"protocol={str(protocol)!r} is not the one that ships: give its table, --out FILE")
    plan, out = read_protocol(protocol), out or home() / "results" / "study.csv"
    if again:
        chosen = parse_seeds(seeds) if seeds else []
        table = rerun(plan, read_study(out), again, cells, chosen, store)
        click.echo(table.to_string(index=False, float_format="{:.6f}".format))
        return
    runs = finished(plan, out) if report else run_study(plan, store, out)
    write_report(plan, runs, out.with_suffix(".json"))
    click.echo("\n".join(summary(plan, runs)))


@main.command(epilog=HINT)
@click.option("--targets", help="Comma-separated; default all: what is attacked.")
@click.option("--runs", type=int, help="Shadow runs, a multiple of 4; default 64.")
@click.option("--canaries", type=int, help="Mislabelled images of the audited client; default 32.")
@click.option("--client", type=int, help="The audited client; default the one with most images.")
@profile_option
@set_option
@click.option("--out", type=click.Path(path_type=Path), help="CSV of the rates; default results/audit.csv.")
@store_option
@jobs_option
@backend_option
@cluster_option
def audit(targets, runs, canaries, client, profile, assignments, out, store) -> None:
    """Attack what a client sends, and what is made of it: who was in its data?

    Without options this is the audit that notebook 08 shows. With others than --store and --jobs, such as
    --set with a protection, --out is needed.
    """
    from ..core.paths import DEFAULT_PROFILE
    from ..privacy.audit import run_audit
    from ..privacy.shadows import Audit
    from ..privacy.targets import TARGETS

    given = {"runs": runs, "canaries": canaries, "client": client}
    given = {name: value for name, value in given.items() if value is not None}
    plan = Audit(profile, dict(map(parse_assignment, assignments)), **given)
    chosen = [name.strip() for name in targets.split(",")] if targets else list(TARGETS)
    if out is None:
        if plan != Audit(DEFAULT_PROFILE) or targets:
            raise BadInput("another audit than notebook 08's needs --out FILE")
        out = home() / "results" / "audit.csv"
    rates, _ = run_audit(plan, chosen, store, out)
    click.echo(rates.to_string(index=False, float_format="{:.3f}".format))
