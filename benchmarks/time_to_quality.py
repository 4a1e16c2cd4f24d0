"""Seconds per inverted image, and how sure the ensemble then is of the target: before and after a change.

python benchmarks/time_to_quality.py --seeds 5-9                            the working tree
PYTHONPATH=../before python benchmarks/time_to_quality.py --seeds 5-9       another checkout of the repository

Also --set inversion.iterations=80 and the like. Every batch is inverted anew, in this process, one seed
after the other; clients come from a store of their own. Confidence is the mean probability of the target:
`teacher`, of the surviving patches by whoever was inverted, which is what inversion optimises; then by
the ensemble: `survivors`; `whole`, with the background as inverted; `views`, of views as a student's.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import pandas as pd
import torch

import fedmitr as fm
from fedmitr.cli import parse_seeds
from fedmitr.core.rng import derive_seed, make_rng
from fedmitr.server.synthetic import SyntheticSet, label_batches
from fedmitr.server.views import view
from fedmitr.settings import parse_assignment

VIEWS = 4
STRENGTH = 0.7  # of the views, whatever the settings say


@torch.inference_mode()
def confidence(
    ensemble: fm.Ensemble, made: SyntheticSet, settings: fm.Settings, seed: int
) -> dict[str, float]:
    """Mean probability of the target by whoever was inverted, then by the ensemble on three kinds of view."""

    def of(images: torch.Tensor, keep: torch.Tensor | None = None) -> float:
        return ensemble(images, keep).exp().gather(1, made.labels[:, None]).mean().item()

    survivors = made.mask.int().topk(int(made.mask[0].sum()), dim=1).indices
    rng, everyone = make_rng(seed, "quality"), torch.arange(len(made))
    member = ensemble.members[0]
    how = settings.distill.model_copy(update={"augment": STRENGTH})
    views = [of(view(member, made, everyone, how, rng)[0]) for _ in range(VIEWS)]
    teacher = (-made.loss).exp().mean().item()
    found = {"teacher": teacher, "survivors": of(made.pixels, survivors), "whole": of(made.pixels)}
    return found | {"views": sum(views) / VIEWS}


def measure(settings: fm.Settings, store: Path) -> dict[str, float]:
    """One seed: all batches of the run's synthetic set."""
    ensemble = fm.Ensemble(fm.Experiment(settings, store).uploads, settings.ensemble)
    batches = label_batches(settings.inversion, ensemble.num_classes, settings.seed)
    start = time.perf_counter()
    made = SyntheticSet.concat(
        [
            fm.invert(
                ensemble, labels, settings.inversion, derive_seed(settings.seed, "batch", index), recorded=0
            )
            for index, labels in enumerate(batches)
        ]
    )
    seconds = (time.perf_counter() - start) / len(made)
    return {"seconds per image": seconds} | confidence(ensemble, made, settings, settings.seed)


@click.command()
@click.option("--seeds", default="5-9", show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE")
@click.option(
    "--store", type=click.Path(path_type=Path), help="Keeps the clients; default a temporary folder."
)
def main(seeds: str, assignments: tuple[str, ...], store: Path | None) -> None:
    """Measure the laptop profile with these settings."""
    overrides = dict(map(parse_assignment, assignments))
    with TemporaryDirectory() as folder:
        rows = {
            seed: measure(fm.Settings.load("laptop", overrides | {"seed": seed}), store or Path(folder))
            for seed in parse_seeds(seeds)
        }
    table = pd.DataFrame(rows).T
    click.echo(pd.concat([table, table.mean().rename("mean").to_frame().T]).round(3).to_string())


if __name__ == "__main__":
    main()
