"""What a method is measured against: the clients alone, all of them at once, and all data in one place."""

from collections.abc import Sequence

from ..runtime import device
from ..settings import Settings
from ..store import Store
from ..upload import Upload
from .outcome import Outcome
from .rounds import teacher


def local(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Every client's own model, nothing sent; the mean is what a client picked at random would have."""
    return Outcome([u.vit(share=True).to(device()) for u in uploads], exchanges=0, uplink_bytes=0)


def ensemble(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """All uploads answering together: not a single model, K times the inference cost."""
    return Outcome([teacher(uploads, settings)])


def central(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """The upper bound: the model of one client that holds every training image.

    The one method that is not federated; its only upload comes from `experiment.central_upload`.
    """
    (everything,) = uploads
    return Outcome([everything.vit().to(device())], exchanges=0, uplink_bytes=0, downlink_bytes=0)
