"""One function a picture: tensors and tables in, a matplotlib Figure out. `save` writes it and shows it."""

from . import widgets
from .accuracies import bars, confidence, panels, per_class
from .attacks import leakage, neighbours, roc
from .clients import scenes, shard_grid, shards, skew
from .images import attention, curves, emerging, foreground, frame, generated, one_of_each, places, schedule
from .labels import overview, token_labels
from .methods import comparison, costs, weights
from .scale import projection, scaling
from .study import across_grounds, cell_differences, forest, tradeoffs
from .style import save, show
from .transfer import pretraining
from .why import errors, toy

__all__ = [
    "across_grounds",
    "attention",
    "bars",
    "cell_differences",
    "comparison",
    "confidence",
    "costs",
    "curves",
    "emerging",
    "errors",
    "foreground",
    "forest",
    "frame",
    "generated",
    "leakage",
    "neighbours",
    "one_of_each",
    "overview",
    "panels",
    "per_class",
    "places",
    "pretraining",
    "projection",
    "roc",
    "save",
    "scaling",
    "scenes",
    "schedule",
    "shard_grid",
    "shards",
    "show",
    "skew",
    "token_labels",
    "toy",
    "tradeoffs",
    "weights",
    "widgets",
]
