"""FedMITR: one-shot federated learning with Vision Transformers, reproducible from notebooks.

    import fedmitr as fm
    result = fm.run("fedmitr", fm.Settings.load("laptop", {"partition.alpha": 0.1}))

The rooms, in the order data flows: tasks, partition, client | upload | ensemble, inversion, relabel,
distill, methods; around them experiment, metrics, plots, widgets, cli.
"""

import importlib.util
import sys
import types
from pathlib import Path

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
from .client import train_client  # noqa: E402
from .distill import distill  # noqa: E402
from .ensemble import Ensemble  # noqa: E402
from .errors import BadInput  # noqa: E402
from .experiment import Experiment, Result, run  # noqa: E402
from .inversion import SyntheticSet, invert  # noqa: E402
from .partition import partition  # noqa: E402
from .relabel import relabel_tokens  # noqa: E402
from .settings import Settings  # noqa: E402
from .store import Store  # noqa: E402
from .tasks import Split, Task, load_task  # noqa: E402
from .upload import Upload  # noqa: E402
from .vit import create_vit  # noqa: E402

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
