"""Seconds per inverted image, and how sure the ensemble then is of the target: before and after a change.

python benchmarks/time_to_quality.py --seeds 5-9                               the working tree
PYTHONPATH=../before python benchmarks/time_to_quality.py --seeds 5-9          another checkout of this layout

Also --set inversion.iterations=80 and the like. Every batch is inverted anew, in this process, one seed after
the other; clients come from a store of their own. Confidence is the mean probability of the target class.
`teacher`: of the surviving patches by the models that were inverted, which is what inversion optimises. Then
by the ensemble: `survivors`; `whole`, with the background as inverted; `views`, as a student is shown them.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import pandas as pd
import torch

import fedmitr as fm
from fedmitr.core.rng import derive_seed, make_rng
from fedmitr.experiments.compare import parse_seeds
from fedmitr.server.ensemble import held_classes
from fedmitr.server.synthetic import label_batches
from fedmitr.server.views import view
from fedmitr.settings import parse_assignment

VIEWS = 4
STRENGTH = 0.7  # of the views, whatever the settings say


@torch.inference_mode()
def confidence(
    ensemble: fm.Ensemble, synthetic: fm.SyntheticSet, settings: fm.Settings, seed: int
) -> dict[str, float]:
    """Return the mean probability of the target by the inverted models, and by the ensemble in three ways."""

    def by_ensemble(images: torch.Tensor, keep: torch.Tensor | None = None) -> float:
        probabilities = ensemble(images, keep).exp()  # (n, C)
        return probabilities.gather(1, synthetic.labels[:, None]).mean().item()

    survivors = synthetic.mask.int().topk(int(synthetic.mask[0].sum()), dim=1).indices  # (n, M)
    rng, pick = make_rng(seed, "quality"), torch.arange(len(synthetic))
    how = settings.distill.model_copy(update={"augment": STRENGTH})
    views = [view(ensemble.members[0], synthetic, pick, how, rng)[0] for _ in range(VIEWS)]
    return {
        "teacher": (-synthetic.loss).exp().mean().item(),
        "survivors": by_ensemble(synthetic.pixels, survivors),
        "whole": by_ensemble(synthetic.pixels),
        "views": sum(map(by_ensemble, views)) / VIEWS,
    }


def measure(settings: fm.Settings, store: Path) -> dict[str, float]:
    """Invert all batches of one seed's synthetic set, and return the seconds an image and the confidence."""
    uploads = fm.Experiment(settings, store).uploads
    ensemble = fm.Ensemble(uploads, settings.ensemble)
    batches = label_batches(settings.inversion, held_classes(uploads), settings.seed)
    start = time.perf_counter()
    synthetic = fm.SyntheticSet.concat(
        [
            fm.invert(
                ensemble, labels, settings.inversion, derive_seed(settings.seed, "batch", index), recorded=0
            )
            for index, labels in enumerate(batches)
        ]
    )
    seconds = (time.perf_counter() - start) / len(synthetic)
    return {"seconds per image": seconds} | confidence(ensemble, synthetic, settings, settings.seed)


@click.command()
@click.option("--seeds", default="5-9", show_default=True)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE")
@click.option(
    "--store", type=click.Path(path_type=Path), help="Keeps the clients; default a temporary folder."
)
def main(seeds: str, assignments: tuple[str, ...], store: Path | None) -> None:
    """Measure the laptop profile, with these settings changed."""
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
