"""The papermill batch: every notebook in order, in a fresh kernel, at one profile."""

from pathlib import Path

from tqdm.auto import tqdm

from ..core.errors import BadInput
from ..core.paths import default_store, output_folder, reproduced, shipped
from ..core.store import Store, check_writable
from ..settings import Settings
from .headline import NUMBERS, headline_text
from .run import Experiment


def notebooks(only: str | None = None) -> list[Path]:
    """List the numbered notebooks in order, or those whose numbers `only` lists."""
    found = {p.name[:2]: p for p in sorted(shipped("notebooks").glob("[0-9][0-9]_*.ipynb"))}
    chosen = [n.strip().zfill(2) for n in only.split(",")] if only else list(found)
    unknown = [n for n in chosen if n not in found]
    if unknown:
        raise BadInput(f"only={unknown[0]!r} is unknown: allowed are {', '.join(found)}")
    return [found[n] for n in chosen]


def reproduce(
    profile: str, only: str | None = None, store: Path | str | None = None, seed: int | None = None
) -> str:
    """Execute notebooks with papermill; return the table of headline numbers, stored and now, as text.

    Every stage that an earlier run finished comes from the store, so a stopped run goes on where it was.
    Figures, tables and executed notebooks are written below `paths.reproduced`. seed: by default each
    notebook's own. Raises BadInput, before any work, for an unknown profile or notebook.
    """
    settings, chosen = Settings.load(profile), notebooks(only)
    store = Store(store or default_store())
    check_writable(reproduced(profile), f"FEDMITR_OUTPUT={str(reproduced(profile))!r}")
    Experiment(settings, store).check()
    import papermill  # slow to import, and only this command needs it

    executed = output_folder("notebooks", profile)
    (output_folder("results", profile) / NUMBERS).unlink(missing_ok=True)  # what this run does not measure
    parameters = {"PROFILE": profile, "STORE": str(store.root.resolve())}
    if seed is not None:
        parameters["SEED"] = seed
    for path in tqdm(chosen, desc=f"notebooks ({profile})", unit="nb"):
        papermill.execute_notebook(
            path,
            executed / path.name,
            parameters=parameters,
            cwd=Path.cwd(),
            progress_bar={"desc": path.stem, "leave": False},
        )
    return f"{headline_text(profile)}\nFigures, tables and notebooks of this run: {reproduced(profile)}"
