"""Write the results of README.md and docs/results.md from results/study.csv, and what notebooks take.

python tools/readme.py            run by `make study`, and after `make reproduce`
"""

import os
import platform
import re
from pathlib import Path

import nbformat
import pandas as pd

from fedmitr.core.machine import native_bf16
from fedmitr.core.paths import home
from fedmitr.study.analysis import finished_parts, part_table
from fedmitr.study.protocol import Protocol, read_protocol
from fedmitr.study.run import read_study
from fedmitr.study.tables import grounds_table, markdown
from fedmitr.study.verdicts import summary

STUDY = home() / "results" / "study.csv"
EXECUTED = home() / "reproduced" / "laptop" / "notebooks"


def verdict(protocol: Protocol, runs: pd.DataFrame) -> str:
    """Return the study's state and its five lines."""
    done = finished_parts(protocol, runs)
    count, total = len(runs), sum(map(protocol.runs_of, protocol.parts))
    state = f"All {total:,} runs of the study are there."
    if count < total:
        state = (
            f"**The study is unfinished:** {count:,} of {total:,} runs are there. Only finished parts are "
            f"shown and judged ({'; '.join(done) or 'none yet'})."
        )
    lines = "\n".join(f"{number}. {line}" for number, line in enumerate(summary(protocol, runs), 1))
    return f"{state}\n\n{lines}"


def table(protocol: Protocol, runs: pd.DataFrame) -> str:
    """Return the table of the primary grounds, as far as they are finished."""
    done = finished_parts(protocol, runs)
    tables = {name: part_table(protocol, runs, name) for name in protocol.primary if name in done}
    return markdown(grounds_table(tables)) if tables else "No primary ground is finished."


def start(folder: Path) -> str:
    """Return the table of the notebooks: title, minutes to read and to run as each one's head says."""
    rows = ["| notebook | minutes to read | minutes to run |", "|---|---|---|"]
    for path in sorted(folder.glob("*.ipynb")):
        head = nbformat.read(path, as_version=4).cells[0].source
        title = head.splitlines()[0].removeprefix("# ")
        minutes = [re.search(rf"(\d+)[^\d\n]*\b{verb}\b", head) for verb in ("read", "run")]
        read, run = (found[1] if found else "" for found in minutes)
        rows.append(f"| [{title}](notebooks/{path.name}) | {read} | {run} |")
    return "\n".join(rows)


def times(executed: Path) -> str:
    """How long the last `make reproduce` took, and on what."""
    books = [nbformat.read(p, as_version=4) for p in sorted(executed.glob("*.ipynb"))]
    total = sum(b.metadata["papermill"]["duration"] for b in books)
    products = "bfloat16" if native_bf16() else "float32"
    return (
        f"`make reproduce` took {total / 60:.1f} minutes for {len(books)} notebooks from an empty store, "
        f"after set-up, on {os.cpu_count()} cores ({platform.machine()}, {platform.system()}) without a GPU, "
        f"with {products} products."
    )


def fill(page: str, name: str, text: str) -> str:
    """A page with the part between the markers of this name replaced."""
    pattern = re.compile(rf"(<!-- {name}: [^\n]*\n).*?(<!-- /{name} -->)", re.S)
    return pattern.sub(lambda m: m[1] + text + "\n" + m[2], page)


def main() -> None:
    protocol, runs = read_protocol(), read_study(STUDY)
    readme, page = home() / "README.md", home() / "docs" / "results.md"
    text = fill(readme.read_text(), "results", verdict(protocol, runs))
    text = fill(text, "start", start(home() / "notebooks"))
    if EXECUTED.is_dir():
        text = fill(text, "times", times(EXECUTED))
    readme.write_text(text)
    page.write_text(fill(page.read_text(), "table", table(protocol, runs)))


if __name__ == "__main__":
    main()
