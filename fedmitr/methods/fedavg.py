"""One-shot FedAvg: the average of the uploads, weighted by shard size (McMahan et al., AISTATS 2017)."""

from collections.abc import Sequence

from torch import Tensor

from ..core.machine import device
from ..core.store import Store
from ..settings import Settings
from ..upload import Upload, check_same_shape
from ._method import Method, Outcome


def fedavg(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Average the uploads into one model, in a single exchange."""
    vit = uploads[0].shape.build()
    vit.load_state_dict(average_weights(uploads))
    return Outcome([vit.eval().to(device())])


def average_weights(uploads: Sequence[Upload]) -> dict[str, Tensor]:
    """Average weights by shard size: w = Σ_k (n_k / n) w_k (McMahan et al. 2017, Algorithm 1).

    Raises BadInput for no uploads, and for uploads of several architectures.
    """
    check_same_shape(uploads)
    total = sum(u.size for u in uploads)
    return {
        name: sum(u.weights[name].double() * (u.size / total) for u in uploads).to(value.dtype)
        for name, value in uploads[0].weights.items()
    }


METHOD = Method(
    name="fedavg",
    run=fedavg,
    label="FedAvg",
    family="average",
    citation="McMahan et al., AISTATS 2017, in one exchange",
    averages=True,
)
