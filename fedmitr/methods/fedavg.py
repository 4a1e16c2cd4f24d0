"""One-shot FedAvg: the average of the uploads, weighted by shard size (McMahan et al., AISTATS 2017)."""

from collections.abc import Sequence

from ..runtime import device
from ..settings import Settings
from ..store import Store
from ..upload import Upload, average_weights
from .outcome import Outcome


def fedavg(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """w = Σ_k (n_k / n) w_k, in a single exchange."""
    vit = uploads[0].shape.build()
    vit.load_state_dict(average_weights(uploads))
    return Outcome([vit.eval().to(device())])
