"""What a method is measured against: the clients alone, all of them at once, and all data in one place."""

from collections.abc import Sequence

from torch import nn

from ..ensemble import Ensemble
from ..runtime import device
from ..settings import Settings
from ..store import Store
from ..upload import Upload


def local(uploads: Sequence[Upload], settings: Settings, store: Store) -> list[nn.Module]:
    """Every client's own model; the mean is what a client picked at random would have."""
    return [u.vit().to(device()) for u in uploads]


def ensemble(uploads: Sequence[Upload], settings: Settings, store: Store) -> list[nn.Module]:
    """All uploads answering together: not a single model, K times the inference cost."""
    return [Ensemble(uploads, settings.ensemble).to(device())]


def central(uploads: Sequence[Upload], settings: Settings, store: Store) -> list[nn.Module]:
    """The upper bound: the model of one client that holds every training image.

    The one method that is not federated; its only upload comes from `experiment.central_upload`.
    """
    (everything,) = uploads
    return [everything.vit().to(device())]
