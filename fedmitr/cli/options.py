"""What the commands share: the group, its errors in one line, and the options that say what is run."""

import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import click

from ..core.errors import BadInput
from ..settings import PROFILES, Settings, fields, parse_assignment


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


profile_option = click.option(
    "--profile", default="laptop", show_default=True, metavar="P", help=", ".join(PROFILES)
)
set_option = click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting; repeatable."
)
store_option = click.option(
    "--store", type=click.Path(path_type=Path), help="Folder of artefacts; default data/store."
)


def settings_options(command: click.Command) -> click.Command:
    """Add the options that say what is run, shared by `run`, `compare` (--alpha: several) and `sweep`."""
    options = [
        profile_option,
        click.option("--task", metavar="T", help="task.name"),
        click.option("--model", metavar="M", help="model.name: the shared start, such as vit_micro_early"),
        click.option("--clients", metavar="K", help="partition.clients"),
        click.option("--alpha", metavar="A", help="partition.alpha; for compare A,B,… too"),
        set_option,
        store_option,
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


def read_settings(method: str, profile: str, assignments: tuple[str, ...], **named: str | None) -> Settings:
    """Return a method's settings under a profile, with the overrides that `read_overrides` reads."""
    return Settings.load(profile, read_overrides(assignments, **named), method)
