"""The audit: every target attacked over all shadow runs, as a table of rates and a table of ROC points.

Each run's scores are an artefact of the store, so an audit that was stopped goes on, and runs are spread over
processes. With one Gaussian per record and side, LiRA also predicts what it should reach: for the overfitted
control that prediction stands beside the measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..core.paths import default_store
from ..core.processes import parallel
from ..core.progress import progress
from ..core.store import Store, check_output, fingerprint, read_tensors, write_csv, write_tensors
from ..experiments.compare import check_all, train_clients
from ..experiments.run import Experiment
from ..methods import find
from ..settings import Settings
from .membership import lira, predicted, rmia
from .roc import measures, thinned
from .shadows import Audit, Records, ShadowRun, memberships
from .targets import TARGETS, Target, find_target, observe

RANDOM, CANARIES = "random", "mislabelled"
ROC_COLUMNS = ("target", "attack", "records", "fpr", "tpr")
STAGE, FILE = "audit", "scores.safetensors"
Attack = tuple[str, np.ndarray, np.ndarray]  # its name, its scores (R, n), who is a member (R, n)


@dataclass(frozen=True)
class Observed:
    """The scores that all runs of a target gave: records (R, n, Q), population (R, m, Q) or None.

    member (R, n): who was in which run; canary (n,): who is mislabelled; seconds: of all runs together.
    """

    records: np.ndarray
    population: np.ndarray | None
    member: np.ndarray
    canary: np.ndarray
    seconds: float


def run_audit(
    audit: Audit,
    targets: Sequence[str] = tuple(TARGETS),
    store: Path | str | None = None,
    out: Path | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Attack each target and return the table of rates and that of ROC points.

    One row for each target, attack and kind of records: `roc.measures`, the runs, and how many scores of
    members and non-members there are. Both tables are rewritten after every target: `out`, and beside it
    `out_roc`; seconds go to `out_seconds`. Raises BadInput, before any work, for what cannot work.
    """
    for name in targets:
        check(audit, find_target(name), Store(store or default_store()))
    if out:
        check_output(out, f"out={str(out)!r}")
    rates: list[dict[str, object]] = []
    points: list[pd.DataFrame] = []
    spent: list[dict[str, object]] = []
    with progress(len(targets), "audit", "target") as bar:
        for name in targets:
            observed = observed_runs(audit, find_target(name), store)
            found = judge(name, observed)
            rates += found[0]
            points += found[1]
            spent.append({"target": name, "runs": len(observed.member), "seconds": observed.seconds})
            bar.update(1)
            if out:
                write_csv(pd.DataFrame(rates), out, digits=6)
                write_csv(pd.concat(points), beside(out, "roc"), digits=6)
                write_csv(pd.DataFrame(spent), beside(out, "seconds"), digits=3)
    return pd.DataFrame(rates), pd.concat(points, ignore_index=True)


def beside(out: Path, what: str) -> Path:
    """Return the path of the table of ROC points (`roc`) or of seconds that belongs to `out`."""
    return out.with_name(f"{out.stem}_{what}{out.suffix}")


def check(audit: Audit, target: Target, store: Store) -> None:
    """Raise BadInput, before any work, for an audit that cannot run on this target."""
    settings = _settings(audit, target)
    check_all([(target.method, settings)], store)
    Records.of(Experiment(settings, store), audit)


def observed_runs(audit: Audit, target: Target, store: Path | str | None = None) -> Observed:
    """Return the scores of all of a target's runs; those that the store lacks are made now."""
    kept = Store(store or default_store())
    settings = _settings(audit, target)
    experiment = Experiment(settings, kept)
    records = Records.of(experiment, audit)
    member = memberships(audit.runs, len(records.rows), settings.seed)
    runs = audit.runs // 2 if target.half else audit.runs
    keys = [_key(audit, target, settings, experiment.task.digest, run) for run in range(runs)]
    todo = [run for run in range(runs) if not kept.has(STAGE, keys[run])]
    if todo:
        _prepare(settings, records, target, kept)
    with progress(len(todo), target.label, "run") as bar:
        for _ in parallel(partial(_observe_in_worker, audit, target, kept.root), todo):
            bar.update(1)
    found = [kept.read(STAGE, key, _read) for key in keys]
    columns = {name: torch.stack([one[name] for one in found]).numpy() for name in found[0]}
    return Observed(
        columns["records"],
        columns.get("population"),
        member[:runs].numpy(),
        records.canary.numpy(),
        sum(kept.seconds(STAGE, key) for key in keys),
    )


def judge(name: str, observed: Observed) -> tuple[list[dict[str, object]], list[pd.DataFrame]]:
    """Attack a target's scores; return the rows of its rates, and its ROC points."""
    rates, points = [], []
    for attack, scores, member in attacks(observed, controlled=name == "overfitted"):
        for kind, picked in ((RANDOM, ~observed.canary), (CANARIES, observed.canary)):
            if not picked.any():
                continue
            own, truth = scores[:, picked], member[:, picked]
            counts = {"members": int(truth.sum()), "non_members": int((~truth).sum())}
            where = {"target": name, "attack": attack, "records": kind}
            rates.append(where | measures(own, truth) | {"runs": len(observed.member)} | counts)
            fpr, tpr = thinned(own, truth)
            points.append(pd.DataFrame(where | {"fpr": fpr, "tpr": tpr}, columns=list(ROC_COLUMNS)))
    return rates, points


def attacks(observed: Observed, controlled: bool = False) -> list[Attack]:
    """Return every attack on a target's scores; the first has one threshold for all, and no shadow runs.

    controlled: also LiRA on the image alone, without moved copies, beside what its Gaussians predict for it.
    """
    scores, member = observed.records, observed.member
    found: list[Attack] = [("score alone", scores.mean(-1), member)]
    found.append(("LiRA", lira(scores, member), member))
    found.append(("LiRA, offline", lira(scores, member, online=False), member))
    if observed.population is not None:
        found.append(("RMIA", rmia(scores, observed.population, member), member))
    if controlled:
        found.append(("LiRA, image alone", lira(scores[..., :1], member), member))
        found.append(("LiRA, predicted", *predicted(scores[..., 0], member)))
    return found


def _settings(audit: Audit, target: Target) -> Settings:
    return target.settings(audit.settings(target.method, target.overrides))


def _key(audit: Audit, target: Target, settings: Settings, digest: str | None, run: int) -> str:
    """Return the address of a run's scores: the target by what is attacked, not by its name."""
    what = [target.part, target.method, audit.told(), run]
    return fingerprint("audit", what, settings.model_dump(exclude={"task": {"data_dir"}}), digest)


def _prepare(settings: Settings, records: Records, target: Target, store: Store) -> None:
    """Make what all runs share before they are spread: the other clients' uploads, and their sums."""
    others = [k for k in range(len(records.shards)) if k != records.client]
    if target.part in ("model", "images"):
        experiment = Experiment(settings, store)
        lacking = [k for k in others if not store.has("uploads", experiment.upload_key(k))]
        if find(target.method).needs_weights:
            train_clients([(settings, k) for k in lacking], store)
        for client in others:  # sums of features, where the method needs them
            experiment.upload_for(find(target.method), client)


def _observe_in_worker(audit: Audit, target: Target, store: Path, number: int) -> None:
    """Make one run and keep its scores."""
    settings, kept = _settings(audit, target), Store(store)
    experiment = Experiment(settings, kept)
    records = Records.of(experiment, audit)
    member = memberships(audit.runs, len(records.rows), settings.seed)[number]
    run = ShadowRun(settings, kept, records, member, number)
    validation = experiment.task.validation
    others = validation.subset(torch.arange(min(audit.population, len(validation))))

    def make() -> dict[str, Tensor]:
        return observe(run, target, others)

    key = _key(audit, target, settings, experiment.task.digest, number)
    kept.get(STAGE, key, _read, make, _write)


def _read(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / FILE)


def _write(scores: dict[str, Tensor], folder: Path) -> None:
    write_tensors(scores, folder / FILE)
