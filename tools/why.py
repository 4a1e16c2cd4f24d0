"""Make what docs/why-it-works.md shows: results/errors.csv and two figures; run by `make why`.

Which errors do models make from uploads of clients with almost disjoint classes: between classes that one
client has seen side by side, or between classes of different clients? Validation images of the tuning seeds,
α = 0.1, both starts. Needs what `make transfer` leaves in the store; else clients train first.
"""

from pathlib import Path

import click
import pandas as pd
import torch

from fedmitr import figures
from fedmitr.core.paths import DEFAULT_PROFILE, default_store, home
from fedmitr.core.store import Store, write_csv
from fedmitr.data.partition import class_counts
from fedmitr.evaluation.metrics import error_kinds, predicted_classes
from fedmitr.experiments.run import Experiment
from fedmitr.settings import Settings

STARTS = {"vit_micro_early": "early start", "vit_micro": "shipped start"}
PLAIN = {"fedmitr_plus.regions": False, "fedmitr_plus.views": 0}  # ridge's own sums
MODELS = {  # name -> method and its settings
    "ensemble, class weights": ("ensemble", {"ensemble.mode": "class"}),
    "ridge": ("ridge", {}),
    "ensemble + ridge": ("ensemble_statistics", PLAIN),
    "ridge+": ("ridge_plus", {}),
    "ensemble + ridge+": ("ensemble_statistics", {}),
    "FedMITR+": ("fedmitr_plus", {}),
}

CHANCE = "a wrong class at random"


def rows(profile: str, start: str, seed: int, store: Store) -> list[dict]:
    """Return the kinds of errors of every model, from one start, on one seed's clients; last, by chance."""
    settings, found = Settings.load(profile, {"model.name": start, "seed": seed}), []
    usual = Experiment(settings, store)
    task, labels = usual.task, usual.task.validation.labels
    counts = class_counts(task.train.labels, usual.shards, len(task.classes))
    for name, (method, changes) in MODELS.items():
        experiment = Experiment(settings.changed(changes), store) if changes else usual
        predicted = predicted_classes(experiment.models(method), task.validation.images)[0]
        kinds = error_kinds(predicted, labels, counts)
        found.append({"start": start, "seed": seed, "model": name} | kinds)
    wrong = torch.stack([labels + k for k in range(1, len(task.classes))]) % len(task.classes)  # (C − 1, n)
    kinds = error_kinds(wrong.flatten(), labels.repeat(len(wrong)), counts)
    return [*found, {"start": start, "seed": seed, "model": CHANCE} | kinds]


@click.command()
@click.option(
    "--profile", default=DEFAULT_PROFILE, show_default=True, help="Another one only to try this script."
)
@click.option("--seeds", default=5, show_default=True, help="How many, from 0 on.")
@click.option("--into", type=click.Path(path_type=Path), help="Default: this checkout.")
def main(profile: str, seeds: int, into: Path | None) -> None:
    """Write the table and the figures."""
    into, store = into or home(), Store(default_store())
    made = [row for start in STARTS for seed in range(seeds) for row in rows(profile, start, seed, store)]
    table = pd.DataFrame(made)
    for name in ("results", "docs"):
        (into / name).mkdir(parents=True, exist_ok=True)
    write_csv(table, into / "results" / "errors.csv", digits=6)
    shown = table[table["model"] != CHANCE]
    for name, figure in {"why_errors": figures.errors(shown, STARTS), "why_toy": figures.toy()}.items():
        (into / "docs" / f"{name}.png").write_bytes(figures.show(figure).data)
    means = table.drop(columns="seed").groupby(["start", "model"], sort=False).mean()
    click.echo(means.round(3).to_string())


if __name__ == "__main__":
    main()
