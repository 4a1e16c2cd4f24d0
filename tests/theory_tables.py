"""Invented tables of the theory, and a squared loss."""

from itertools import product

import numpy as np
import pandas as pd

from fedmitr.theory.experiment import CELLS, COLUMNS, INVERSIONS, RATE, STARTS
from fedmitr.theory.patches import GROUPS

STEPS = (0, 10, 20, 40)


def squared(model, x, y):
    """The mean of ½(θᵀx − y)² over a batch: x (B, p), y (B,)."""
    return 0.5 * (model(x)[:, 0] - y).square().mean()


def invented_students(seeds=4, starts=STARTS):
    """A table as results/theory.csv: relabelled and sparse students have less variance, and drift less."""
    rng, rows = np.random.default_rng(0), []
    for start, seed, cell, step in product(starts, range(seeds), CELLS, STEPS):
        low = (cell.inversion == "sparse") + 2 * (cell.labels == "relabel")
        noise = np.exp(0.02 * rng.standard_normal())
        row = dict.fromkeys(COLUMNS, 0.01 * noise)
        row |= {"start": start, "seed": seed, "inversion": cell.inversion, "labels": cell.labels}
        row |= {"images": 400 // cell.divided, "optimizer": cell.optimizer, "step": step}
        row |= {"rate": RATE if cell.optimizer == "sgd" else np.nan, "curvature": 3.0}
        row |= {"variance": 4.0 * noise / 2**low, "distance": cell.divided * step * 1e-5 * noise / 2**low}
        if cell.optimizer != "sgd":  # no twins
            row |= dict.fromkeys(("distance", "loss_distance", "loss_distance_max"), np.nan)
        row |= {"train_kd": 0.1, "held_out_kd": 0.1 + 0.01 * noise, "test_kd": 0.3, "accuracy": 0.5 * noise}
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def invented_inversions(seeds=4, starts=STARTS, iterations=6):
    """A table as results/theory_inversion.csv: stopped patches' gradients are smaller, and noise."""
    rng, rows = np.random.default_rng(1), []
    for start, seed, inversion, at, group in product(
        starts, range(seeds), INVERSIONS, range(iterations), GROUPS
    ):
        survives, gone = group == GROUPS[0], inversion == "sparse" and at > 3 and group == GROUPS[1]
        norm = np.nan if gone else (2.0 if survives else 1.0) * np.exp(0.02 * rng.standard_normal())
        same = np.nan if gone or at == 0 else (0.8 if survives else 0.5) + 0.01 * rng.standard_normal()
        rows.append((start, seed, inversion, at, group, 0 if gone else 9, norm, same))
    names = ["start", "seed", "inversion", "iteration", "patches", "count", "norm", "agreement"]
    return pd.DataFrame(rows, columns=names)
