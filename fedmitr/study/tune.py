"""Equal tuning: every method gets the same number of trials from each start, scored on validation images.

A trial is a choice of values from a method's `search`. The first one is the profile's own values, the others
are proposed by Optuna's TPE sampler, half of them at random. A trial runs on one seed after another, and
stops where it is not among the better half of the n trials that came as far, the best ⌊n/2⌋, or one at least
(successive halving: Jamieson & Talwalkar, AISTATS 2016; Li et al., MLSys 2020), asked after 1, 2 and 4 seeds.
A method with fewer choices than trials tries each of them, on all seeds. Of the trials that ran on all seeds,
the one with the highest mean accuracy gives the values under which the method is reported from this start
(`Settings.load` with `method`).

All searches go on side by side, and each is the same for any number of workers. A stopped tuning goes on
from the table of its trials, and from the store.
"""

import json
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import pandas as pd
import yaml

from ..core.errors import BadInput, Diverged
from ..core.paths import default_store
from ..core.processes import parallel
from ..core.progress import progress
from ..core.rng import derive_seed
from ..core.store import Store, check_output, digest, write_csv, write_text
from ..experiments.compare import Pair, check_all, train_clients
from ..experiments.result import code_text
from ..experiments.run import Experiment
from ..methods import METHODS, Method, Range, Search, dotted, find
from ..settings import Settings, read_tuned

STARTS = ("vit_micro", "vit_micro_early")  # values of model.name
TRIALS, SEEDS = 20, tuple(range(5))
SCENES: Mapping[str, Any] = {"task.scenes": 4}  # sharper validation accuracies; nothing is trained on them
COMPLETE, STOPPED, FAILED = "complete", "stopped", "failed"
SEED = "seed {}".format  # the column of a seed's accuracy
Values = dict[str, Any]  # dotted setting -> value
Trials = Generator[Pair, float | None, None]  # is sent the accuracy of what it yields, None where that failed

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Plan:
    """What all searches share: the number of trials, the seeds, the profile and what differs from it."""

    trials: int = TRIALS
    seeds: tuple[int, ...] = SEEDS
    profile: str = "laptop"
    overrides: Mapping[str, Any] = field(default_factory=lambda: dict(SCENES))

    def settings(self, start: str, seed: int, values: Mapping[str, Any] | None = None) -> Settings:
        """Return the settings of a trial on one seed."""
        own = {"model.name": start, "seed": seed}
        return Settings.load(self.profile, {**self.overrides, **own, **(values or {})})


def tune(
    plan: Plan,
    methods: Sequence[str] = (),
    starts: Sequence[str] = STARTS,
    store: Path | str | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """Run every method's trials from every start and return one row a trial, written to the CSV `out` too.

    methods: by default all that have something to try. Columns: start, method, trial, state (complete,
    stopped or failed: it diverged); accuracy, the mean over its seeds; values, as JSON; settings, a hash of
    those that trials start from and of what they may try; the accuracy on each seed, empty where the trial
    did not get. Accuracies in an existing `out` are taken over, and rows of other methods and starts stay
    there. Raises BadInput, before any work, for an unknown method or start, no trial or no seed, values that
    may be tried but are not allowed, and an `out` with trials of these methods under other settings.
    """
    if plan.trials < 1 or not plan.seeds:
        raise BadInput(f"trials={plan.trials}, seeds={list(plan.seeds)}: allowed is at least one of each")
    if out:
        check_output(out, f"out={str(out)!r}")
    methods = methods or [name for name, method in METHODS.items() if method.search]
    kept = Store(store or default_store())
    pairs = [(start, find(method)) for start in starts for method in methods]
    for pair in pairs:
        check_search(plan, *pair)
    todo = check_all([(m, plan.settings(s, n)) for s in starts for n in plan.seeds for m in methods], kept)
    there = read_trials(out)
    others = _not_of(there, {(s, m.name): digest_of(plan, s, m) for s, m in pairs}, out)
    known = accuracies_of(there)
    rows = dict[tuple[int, int], dict[str, Any]]()
    searches = [search(plan, *pair, known, partial(_keep, rows, i)) for i, pair in enumerate(pairs)]
    train_clients(todo, kept)
    with progress(sum(trials_of(plan, method) for _, method in pairs), "tuning", "trial") as bar:

        def show() -> None:
            bar.update(len(rows) - bar.n)
            if out and rows:
                own = _table(rows, plan.seeds)
                write_csv(pd.concat([others, own]) if len(others) else own, out, digits=6)

        advance(searches, kept, show)
    return _table(rows, plan.seeds)


def check_search(plan: Plan, start: str, method: Method) -> None:
    """Raise BadInput for an unknown setting, and for a value that a trial may try but is not allowed."""
    for setting, allowed in method.search.items():
        for value in (allowed.low, allowed.high) if isinstance(allowed, Range) else allowed:
            plan.settings(start, plan.seeds[0], {setting: value})


def digest_of(plan: Plan, start: str, method: Method) -> str:
    """Return a hash of the plan, what trials start from and may try, and the code of a method of your own."""
    own = "" if method.is_shipped else code_text(method.run)
    base = plan.settings(start, plan.seeds[0]).model_dump()
    space = {name: str(values) for name, values in method.search.items()}
    return digest("tuning", method.name, plan.trials, plan.seeds, base, space, own)


def _not_of(there: pd.DataFrame, digests: Mapping[tuple[str, str], str], out: Path | None) -> pd.DataFrame:
    """Return the rows of other searches; BadInput for rows of these under other settings."""
    keys = list(zip(there["start"], there["method"], strict=True))
    for key, found in zip(keys, there["settings"], strict=True):
        if digests.get(key, found) != found:
            raise BadInput(
                f"out={str(out)!r} has trials of {key[1]} from {key[0]} under other settings: allowed is "
                "another file, or to delete this one"
            )
    return there[[key not in digests for key in keys]]


def _keep(rows: dict[tuple[int, int], dict[str, Any]], index: int, row: dict[str, Any]) -> None:
    """Keep the row of a finished trial of the search of this index."""
    rows[index, row["trial"]] = row


def _table(rows: Mapping[tuple[int, int], dict[str, Any]], seeds: Sequence[int]) -> pd.DataFrame:
    """Return the rows of finished trials as a table, search by search."""
    columns = ["start", "method", "trial", "state", "accuracy", "values", "settings", *map(SEED, seeds)]
    return pd.DataFrame([rows[key] for key in sorted(rows)], columns=columns)


def trials_of(plan: Plan, method: Method) -> int:
    """Return how many trials a method gets: all its choices where these are fewer."""
    return min(plan.trials, choices(method.search))


def choices(space: Search) -> float:
    """Count the choices of a search, infinity where one of its values is of a range."""
    return math.prod(math.inf if isinstance(values, Range) else len(values) for values in space.values())


def search(
    plan: Plan,
    start: str,
    method: Method,
    known: Mapping[tuple[str, ...], float],
    keep: Callable[[dict[str, Any]], None],
) -> Trials:
    """Propose one method's trials, one after the other; what a trial gave is handed to `keep`.

    known: what an earlier run gave, as `accuracies_of` returns it.
    """
    name, space, count = method.name, method.search, trials_of(plan, method)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(
            seed=derive_seed(0, "tune", start, name) % 2**32, multivariate=True
        ),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    )
    base = plan.settings(start, plan.seeds[0])
    own = {setting: dotted(base, setting) for setting in space}
    study.enqueue_trial(encoded(own, space))
    exhaustive = choices(space) <= plan.trials
    if exhaustive:  # all of them, on all seeds
        for values in product(*space.values()):
            study.enqueue_trial(encoded(dict(zip(space, values, strict=True)), space), skip_if_exists=True)
    settings = digest_of(plan, start, method)
    for number in range(int(count)):
        trial = study.ask()
        values = {setting: suggest(trial, setting, allowed) for setting, allowed in space.items()}
        found, state = dict[int, float](), COMPLETE
        for seed in plan.seeds:
            accuracy = known.get((start, name, settings, json.dumps(values), SEED(seed)))
            if accuracy is None:
                accuracy = yield name, plan.settings(start, seed, values)
            if accuracy is None or math.isnan(accuracy):
                state = FAILED
                break
            found[seed] = accuracy
            trial.report(fmean(found.values()), len(found))
            if len(found) < len(plan.seeds) and not exhaustive and trial.should_prune():
                state = STOPPED
                break
        mean = fmean(found.values()) if found else math.nan
        told = {COMPLETE: "COMPLETE", STOPPED: "PRUNED", FAILED: "FAIL"}[state]
        study.tell(trial, mean if state == COMPLETE else None, optuna.trial.TrialState[told])
        row = {"start": start, "method": name, "trial": number, "state": state, "accuracy": mean}
        row |= {"values": json.dumps(values), "settings": settings}
        keep(row | {SEED(seed): value for seed, value in found.items()})


def encoded(values: Mapping[str, Any], space: Search) -> dict[str, Any]:
    """Return values as Optuna's parameters: numbers of ranges as they are, choices as JSON.

    A value that tuning may not try, such as one of the smoke profile, is left to the sampler.
    """
    parameters = dict[str, Any]()
    for name, value in values.items():
        allowed = space[name]
        if isinstance(allowed, Range):
            parameters |= {name: value} if allowed.low <= value <= allowed.high else {}
        elif value in allowed:
            parameters[name] = json.dumps(value)
    return parameters


def suggest(trial: optuna.Trial, name: str, allowed: Range | Sequence[Any]) -> Any:
    """Return Optuna's proposal for one setting; numbers of ranges with four digits."""
    if isinstance(allowed, Range):
        return float(f"{trial.suggest_float(name, allowed.low, allowed.high, log=allowed.log):.4g}")
    return json.loads(trial.suggest_categorical(name, [json.dumps(value) for value in allowed]))


def advance(searches: Sequence[Trials], store: Store, show: Callable[[], None]) -> None:
    """Run all searches to their end, side by side; show is called whenever some have moved on.

    What took longest in the round before begins first, so that workers end together.
    """
    waiting: dict[int, Pair] = {}
    seconds: dict[int, float] = {}

    def step(index: int, accuracy: float | None) -> None:
        try:
            waiting[index] = searches[index].send(accuracy)
        except StopIteration:
            waiting.pop(index, None)

    for index in range(len(searches)):
        step(index, None)
    show()
    while waiting:
        order = sorted(waiting, key=lambda index: (-seconds.get(index, math.inf), index))
        found = {}
        for place, (accuracy, spent) in parallel(partial(_measure, store.root), [waiting[i] for i in order]):
            found[order[place]], seconds[order[place]] = accuracy, spent
        for index in sorted(found):
            step(index, found[index])
        show()


def _measure(store: Path, pair: Pair) -> tuple[float | None, float]:
    """Return a validation accuracy, None where the student diverged, and the seconds that it took."""
    method, settings = pair
    began = time.perf_counter()
    try:
        accuracy = round(Experiment(settings, store).validation_accuracy(method), 6)
    except Diverged:
        accuracy = None
    return accuracy, time.perf_counter() - began


def read_trials(path: Path | None) -> pd.DataFrame:
    """Read a table of trials, empty where there is no file; BadInput for a table of something else."""
    names = ["start", "method", "trial", "state", "accuracy", "values", "settings"]
    if path is None or not path.exists():
        return pd.DataFrame(columns=names)
    try:
        table = pd.read_csv(
            path, dtype=dict.fromkeys(("start", "method", "state", "values", "settings"), str)
        )
    except (ValueError, UnicodeDecodeError) as error:
        raise BadInput(f"out={str(path)!r} is no table of trials: it cannot be read as CSV") from error
    if not {*names} <= {*table.columns}:
        raise BadInput(f"out={str(path)!r} is no table of trials: its columns are {', '.join(table.columns)}")
    return table


def accuracies_of(trials: pd.DataFrame) -> dict[tuple[str, ...], float]:
    """Return start, method, settings, values and column of the seed -> accuracy; NaN where a trial failed."""
    seeds, found = [column for column in trials.columns if column.startswith("seed ")], {}
    for _, row in trials.iterrows():
        for column in seeds:
            if row["state"] == FAILED or not math.isnan(row[column]):
                found[(*row[["start", "method", "settings", "values"]], column)] = row[column]
    return found


def best_values(trials: pd.DataFrame) -> dict[str, dict[str, Values]]:
    """Return start -> method -> values of the complete trial with the highest accuracy; of equals the first.

    Methods that run under another's values (`tuned_as`) are listed with these.
    """
    done = trials[trials["state"] == COMPLETE]
    best = done.loc[done.groupby(["start", "method"], sort=False)["accuracy"].idxmax()]
    tuned: dict[str, dict[str, Values]] = {}
    for start, some in best.groupby("start", sort=False):
        found = dict(zip(some["method"], map(json.loads, some["values"]), strict=True))
        tuned[str(start)] = {
            name: dict(found[method.tuned_as]) for name, method in METHODS.items() if method.tuned_as in found
        }
    return tuned


def write_tuned(tuned: Mapping[str, Mapping[str, Values]], profile: str, path: Path) -> None:
    """Write the values of `best_values` for a profile; what else the file has stays."""
    tree = read_tuned(path)
    for start, methods in tuned.items():
        tree.setdefault(profile, {}).setdefault(start, {}).update(methods)
    text = "# Written by `fedmitr tune`: profile, shared start, method, and the values that won its trials.\n"
    write_text(text + yaml.safe_dump(tree, sort_keys=False), path)
