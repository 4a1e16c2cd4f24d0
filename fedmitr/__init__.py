"""FedMITR: one-shot federated learning with Vision Transformers, reproducible from notebooks.

    import fedmitr as fm
    result = fm.run("fedmitr", fm.Settings.load("laptop", {"partition.alpha": 0.1}))

Folders, in the order that data flows: data, client, server, methods, evaluation, experiments, figures.
`upload` is what a client sends, `vision` the ViT, `settings` all settings, `core` store, processes, streams.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

# Threads that wait by spinning starve each other as soon as another process wants one of the cores; those
# that sleep at once wake up too late for the short products of a sparse iteration. So they spin for a
# moment, then sleep. OpenMP reads this when torch loads, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch


def _let_torchvision_import() -> None:
    """Make torchvision importable where its compiled operators do not match torch.

    torchvision then still offers data sets and transforms, all that timm and this package use;
    with a matching pair the operators load here and nothing changes.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or "torchvision" in sys.modules:
        return
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            name = "torchvision._meta_registrations"
            sys.modules.setdefault(name, types.ModuleType(name))


_let_torchvision_import()


# The package's own modules import timm and torchvision, so they come after the line above.
from .client.train import train_client
from .core.errors import BadInput
from .core.store import Store
from .data.partition import partition
from .data.tasks import Split, Task, load_task
from .experiments.result import Result
from .experiments.run import Experiment, run
from .server.distill import distill
from .server.ensemble import Ensemble
from .server.inversion import invert
from .server.relabel import relabel_tokens
from .server.synthetic import SyntheticSet
from .settings import Settings
from .upload import Upload
from .vision.vit import create_vit

__version__ = "0.1.0"
__all__ = [
    "BadInput",
    "Ensemble",
    "Experiment",
    "Result",
    "Settings",
    "Split",
    "Store",
    "SyntheticSet",
    "Task",
    "Upload",
    "create_vit",
    "distill",
    "invert",
    "load_task",
    "partition",
    "relabel_tokens",
    "run",
    "train_client",
]
