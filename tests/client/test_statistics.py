"""client/statistics.py: sums of features against a loop over images, any partition, any batches."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import loud, make_upload
from hypothesis import given, settings
from hypothesis import strategies as st

import fedmitr as fm
from fedmitr.client import statistics as module
from fedmitr.client.statistics import StatisticsClient, feature_statistics
from fedmitr.data.tasks import Split
from fedmitr.upload import ModelShape, add_up

IMAGES = 36


@pytest.fixture(scope="module")
def vit():
    return loud(fm.create_vit("vit_micro", 10, image_size=12), seed=3)


@pytest.fixture(scope="module")
def shard():
    rng = torch.Generator().manual_seed(1)
    return Split(torch.randn(IMAGES, 1, 12, 12, generator=rng), torch.randint(9, (IMAGES,), generator=rng))


def by_hand(vit, shard, tokens):
    """Counts, Σ f by class and Σ f fᵀ from timm's own pass in double precision, one image at a time."""
    exact = copy.deepcopy(vit).double().eval()
    counts, sums, gram = np.zeros(10), 0.0, 0.0
    for image, label in zip(shard.images.double(), shard.labels.tolist(), strict=True):
        with torch.no_grad():
            out = exact.forward_features(image[None])[0].numpy()
        cls, mean = out[0], out[1:].mean(0)
        f = {"cls": cls, "patches": mean, "both": np.concatenate([cls, mean])}[tokens]
        counts[label] += 1
        sums = sums + np.outer(np.eye(10)[label], f)
        gram = gram + np.outer(f, f)
    return counts, sums, gram


def close(one, other):
    assert torch.equal(one.counts, other.counts)
    torch.testing.assert_close(one.sums, other.sums, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.gram, other.gram, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", ["cls", "patches", "both"])
def test_sums_are_those_of_timms_own_pass_over_each_image(tokens, vit, shard):
    found, (counts, sums, gram) = feature_statistics([vit], shard, tokens), by_hand(vit, shard, tokens)
    assert found.counts.tolist() == counts.tolist()
    np.testing.assert_allclose(found.sums, sums, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.gram, gram, rtol=1e-9, atol=1e-9)
    assert found.checked("client 0", 10, 192 if tokens == "both" else 96, IMAGES) is found


@given(owner=st.lists(st.integers(0, 11), min_size=IMAGES, max_size=IMAGES))
@settings(max_examples=8)
def test_clients_add_up_to_one_that_holds_everything_however_images_are_dealt(owner, vit, shard):
    owner = torch.tensor(owner)
    held = [(owner == k).nonzero()[:, 0] for k in owner.unique()]
    parts = [feature_statistics([vit], shard.subset(rows), "both") for rows in held]
    close(add_up(parts), feature_statistics([vit], shard, "both"))


def test_every_image_may_be_a_client_of_its_own(vit, shard):
    alone = [feature_statistics([vit], shard.subset(torch.tensor([k])), "cls") for k in range(IMAGES)]
    assert all(part.checked("client", 10, 96, 1).size == 1 for part in alone)
    close(add_up(alone), feature_statistics([vit], shard, "cls"))


@pytest.mark.parametrize("few", [1, 5, IMAGES])
def test_batches_of_any_size_give_the_same_sums(few, vit, shard, monkeypatch):
    wanted = feature_statistics([vit], shard, "cls")
    monkeypatch.setattr(module, "images_at_once", lambda _: few)
    close(feature_statistics([vit], shard, "cls"), wanted)


def test_the_model_is_left_as_it_is(shard):
    vit = loud(fm.create_vit("vit_micro", 10, image_size=12), seed=3).train()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    feature_statistics([vit], shard, "cls")
    assert vit.training and all(p.requires_grad and p.grad is None for p in vit.parameters())
    for name, value in vit.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])


def test_several_models_stand_side_by_side(vit, shard):
    other = loud(fm.create_vit("vit_micro_deep", 10, image_size=12), seed=4)
    both = feature_statistics([vit, other], shard, "cls")
    close_to = [feature_statistics([one], shard, "cls") for one in (vit, other)]
    assert both.width == 96 + 64
    torch.testing.assert_close(both.sums, torch.cat([part.sums for part in close_to], 1))
    torch.testing.assert_close(both.gram[:96, :96], close_to[0].gram)
    torch.testing.assert_close(both.gram[96:, 96:], close_to[1].gram)


# Moved copies.


def moved(images, theta):
    """Each image under one affine map, by torch alone."""
    grid = F.affine_grid(theta.double().expand(len(images), -1, -1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def test_an_image_counts_once_as_the_mean_over_its_moved_copies(vit, shard):
    found = feature_statistics([vit], shard, "both", views=3)
    exact = shard.images.double()
    views = [exact, *(moved(exact, theta) for theta in module.view_maps(3))]
    parts = [by_hand(vit, Split(images, shard.labels), "both") for images in views]
    counts, sums, gram = (sum(part[i] for part in parts) / 4 for i in range(3))
    assert found.counts.tolist() == counts.tolist() and found.size == IMAGES
    np.testing.assert_allclose(found.sums, sums, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.gram, gram, rtol=1e-9, atol=1e-9)
    assert found.checked("client 0", 10, 192, IMAGES) is found
    assert not torch.allclose(found.gram, feature_statistics([vit], shard, "both").gram, rtol=1e-3)


def test_moves_are_small_all_different_and_the_same_for_everyone():
    maps = module.view_maps(8)
    torch.manual_seed(1)  # nothing else that is random moves them
    assert torch.equal(maps, module.view_maps(8))
    assert len({tuple(m.flatten().tolist()) for m in maps}) == 8
    assert (maps[:, :, :2] - torch.eye(2)).abs().max() < 0.4 and maps[:, :, 2].abs().max() < 0.3
    assert not len(module.view_maps(0))


def test_with_moved_copies_clients_add_up_to_one_that_holds_everything(vit, shard):
    rows = torch.arange(IMAGES)
    parts = [feature_statistics([vit], shard.subset(rows[k::5]), "regions", 2) for k in range(5)]
    close(add_up(parts), feature_statistics([vit], shard, "regions", 2))


# A client of two exchanges.


@pytest.fixture
def client(vit, shard):
    return StatisticsClient(make_upload(3, (1,) * 10, side=12), vit, shard)


def test_it_sends_sums_of_the_models_that_it_is_sent(client, vit, shard):
    other = loud(fm.create_vit("vit_micro_deep", 10, image_size=12), seed=4)
    names = {"vit_micro": vit, "vit_micro_deep": other}
    sent = [(ModelShape.of(name, one), one.state_dict()) for name, one in names.items()]
    close(client.statistics(sent, "cls"), feature_statistics([vit, other], shard, "cls"))
    client.seconds = 1e9  # of an earlier message
    client.statistics(sent, "cls")
    assert 0 < client.seconds < 1e9
    assert client.shared.keys() == vit.state_dict().keys()


def test_a_model_that_does_not_fit_is_one_line(client, vit, one_line):
    shape, weights = ModelShape.of("vit_micro", vit), vit.state_dict()
    bad = {
        "missing": {n: v for n, v in weights.items() if n != "norm.bias"},
        "unknown": weights | {"more": torch.zeros(1)},
        "[97]": weights | {"norm.bias": torch.zeros(97)},
        "NaN": weights | {"norm.bias": torch.full((96,), torch.nan)},
    }
    for word, spoilt in bad.items():
        with pytest.raises(fm.BadInput) as error:
            client.statistics([(shape, spoilt)], "cls")
        one_line(error.value, "server to client 3", word)
