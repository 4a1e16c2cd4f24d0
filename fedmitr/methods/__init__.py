"""Every method of the comparison: uploads in, the models it leaves out.

All share one signature, `method(uploads, settings, store) -> list of models`: one global model, or,
for `local`, one per client; the reported accuracy is the mean over the list. A method sees uploads
only, never a data set.
"""

from collections.abc import Callable, Sequence

from torch import nn

from ..settings import Settings
from ..store import Store
from ..upload import Upload
from .fedavg import fedavg
from .fedmitr import fedmitr
from .references import central, ensemble, local

Method = Callable[[Sequence[Upload], Settings, Store], list[nn.Module]]

METHODS: dict[str, Method] = {
    "fedmitr": fedmitr,
    "fedavg": fedavg,
    "ensemble": ensemble,
    "local": local,
    "central": central,
}
