"""One function a picture: tensors and tables in, a matplotlib Figure out. `save` writes it and shows it."""

from . import widgets
from .accuracies import bars, confidence, panels, per_class
from .attacks import in_and_out, leakage, neighbours, roc
from .clients import client_images, scenes, shard_grid, shards, skew
from .images import (
    animation,
    attention,
    curves,
    emerging,
    foreground,
    frame,
    generated,
    one_of_each,
    places,
    schedule,
)
from .labels import overview, token_labels
from .methods import client_attention, comparison, weights
from .study import across_grounds, cell_differences, forest, pairing, tradeoffs
from .style import save, save_animation, show
from .theory import drift, gaps, gradient_lengths, noise_parts, patch_gradients, variances
from .trends import accuracy_against_epsilon, pretraining, projection, scaling, stage_costs
from .why import errors, toy

__all__ = [
    "accuracy_against_epsilon",
    "across_grounds",
    "animation",
    "attention",
    "bars",
    "cell_differences",
    "client_attention",
    "client_images",
    "comparison",
    "confidence",
    "curves",
    "drift",
    "emerging",
    "errors",
    "foreground",
    "forest",
    "frame",
    "gaps",
    "generated",
    "gradient_lengths",
    "in_and_out",
    "leakage",
    "neighbours",
    "noise_parts",
    "one_of_each",
    "overview",
    "pairing",
    "panels",
    "patch_gradients",
    "per_class",
    "places",
    "pretraining",
    "projection",
    "roc",
    "save",
    "save_animation",
    "scaling",
    "scenes",
    "schedule",
    "shard_grid",
    "shards",
    "show",
    "skew",
    "stage_costs",
    "token_labels",
    "toy",
    "tradeoffs",
    "variances",
    "weights",
    "widgets",
]
