"""partition.py: an exact cover by properties, the schemes by what their names promise."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fedmitr.core.errors import BadInput
from fedmitr.data.partition import class_counts, partition
from fedmitr.settings.schema import PartitionSettings

LABELS = torch.arange(1200) % 10  # every class 120 times
SCHEMES = ("dirichlet", "shards", "iid", "quantity")
SEEDS = st.integers(0, 10_000)


def shard(scheme, clients, seed, labels=LABELS, **more):
    return partition(labels, PartitionSettings(scheme=scheme, clients=clients, **more), seed)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(clients=st.integers(1, 20), seed=SEEDS, alpha=st.sampled_from([0.3, 1.0, 100.0]))
def test_shards_cover_every_image_once_reproducibly(scheme, clients, seed, alpha):
    assume(scheme != "shards" or 2 * clients >= 10)
    options = dict(alpha=alpha, min_size=1)
    shards = shard(scheme, clients, seed, **options)
    assert len(shards) == clients and all(s.dtype == torch.int64 and len(s) >= 1 for s in shards)
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(len(LABELS)))
    assert all(torch.equal(s, s.sort().values) for s in shards)
    again = shard(scheme, clients, seed, **options)
    assert all(torch.equal(a, b) for a, b in zip(shards, again, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_gives_another_partition(scheme):
    one, two = (shard(scheme, 5, seed, alpha=1.0) for seed in (0, 1))
    assert any(len(a) != len(b) or not torch.equal(a, b) for a, b in zip(one, two, strict=True))


@given(clients=st.integers(1, 20), least=st.integers(1, 40), seed=SEEDS)
def test_every_client_holds_at_least_min_size(clients, least, seed):
    shards = shard("dirichlet", clients, seed, alpha=5.0, min_size=least)
    assert min(map(len, shards)) >= least


@given(clients=st.integers(1, 20), each=st.integers(1, 10), seed=SEEDS)
def test_class_shards_hold_exactly_c_classes_in_equal_parts(clients, each, seed):
    assume(clients * each >= 10)
    shards = shard("shards", clients, seed, classes_per_client=each, min_size=1)
    counts = class_counts(LABELS, shards, 10)
    assert ((counts > 0).sum(dim=1) == each).all()
    for label in range(10):
        held = counts[:, label][counts[:, label] > 0]
        assert held.max() - held.min() <= 1
    holders = (counts > 0).sum(dim=0)
    assert holders.max() - holders.min() <= 1


@given(clients=st.integers(1, 20), seed=SEEDS)
def test_iid_shards_are_equal_in_size_and_near_equal_in_class(clients, seed):
    shards = shard("iid", clients, seed)
    sizes = [len(s) for s in shards]
    assert max(sizes) - min(sizes) <= 1
    expected = 120 / clients
    assert ((class_counts(LABELS, shards, 10) - expected).abs() <= 6 * expected**0.5).all()


def share_samples(scheme, clients, alpha, seeds):
    """Every share of a class (or, for quantity, of everything) that a client was dealt."""
    counts = [class_counts(LABELS, shard(scheme, clients, s, alpha=alpha, min_size=1), 10) for s in seeds]
    stacked = torch.stack(counts).double()
    return (stacked / 120 if scheme == "dirichlet" else stacked.sum(-1, keepdim=True) / 1200).numpy()


@pytest.mark.parametrize("scheme, seeds", [("dirichlet", range(150)), ("quantity", range(900))])
@pytest.mark.parametrize("clients, alpha", [(4, 1.0), (3, 5.0)])
def test_shares_have_the_dirichlets_mean_and_variance(scheme, seeds, clients, alpha):
    shares = share_samples(scheme, clients, alpha, seeds)
    of_first = shares[:, 0].ravel()  # one share a draw: the others of a draw are not independent of it
    mean = 1 / clients
    variance = mean * (1 - mean) / (clients * alpha + 1)
    n = len(of_first)
    assert abs(of_first.mean() - mean) < 4 * (variance / n) ** 0.5
    spread = ((of_first - of_first.mean()) ** 2).var() ** 0.5 / n**0.5
    assert abs(of_first.var() - variance) < 4 * spread + 1 / 120**2


def test_quantity_skew_leaves_the_classes_as_they_fall():
    shards = shard("quantity", 4, 3, alpha=1.0, min_size=100)
    counts = class_counts(LABELS, shards, 10).double()
    expected = counts.sum(1, keepdim=True) / 10
    assert ((counts - expected).abs() <= 6 * expected**0.5).all()
    assert counts.sum(1).max() > 1.2 * counts.sum(1).min()


def test_a_tiny_alpha_gives_every_class_to_one_client():
    counts = class_counts(LABELS, shard("dirichlet", 2, 0, alpha=1e-300, min_size=1), 10)
    assert ((counts == 0) | (counts == 120)).all()


@pytest.mark.parametrize("scheme", ["dirichlet", "quantity"])
@pytest.mark.parametrize("clients, least", [(20, 10), (3, 400), (120, 10)])
def test_where_no_draw_suffices_small_shards_are_topped_up(scheme, clients, least):
    shards = shard(scheme, clients, 0, alpha=0.001, min_size=least)
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(len(LABELS)))
    sizes = sorted(map(len, shards))
    assert sizes[0] >= least


def test_who_is_topped_up_gets_images_of_few_classes():
    counts = class_counts(LABELS, shard("dirichlet", 20, 0, alpha=0.001, min_size=10), 10)
    assert (counts > 0).sum(1).float().mean() < 2.5


def test_class_counts_against_a_loop():
    shards = shard("dirichlet", 3, 0)
    brute = np.zeros((3, 10), dtype=int)
    for k, part in enumerate(shards):
        for i in part:
            brute[k, LABELS[i]] += 1
    assert (class_counts(LABELS, shards, 10).numpy() == brute).all()


@pytest.mark.parametrize(
    "options, name",
    [
        (dict(scheme="iid", clients=1201, min_size=1), "partition.clients=1201"),
        (dict(scheme="dirichlet", clients=130, min_size=10), "partition.clients=130"),
        (dict(scheme="iid", clients=5, min_size=241), "partition.min_size=241"),
        (dict(scheme="shards", clients=4, classes_per_client=2), "partition.classes_per_client=2"),
        (dict(scheme="shards", clients=4, classes_per_client=11), "partition.classes_per_client=11"),
        (dict(scheme="shards", clients=7, classes_per_client=2, min_size=150), "partition.min_size=150"),
    ],
)
def test_what_cannot_be_dealt_is_one_line(options, name, one_line):
    with pytest.raises(BadInput) as error:
        partition(LABELS, PartitionSettings(**options), 0)
    one_line(error.value, name)


def test_other_numbers_of_clients_than_domains_are_one_line(one_line):
    domains = torch.arange(40) % 4
    for count in (3, 5):
        with pytest.raises(BadInput) as error:
            partition(domains, PartitionSettings(scheme="domain", clients=count, min_size=1), 0, domains)
        one_line(error.value, f"partition.clients={count}", "4")
    with pytest.raises(BadInput) as error:
        partition(domains, PartitionSettings(scheme="domain", clients=4), 0)
    one_line(error.value, "partition.scheme='domain'", "office-home")
    with pytest.raises(BadInput) as error:
        partition(domains, PartitionSettings(scheme="domain", clients=4), 0, (domains > 0).long() * 3)
    one_line(error.value, "partition.min_size=10", "0")


def test_one_image_each_is_possible():
    shards = partition(LABELS, PartitionSettings(scheme="iid", clients=1200, min_size=1), 0)
    assert {len(s) for s in shards} == {1}
