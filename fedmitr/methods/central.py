"""All data in one place: the upper bound, and the only entry that is not federated."""

from collections.abc import Sequence

from ..core.machine import device
from ..core.store import Store
from ..settings import Settings
from ..upload import Upload
from ._method import Method, Outcome


def central(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Return the model of one client that holds every training image (`Experiment.central_upload`)."""
    (everything,) = uploads
    return Outcome([everything.vit().to(device())], downlink_bytes=0)


METHOD = Method(
    name="central",
    run=central,
    family="reference",
    citation="",
    given="central",
    sends=False,
    exchanges=0,
)
