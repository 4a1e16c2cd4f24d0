"""The partition of the training images among clients: every image belongs to exactly one."""

import numpy as np
import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.rng import derive_seed
from ..settings.schema import PartitionSettings

REDRAWS = 500  # draws of shares before the best of them is topped up


def partition(
    labels: Tensor, settings: PartitionSettings, seed: int, domains: Tensor | None = None
) -> list[Tensor]:
    """Split n images with labels (n,) among K clients.

    Returns K shards, sorted indices that together are 0, …, n − 1 once each. domains (n,): the domain of each
    image, which scheme=domain needs. Raises BadInput when K · min_size is more than n, and when a scheme that
    deals classes, equal parts or domains leaves a client fewer images than min_size.
    """
    targets = labels.numpy()
    least = max(1, settings.min_size)
    if settings.clients * least > len(targets):
        raise BadInput(
            f"partition.clients={settings.clients} with partition.min_size={least} needs "
            f"{settings.clients * least} images: allowed are up to {len(targets) // least} clients here"
        )
    rng = np.random.default_rng(derive_seed(seed, "partition"))
    if settings.scheme == "domain":
        shards = _by_domain(domains, settings)
    else:
        shards = SCHEMES[settings.scheme](targets, settings, rng)
    smallest = min(map(len, shards))
    if smallest < least:
        raise BadInput(
            f"partition.min_size={least}: the smallest shard of scheme={settings.scheme} holds {smallest}; "
            f"allowed here is up to {smallest}"
        )
    return [torch.from_numpy(np.sort(s)) for s in shards]


def _dirichlet(
    targets: np.ndarray, settings: PartitionSettings, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deal each class by shares p ~ Dir(α, …, α) over the clients (Hsu et al. 2019)."""

    def draw() -> list[np.ndarray]:
        shards: list[list[np.ndarray]] = [[] for _ in range(settings.clients)]
        for label in np.unique(targets):
            members = rng.permutation(np.flatnonzero(targets == label))
            shares = _shares(rng, settings.alpha, settings.clients)
            for shard, part in zip(shards, _cut(members, shares), strict=True):
                shard.append(part)
        return [np.concatenate(s) for s in shards]

    return _redraw(draw, settings)


def _quantity(targets: np.ndarray, settings: PartitionSettings, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal all images by shares p ~ Dir(α, …, α), whatever their class (quantity skew, Li et al. 2022)."""

    def draw() -> list[np.ndarray]:
        return _cut(rng.permutation(len(targets)), _shares(rng, settings.alpha, settings.clients))

    return _redraw(draw, settings)


def _iid(targets: np.ndarray, settings: PartitionSettings, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal all images in equal parts."""
    return np.array_split(rng.permutation(len(targets)), settings.clients)


def _class_shards(
    targets: np.ndarray, settings: PartitionSettings, rng: np.random.Generator
) -> list[np.ndarray]:
    """Give each client `classes_per_client` classes; a class is dealt equally to the clients that hold it."""
    classes, each, clients = np.unique(targets), settings.classes_per_client, settings.clients
    if each > len(classes) or each * clients < len(classes):
        raise BadInput(
            f"partition.classes_per_client={each} with {clients} clients cannot cover {len(classes)} classes:"
            f" allowed are {-(-len(classes) // clients)} to {len(classes)}"
        )
    # a cycle over one random order deals every client distinct classes, each class equally often
    order = rng.permutation(classes)
    dealt = [order[np.arange(k * each, (k + 1) * each) % len(order)] for k in range(clients)]
    shards: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in classes:
        holders = [k for k in range(clients) if label in dealt[k]]
        members = rng.permutation(np.flatnonzero(targets == label))
        for client, part in zip(holders, np.array_split(members, len(holders)), strict=True):
            shards[client].append(part)
    return [np.concatenate(s) for s in shards]


def _by_domain(domains: Tensor | None, settings: PartitionSettings) -> list[np.ndarray]:
    """Give client k domain k: images of the same classes differ in style between clients (feature skew)."""
    if domains is None:
        raise BadInput(
            "partition.scheme='domain' needs a task with domains: allowed is task.name=office-home"
        )
    count = int(domains.max()) + 1
    if settings.clients != count:
        raise BadInput(
            f"partition.clients={settings.clients} with scheme=domain: allowed is {count}, one a domain"
        )
    return [np.flatnonzero(domains.numpy() == k) for k in range(count)]


SCHEMES = {"dirichlet": _dirichlet, "shards": _class_shards, "iid": _iid, "quantity": _quantity}


def _shares(rng: np.random.Generator, alpha: float, clients: int) -> np.ndarray:
    """Draw shares (K,) ~ Dir(α, …, α)."""
    shares = rng.dirichlet(np.full(clients, alpha))
    if not np.isfinite(shares).all():  # numpy underflows for the smallest alphas: all mass on one client
        shares = np.eye(clients)[rng.integers(clients)]
    return shares


def _cut(members: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """Cut members (m,) into consecutive parts of the given shares (K,), rounding the cumulative counts."""
    cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
    return np.split(members, cuts)


def _redraw(draw, settings: PartitionSettings) -> list[np.ndarray]:
    """Return the first draw in which every client holds `min_size` images; else the nearest to it, topped up.

    Where α is small for the number of clients, no draw may give every client enough. Then clients get what
    they lack from the largest shard; if classes were dealt one by one, its end is images of one class.
    """
    nearest = None
    for _ in range(REDRAWS):
        shards = draw()
        missing = sum(max(0, settings.min_size - len(s)) for s in shards)
        if not missing:
            return shards
        if nearest is None or missing < nearest[0]:
            nearest = missing, shards
    return _top_up(nearest[1], settings.min_size)


def _top_up(shards: list[np.ndarray], least: int) -> list[np.ndarray]:
    """Give each shard that has fewer than `least` images what it lacks, from the end of the largest shard."""
    shards = list(shards)
    for client in range(len(shards)):
        while (lacking := least - len(shards[client])) > 0:
            donor = max(range(len(shards)), key=lambda k: len(shards[k]))
            given = min(lacking, len(shards[donor]) - least)
            shards[client] = np.concatenate([shards[client], shards[donor][-given:]])
            shards[donor] = shards[donor][:-given]
    return shards


def class_counts(labels: Tensor, shards: list[Tensor], num_classes: int) -> Tensor:
    """Count the images of each class that each client holds: the histograms c_k, (K, C)."""
    return torch.stack([torch.bincount(labels[s], minlength=num_classes) for s in shards])
