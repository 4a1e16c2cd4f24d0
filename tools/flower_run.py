"""One run over Flower's real processes, and one in which a client is killed: results/flower.csv.

python tools/flower_run.py [--profile smoke] [--seed 0] [--method fedmitr]      run by `make flower`

Each run has a SuperLink and a SuperNode for each client, every one a process of this machine with a store
of its own, and begins with nothing trained. What it leaves is compared with the same in one process. The
seconds are those of `flwr run`, with its wait for the heartbeats of a node that is killed, which
flower_processes.py shortens.
"""

import copy
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import click
import pandas as pd
import torch
from flower_processes import cluster
from torch import Tensor, nn

import fedmitr as fm
from fedmitr.core.paths import home
from fedmitr.core.store import read_tensors, write_csv
from fedmitr.evaluation.metrics import accuracy
from fedmitr.flower_app import DEFAULTS, refusal
from fedmitr.methods import METHODS, find
from fedmitr.settings import PROFILES, parse_assignment

RESULTS = home() / "results" / "flower.csv"
KILLED = 2  # the client that does not come back


def over_flower(
    folder: Path, settings: fm.Settings, kill: bool, **config: Any
) -> tuple[dict[str, Tensor], list[fm.Upload], float]:
    """Run once over Flower: return the global model, the uploads that reached the server, and the seconds."""
    clients = settings.partition.clients
    say(f"starting a SuperLink and {clients} SuperNodes")
    with cluster(folder, clients) as flower:
        start = time.perf_counter()
        flower.run("run", seed=settings.seed, **config)
        if kill:
            flower.wait_for(f"node{KILLED}", "client: ")  # its bar: it trains
            flower.kill(f"node{KILLED}")
            say(f"client {KILLED} is killed while it trains; the server waits for its heartbeats")
        flower.wait_for("run", "global model of", seconds=DEFAULTS["timeout"])
        seconds = time.perf_counter() - start
    (received,) = (folder / "server" / "received").iterdir()
    uploads = [fm.Upload.load(at) for at in received.iterdir()]
    return read_tensors(folder / "run.safetensors"), uploads, seconds


def in_process(experiment: fm.Experiment, method: str, clients: list[int]) -> nn.Module:
    """Return the model that `fedmitr run` makes, or that of these clients' uploads where some are missing."""
    if len(clients) == experiment.settings.partition.clients:
        return experiment.models(method)[0]
    uploads = [experiment.train(client) for client in clients]
    if not find(method).needs_counts_under(experiment.settings):
        uploads = [upload.without_counts() for upload in uploads]
    return find(method)(uploads, experiment.settings, experiment.store).models[0]


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models agree in every weight, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def compare(experiment: fm.Experiment, method: str, kill: bool, **config: Any) -> dict[str, Any]:
    """Return a row of the table: a run over Flower with this run config, and the same in this process."""
    settings = experiment.settings
    with tempfile.TemporaryDirectory() as aside:
        written, uploads, seconds = over_flower(Path(aside), settings, kill, method=method, **config)
    clients = sorted(upload.client for upload in uploads)
    missing = sorted(set(range(settings.partition.clients)) - set(clients))
    say(f"{len(clients)} uploads came, {seconds:.0f} s; now the same in this process")
    own, over = in_process(experiment, method, clients), copy.deepcopy(experiment.initial).eval()
    over.load_state_dict(written)
    return {
        "method": method,
        "profile": config["profile"],
        "seed": settings.seed,
        "nodes": settings.partition.clients,
        "killed": int(kill),
        "usable_uploads": len(clients),
        "missing_clients": " ".join(map(str, missing)) or "none",
        "accuracy_flower": accuracy(over, experiment.task.test),
        "accuracy_in_process": accuracy(own, experiment.task.test),
        "same_weights": same_weights(written, own.state_dict()),
        "upload_bytes": sum(upload.bytes for upload in uploads),
        "seconds": round(seconds),
    }


def say(line: str) -> None:
    """Print a line to stderr at once."""
    print(line, file=sys.stderr, flush=True)


@click.command()
@click.option("--profile", default="smoke", show_default=True, type=click.Choice(list(PROFILES)))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option(
    "--method",
    default=DEFAULTS["method"],
    show_default=True,
    type=click.Choice([name for name, method in METHODS.items() if not refusal(method)]),
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Such as client.epochs=1.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Default results/flower.csv.")
def main(profile: str, seed: int, method: str, assignments: tuple[str, ...], out: Path) -> None:
    """Write results/flower.csv."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: all that was started is ended
    for quiet in ("TQDM_DISABLE", "FEDMITR_STATIC"):  # a client's bar tells that it trains
        os.environ.pop(quiet, None)
    settings = fm.Settings.load(profile, dict(map(parse_assignment, assignments)) | {"seed": seed}, method)
    config = {"profile": profile, "set": " ".join(assignments)}
    with tempfile.TemporaryDirectory() as store:
        experiment = fm.Experiment(settings, store)
        table = pd.DataFrame([compare(experiment, method, kill, **config) for kill in (False, True)])
    write_csv(table, out, digits=4)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
