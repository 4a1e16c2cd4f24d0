"""Local training alone: what each client has without any federation."""

from collections.abc import Sequence

from ..core.machine import device
from ..core.store import Store
from ..settings import Settings
from ..upload import Upload
from ._method import Method, Outcome


def local(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Return every client's own model; their mean accuracy is that of a client picked at random."""
    return Outcome([u.vit(share=True).to(device()) for u in uploads])


METHOD = Method(name="local", run=local, family="reference", citation="", sends=False, exchanges=0)
