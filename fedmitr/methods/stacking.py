"""Stacking: ridge regression on the features of all clients' models side by side, in two exchanges.

First every client sends its weights; the server sends all of them to all clients. Then clients send sums of
the K models' features over their images, and the server solves for one linear layer on all of them (Wolpert
1992, with features in place of predictions). Each prediction runs K models. The Gram matrix grows with K².
"""

from collections.abc import Sequence

from ..core.store import Store
from ..settings import Settings
from ..upload import check_same_images
from ._method import Method, Outcome
from ._statistics import Client, solve_again
from .ridge import SEARCH


def stacking(clients: Sequence[Client], settings: Settings, store: Store) -> Outcome:
    """Solve for one head on the features of all clients' models."""
    uploads = [client.upload for client in clients]
    check_same_images(uploads)
    return solve_again(clients, [(u.shape, u.weights) for u in uploads], settings)


METHOD = Method(
    name="stacking",
    run=stacking,
    label="stacking",
    family="statistics",
    citation="Wolpert, Neural Networks 1992, on features",
    search=SEARCH,
    given="clients",
    single_model=False,
    exchanges=2,
)
