"""Every method of the comparison: uploads in, an Outcome out: the models it leaves and what they cost.

All share one signature, `method(uploads, settings, store) -> Outcome`. A method sees uploads only,
never a data set. Two differ in what they are given: `central` gets the one upload of a client that
holds all data, and `fusefl`, which takes several exchanges, gets the clients behind a narrow protocol.
The reported accuracy is the mean over the outcome's models: one, or one per client for `local`.
"""

from collections.abc import Callable, Sequence

from ..settings import Settings
from ..store import Store
from ..upload import Upload
from .co_boosting import co_boosting
from .dense import dense
from .fadi import fadi
from .fdafl import fdafl
from .fedavg import fedavg
from .fedftg import fedftg
from .fedmitr import fedmitr
from .fusefl import fusefl
from .outcome import Outcome
from .references import central, ensemble, local

Method = Callable[[Sequence[Upload], Settings, Store], Outcome]

METHODS: dict[str, Method] = {
    "fedmitr": fedmitr,
    "fedavg": fedavg,
    "fdafl": fdafl,
    "fadi": fadi,
    "dense": dense,
    "co_boosting": co_boosting,
    "fedftg": fedftg,
    "fusefl": fusefl,
    "ensemble": ensemble,
    "local": local,
    "central": central,
}
