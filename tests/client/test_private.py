"""private.py: gradients of single images against loops and Opacus, clipping, noise, Poisson sampling."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import loud
from torch import nn

import fedmitr as fm
from fedmitr.client import private as module
from fedmitr.client.private import clipped_gradients, fit_private, training_noise
from fedmitr.client.train import local_loss, local_steps, train_client
from fedmitr.core.gradients import sample_gradients
from fedmitr.core.rng import make_rng
from fedmitr.data.tasks import Split
from fedmitr.settings.schema import ClientSettings
from fedmitr.upload import Noise
from fedmitr.upload.privacy import epsilon

pytest.importorskip("opacus")
PLAIN = {"optimizer": "sgd", "schedule": "constant", "weight_decay": 0.0, "augment": 0.0, "lr": 0.1}


@pytest.fixture(scope="module")
def vit():
    return loud(fm.create_vit("vit_micro", 10, image_size=12), seed=3).train()


@pytest.fixture(scope="module")
def shard():
    rng = torch.Generator().manual_seed(1)
    return Split(torch.randn(11, 1, 12, 12, generator=rng), torch.randint(10, (11,), generator=rng))


def one_by_one(model, loss, images, labels):
    """The gradient of each image from a backward pass of its own, by the name of the weight."""
    rows = []
    for image, label in zip(images, labels, strict=True):
        model.zero_grad()
        loss(model, image[None], label[None]).backward()
        rows.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("token_weight", [0.0, 0.5])
@pytest.mark.parametrize("attention", ["long", "short"])
def test_gradients_of_images_are_those_of_a_backward_pass_each(
    token_weight, attention, vit, shard, monkeypatch
):
    """Class token and position embedding too; the last block computes CLS alone unless tokens are read."""
    if attention == "long":
        monkeypatch.setattr("fedmitr.vision.attention.SHORT", 1)
    settings = ClientSettings(token_weight=token_weight, label_smoothing=0.1)
    loss = partial(local_loss, settings=settings)
    found = sample_gradients(vit, loss, (shard.images, shard.labels))
    wanted = one_by_one(vit, loss, shard.images, shard.labels)
    assert found.keys() == wanted.keys() and {"cls_token", "pos_embed"} <= set(found)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_gradients_of_images_are_those_of_opacus_where_its_hooks_reach():
    from opacus import GradSampleModule

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    images, labels = torch.randn(7, 1, 2, 3), torch.randint(3, (7,))
    hooked = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    F.cross_entropy(hooked(images), labels, reduction="sum").backward()
    found = sample_gradients(model, lambda m, x, y: F.cross_entropy(m(x), y), (images, labels))
    for name, weight in hooked._module.named_parameters():
        torch.testing.assert_close(found[name], weight.grad_sample, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [1e-3, 3.0, 1e6])
def test_no_image_adds_more_than_the_clip(clip, vit, shard, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 4)  # parts of 4, 4 and 3 images
    loss = partial(local_loss, settings=ClientSettings())
    each = one_by_one(vit, loss, shard.images, shard.labels)
    norms = torch.stack([torch.cat([g[i].flatten() for g in each.values()]).norm() for i in range(11)])
    found = clipped_gradients(vit, loss, shard.images, shard.labels, clip)
    for name, gradients in each.items():
        wanted = sum(g * min(1.0, clip / n) for g, n in zip(gradients, norms.tolist(), strict=True))
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-5 * max(1.0, clip) / clip)
    alone = [
        clipped_gradients(vit, loss, shard.images[i : i + 1], shard.labels[i : i + 1], clip)
        for i in range(11)
    ]
    for one in alone:
        assert torch.cat([g.flatten() for g in one.values()]).norm() <= clip * (1 + 1e-5)


def test_no_image_adds_nothing(vit, shard):
    loss = partial(local_loss, settings=ClientSettings())
    found = clipped_gradients(vit, loss, shard.images[:0], shard.labels[:0], 1.0)
    assert all(
        not g.any() and g.shape == p.shape for g, p in zip(found.values(), vit.parameters(), strict=True)
    )


def test_without_noise_clip_and_sampling_it_is_gradient_descent(vit, shard):
    settings = ClientSettings(**PLAIN)
    loss = partial(local_loss, settings=settings)
    trained, wanted = copy.deepcopy(vit), copy.deepcopy(vit)
    noise = Noise(clip=1e6, multiplier=1e-12, sample_rate=1.0, steps=3)
    fit_private(trained, loss, lambda: 0.0, shard, settings, noise, make_rng(0))
    optimizer = torch.optim.SGD(wanted.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss(wanted, shard.images, shard.labels).backward()  # the mean over all images
        optimizer.step()
    for found, other in zip(trained.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-5)


def test_noise_has_the_deviation_that_was_accounted_for(vit, shard):
    """One step of SGD at rate 0.1 on a loss without gradient moves weights by 0.1 · σ C / (q n)."""
    noise = Noise(clip=2.0, multiplier=1.5, sample_rate=0.5, steps=1)
    trained = copy.deepcopy(vit)
    fit_private(
        trained,
        lambda m, x, y: 0.0 * m(x).sum(),
        lambda: 0.0,
        shard,
        ClientSettings(**PLAIN),
        noise,
        make_rng(1),
    )
    moves = torch.cat(
        [(a - b).flatten() for a, b in zip(trained.parameters(), vit.parameters(), strict=True)]
    ).double()
    wanted = 0.1 * 1.5 * 2.0 / (0.5 * 11)
    assert abs(moves.std() / wanted - 1) < 4 / math.sqrt(2 * len(moves))
    assert abs(moves.mean()) < 4 * wanted / math.sqrt(len(moves))


def test_each_image_enters_each_step_by_a_draw_of_its_own(vit, shard, monkeypatch):
    seen = []

    def record(model, loss, images, labels, clip):
        seen.append([int((shard.images == image).flatten(1).all(1).nonzero()[0]) for image in images])
        return {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    monkeypatch.setattr(module, "clipped_gradients", record)
    noise = Noise(clip=1.0, multiplier=1.0, sample_rate=0.3, steps=150)
    fit_private(copy.deepcopy(vit), None, lambda: 0.0, shard, ClientSettings(**PLAIN), noise, make_rng(0))
    entered = torch.zeros(150, 11)
    for step, rows in enumerate(seen):
        entered[step, rows] = 1
        assert len(rows) == len(set(rows))
    assert abs(entered.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / entered.numel())
    sizes = entered.sum(1)
    assert sizes.var() == pytest.approx(11 * 0.3 * 0.7, rel=0.5)  # 0 for batches of one size
    assert abs(torch.corrcoef(entered.T).triu(1)).max() < 0.4


def test_the_penalty_of_fedprox_enters_without_noise(vit, shard):
    settings = ClientSettings(**PLAIN)
    pulled = copy.deepcopy(vit)
    noise = Noise(clip=1.0, multiplier=1e-12, steps=1)

    def penalty():
        return sum(p.sum() for p in pulled.parameters())

    fit_private(pulled, lambda m, x, y: 0.0 * m(x).sum(), penalty, shard, settings, noise, make_rng(0))
    for found, before in zip(pulled.parameters(), vit.parameters(), strict=True):
        torch.testing.assert_close(found, before - 0.1, rtol=0, atol=1e-5)


def test_noise_is_calibrated_for_all_steps_of_a_client():
    settings = ClientSettings(epochs=3, batch_size=4, dp_epsilon=5.0, dp_clip=0.7)
    noise = training_noise(11, local_steps(11, settings), settings)
    assert (noise.clip, noise.sample_rate, noise.steps) == (0.7, 4 / 11, 9)
    assert 4.995 <= epsilon([noise], 1e-5) <= 5.0
    assert training_noise(2, 3, settings).sample_rate == 1.0
    assert training_noise(11, 9, ClientSettings()) is None


def test_an_upload_of_private_training_declares_it_and_has_no_true_counts(vit, shard):
    settings = ClientSettings(epochs=1, batch_size=4, dp_epsilon=5.0)
    one, same, other, secret = (
        train_client(vit, shard, settings, client=0, seed=seed, noise_seed=noise)
        for seed, noise in ((0, None), (0, None), (1, None), (0, 77))
    )
    assert one.training == training_noise(11, 3, settings) and one.class_counts is None
    assert one.digest == same.digest and len({one.digest, other.digest, secret.digest}) == 3
    plain = train_client(vit, shard, ClientSettings(epochs=1, batch_size=4), client=0, noise_seed=5)
    assert plain.training is None and sum(plain.class_counts) == 11
    again = train_client(vit, shard, ClientSettings(epochs=1, batch_size=4), client=0)
    assert plain.digest == again.digest  # without privacy there is no noise that a seed could change
