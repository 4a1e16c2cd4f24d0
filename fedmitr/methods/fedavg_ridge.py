"""Ridge regression on the features of the averaged model, in two exchanges.

First every client sends its weights and the server averages them. Then it sends the average back, and clients
send sums of the average's features over their images. So the features are of a model that was trained on the
task, and the head is solved in closed form from all images.
"""

from collections.abc import Sequence

from ..core.store import Store
from ..settings import Settings
from ._method import Method, Outcome
from ._statistics import Client, solve_again
from .fedavg import average_weights
from .ridge import SEARCH


def fedavg_ridge(clients: Sequence[Client], settings: Settings, store: Store) -> Outcome:
    """Average the clients' weights, then solve for a head on the average's features."""
    uploads = [client.upload for client in clients]
    weights = average_weights(uploads)
    return solve_again(clients, [(uploads[0].shape, weights)], settings)


METHOD = Method(
    name="fedavg_ridge",
    run=fedavg_ridge,
    label="FedAvg + ridge",
    family="statistics",
    citation="FedAvg, then ridge as AFL and Fed3R",
    search=SEARCH,
    given="clients",
    averages=True,
    exchanges=2,
)
