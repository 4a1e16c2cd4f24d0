"""Publish a run of the notebooks: figures/, results/headline.csv and the notebooks' stored outputs.

    python tools/publish.py            run by `make publish`, for maintainers

The laptop profile at the notebooks' own seed, 30, is what ships. The notebooks that record headline numbers
also run on seeds 31 to 34; the standard deviation over all five is the spread that `fedmitr reproduce`
compares with.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import click
import nbformat

from fedmitr.core.paths import DEFAULT_PROFILE, default_store, home
from fedmitr.core.store import write_csv
from fedmitr.experiments.headline import HEADLINE, NUMBERS, read_numbers, summarise_numbers
from fedmitr.experiments.reproduce import reproduce

OTHER_SEEDS = (31, 32, 33, 34)
# The other notebooks record bytes, operations and plans, which a seed does not change.
ON_SEEDS = "00,01,02,03,04"


@contextmanager
def environment(**values: str):
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def store_outputs(executed: Path, source: Path) -> None:
    """Write an executed notebook's outputs into its source, without what papermill added."""
    book = nbformat.read(executed, as_version=4)
    book.cells = [c for c in book.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    book.metadata.pop("papermill", None)
    count = 0
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.NotebookNode({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    nbformat.write(book, source)


def pictures(folder: Path) -> list[Path]:
    """List the pictures and animations of a folder."""
    return sorted(p for p in folder.glob("*") if p.suffix in (".png", ".gif"))


@click.command()
@click.option(
    "--profile", default=DEFAULT_PROFILE, show_default=True, help="Another one only to try this script."
)
@click.option("--into", type=click.Path(path_type=Path), help="Default: this checkout.")
@click.option("--only", help="Numbers of the notebooks, such as 00,04. Default: all.")
def main(profile: str, into: Path | None, only: str | None) -> None:
    """Run the notebooks on all seeds and write what ships."""
    into = into or home()
    aside = home() / "reproduced" / "publish"
    shutil.rmtree(aside, ignore_errors=True)
    others = []
    for seed in OTHER_SEEDS if not only else ():  # their numbers are written with all notebooks alone
        with environment(FEDMITR_OUTPUT=str(aside / f"seed{seed}"), FEDMITR_STATIC="1"):
            reproduce(profile, ON_SEEDS, seed=seed)
        others.append(read_numbers(aside / f"seed{seed}" / "results" / NUMBERS))
    with environment(FEDMITR_OUTPUT=str(aside / "shipped"), FEDMITR_STATIC="1"):
        click.echo(reproduce(profile, only, store=default_store()))
    shipped = aside / "shipped"
    for name in ("figures", "results", "notebooks"):
        (into / name).mkdir(parents=True, exist_ok=True)
    for figure in pictures(shipped / "figures"):
        shutil.copyfile(figure, into / "figures" / figure.name)
    for book in sorted((shipped / "notebooks").glob("*.ipynb")):
        store_outputs(book, into / "notebooks" / book.name)
    made = {figure.name for figure in pictures(shipped / "figures")}
    ran = {book.name[:2] for book in (shipped / "notebooks").glob("*.ipynb")}
    for figure in pictures(into / "figures"):
        if figure.name not in made and (not only or figure.name[:2] in ran):
            figure.unlink()  # its notebook draws it no more
    if not only:
        table = summarise_numbers(read_numbers(shipped / "results" / NUMBERS), others)
        write_csv(table, into / HEADLINE, digits=4)


if __name__ == "__main__":
    main()
