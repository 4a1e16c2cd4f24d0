"""FisherMix (GH-OFL, Turazza et al., ICLR 2026, arXiv 2602.01186): a head trained on drawn features.

The server projects class means and covariance on the Fisher subspace, the at most C − 1 directions in which
classes differ most relative to their scatter. There it draws features from the class Gaussians, and trains a
linear head on them by cross-entropy. Published values, from the authors' public code: shrinkage 0.05,
99.5 % of the discriminative energy, 4,000 features a class, deviations times 0.9, AdamW at 8e-4 with weight
decay 3e-4, 40 epochs of batches of 2,048. The paper speaks of a cosine margin; its code trains a plain linear
head, and so do we.

What changes here: clients send one Gram matrix and not one for each class, so all classes have the covariance
that they share; the code's factor of the deviations, which it adapts by class, is one number.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.rng import make_rng
from ..core.store import Store
from ..server.statistics import Head, class_gaussians, fisher_directions, without_absent
from ..server.views import epochs
from ..settings import Settings, SettingsBlock
from ..settings.schema import Count, NotNegative, Positive, setting
from ..upload import Statistics, Upload
from ._method import Method, Outcome, Range
from ._statistics import SUMS, classify

CODE = "GH-OFL's code"


class FishermixSettings(SettingsBlock):
    """FisherMix: a linear head trained on features drawn in the Fisher subspace."""

    shrinkage: float = setting(
        0.05, "share of a multiple of the identity in the covariance", CODE, gt=0, le=1
    )
    energy: float = setting(0.995, "share of the discriminative energy that is kept", CODE, gt=0, le=1)
    per_class: Count = setting(4000, "features drawn for each class", CODE)
    spread: Positive = setting(0.9, "factor of the deviations that features are drawn with", CODE)
    epochs: Count = setting(40, "passes over the drawn features", CODE)
    batch_size: Count = setting(2048, "features per step", CODE)
    lr: Positive = setting(8e-4, "learning rate of AdamW", CODE)
    weight_decay: NotNegative = setting(3e-4, "weight decay of AdamW", CODE)


def fishermix(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn sums of features into one model: the shared backbone with a head trained on drawn features."""
    solve = partial(train_head, settings=settings.fishermix, rng=make_rng(settings.seed, "fishermix"))
    return classify(uploads, settings, solve)


def train_head(statistics: Statistics, settings: FishermixSettings, rng: torch.Generator) -> Head:
    """Train W and b on features drawn for the classes that have images; rng fixes draws and batches."""
    means, covariance = class_gaussians(statistics, settings.shrinkage)
    held = statistics.counts.nonzero()[:, 0]  # (C',)
    directions = fisher_directions(statistics, covariance, settings.energy)  # (D, k)
    drawn, labels = draw_features(means[held] @ directions, settings, rng)
    head = torch.nn.Linear(directions.shape[1], len(held), dtype=torch.double)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), settings.lr, weight_decay=settings.weight_decay)
    for pick in epochs(len(labels), settings.batch_size, rng, times=settings.epochs):
        optimizer.zero_grad()
        F.cross_entropy(head(drawn[pick]), labels[pick]).backward()
        optimizer.step()
    weight, bias = torch.zeros_like(means), torch.zeros(len(means), dtype=torch.double)
    weight[held], bias[held] = (head.weight @ directions.T).detach(), head.bias.detach()
    return without_absent(weight, bias, statistics.counts)


def draw_features(means: Tensor, settings: FishermixSettings, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw features (C'·m, k) around means (C', k), and their labels; in the Fisher subspace Σ is I."""
    labels = torch.arange(len(means)).repeat_interleave(settings.per_class)  # (C'·m,)
    noise = torch.randn(len(labels), means.shape[1], generator=rng, dtype=torch.double)
    return means[labels] + settings.spread * noise, labels


METHOD = Method(
    name="fishermix",
    run=fishermix,
    label="FisherMix",
    family="statistics",
    citation="GH-OFL: Turazza et al., ICLR 2026",
    settings=FishermixSettings,
    search={
        **SUMS,
        "fishermix.shrinkage": Range(1e-4, 0.5, log=True),
        "fishermix.spread": Range(0.5, 2.0, log=True),
        "fishermix.lr": Range(1e-4, 1e-1, log=True),
    },
    needs_weights=False,
    needs_statistics=True,
)
