"""train.py: what training does to the loss, to the shared model and to the upload."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import loud
from torch import nn

import fedmitr as fm
from fedmitr.client.train import fedprox, fit, local_loss, local_steps, steps_of, train_client
from fedmitr.core.rng import make_rng
from fedmitr.settings.schema import ClientSettings
from fedmitr.vision.tokens import forward_tokens

SETTINGS = ClientSettings(epochs=3, batch_size=16, lr=1e-3)


@pytest.fixture(scope="module")
def shard(task):
    """60 images of three classes, the second most often."""
    wanted = [(1, 10), (4, 30), (7, 20)]
    index = torch.cat([torch.nonzero(task.train.labels == c)[:n, 0] for c, n in wanted])
    return task.train.subset(index)


@pytest.fixture(scope="module")
def initial():
    return fm.create_vit("vit_micro", 10)


@pytest.fixture(scope="module")
def upload(initial, shard):
    return train_client(initial, shard, SETTINGS, client=2, seed=1)


def test_training_lowers_the_loss_on_the_shard(initial, shard, upload):
    initial.eval()
    before = F.cross_entropy(initial(shard.images), shard.labels)
    after = F.cross_entropy(upload.vit()(shard.images), shard.labels)
    assert after < 0.8 * before and after < math.log(10)


def test_the_shared_model_is_left_as_it_was(shard):
    initial = fm.create_vit("vit_micro", 10).eval()
    before = {k: v.clone() for k, v in initial.state_dict().items()}
    trained = train_client(initial, shard, SETTINGS, client=0)
    assert not initial.training
    assert all(torch.equal(v, before[k]) for k, v in initial.state_dict().items())
    assert not torch.equal(trained.weights["head.weight"], before["head.weight"])


def test_the_same_client_and_seed_give_the_same_bytes(initial, shard, upload):
    assert train_client(initial, shard, SETTINGS, client=2, seed=1).digest == upload.digest


@pytest.mark.parametrize("other", [dict(client=3, seed=1), dict(client=2, seed=2)])
def test_another_client_or_seed_trains_otherwise(initial, shard, upload, other):
    weights = train_client(initial, shard, SETTINGS, **other).weights
    assert not torch.equal(weights["head.weight"], upload.weights["head.weight"])


def test_the_upload_says_who_how_many_and_of_which_class(upload):
    assert (upload.client, upload.size) == (2, 60)
    assert upload.class_counts == (0, 10, 0, 0, 30, 0, 0, 20, 0, 0)
    assert upload.without_counts().class_counts is None
    upload.checked()


def test_nothing_but_the_model_is_in_the_weights(initial, upload):
    shapes = {k: v.shape for k, v in initial.state_dict().items()}
    assert {k: v.shape for k, v in upload.weights.items()} == shapes
    assert set(upload.card.model_dump()) == {"client", "size", "shape", "class_counts"}


@pytest.mark.parametrize("size, batch, epochs", [(60, 16, 3), (5, 8, 2), (16, 8, 1)])
def test_progress_counts_every_step(initial, shard, size, batch, epochs):
    settings = ClientSettings(epochs=epochs, batch_size=batch)
    steps = []
    part = shard.subset(torch.arange(size))
    train_client(initial, part, settings, client=0, progress=steps.append)
    assert sum(steps) == local_steps(size, settings) == epochs * math.ceil(size / batch)


def test_sgd_and_token_labels_train_too(initial, shard):
    for options in (dict(optimizer="sgd", lr=0.05), dict(token_weight=0.5), dict(augment=0.0)):
        settings = ClientSettings(epochs=3, batch_size=16, **options)
        after = train_client(initial, shard, settings, client=0).vit()(shard.images)
        assert F.cross_entropy(after, shard.labels) < 2.1


def test_one_plain_sgd_step_is_the_gradient_times_the_rate(initial, shard):
    few = shard.subset(torch.arange(8))
    settings = ClientSettings(
        epochs=1, batch_size=8, optimizer="sgd", lr=0.1, weight_decay=0, schedule="constant", augment=0
    )
    after = train_client(initial, few, settings, client=0)
    twin = fm.create_vit("vit_micro", 10).train()
    F.cross_entropy(twin(few.images), few.labels).backward()
    norm = torch.stack([p.grad.square().sum() for p in twin.parameters()]).sum().sqrt()
    for name, p in twin.named_parameters():
        expected = p - 0.1 * p.grad / max(1.0, norm.item())
        torch.testing.assert_close(after.weights[name], expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing, weight", [(0.0, 0.0), (0.1, 0.0), (0.2, 0.7)])
def test_local_loss_against_loops(images, smoothing, weight):
    vit = loud(fm.create_vit("vit_micro", 10), seed=1)
    labels = torch.tensor([3, 0, 9])
    class_logits, patch_logits = forward_tokens(vit, images)

    def one(logits, y):
        log_p = logits.double().log_softmax(-1)
        return -(1 - smoothing) * log_p[y] - smoothing * log_p.mean()

    expected = sum(one(class_logits[b], labels[b]) for b in range(3)) / 3
    if weight:
        each = [one(patch_logits[b, i], labels[b]) for b in range(3) for i in range(36)]
        expected = expected + weight * sum(each) / len(each)
    settings = ClientSettings(label_smoothing=smoothing, token_weight=weight)
    found = local_loss(vit, images, labels, settings)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


# FedProx.


def test_fedprox_is_half_mu_times_the_squared_distance_to_the_shared_model(initial):
    near = copy.deepcopy(initial)
    with torch.no_grad():
        near.head.bias += 0.1  # ten entries
        near.cls_token[0, 0, 5] -= 2
    term = fedprox(near, initial, ClientSettings(fedprox=0.3))
    assert term.item() == pytest.approx(0.3 / 2 * (10 * 0.01 + 4), rel=1e-5)
    term.backward()
    torch.testing.assert_close(near.head.bias.grad, torch.full((10,), 0.3 * 0.1))
    assert near.cls_token.grad[0, 0, 5].item() == pytest.approx(-0.6)
    assert all(p.grad is None for p in initial.parameters())


def test_fedprox_is_none_at_the_start_and_where_it_is_off(initial):
    assert fedprox(copy.deepcopy(initial), initial, ClientSettings(fedprox=0.3)).item() == 0
    assert fedprox(copy.deepcopy(initial), initial, ClientSettings()) == 0


def distance(upload, initial):
    state = initial.state_dict()
    return sum((w - state[name]).square().sum() for name, w in upload.weights.items()).sqrt().item()


def test_fedprox_holds_a_client_near_the_shared_model(initial, shard):
    far, held = (
        distance(train_client(initial, shard, SETTINGS.model_copy(update={"fedprox": mu}), client=0), initial)
        for mu in (0.0, 10.0)
    )
    assert 0 < held < 0.7 * far


# Several models and a loss of one's own, in the one loop of all local training.


def test_models_are_trained_together_on_every_image_once_an_epoch(shard):
    models, seen = [nn.Linear(576, 3), nn.Linear(3, 10)], []
    before = [p.clone() for m in models for p in m.parameters()]

    def loss_of(images, labels):
        seen.append(len(labels))
        return F.cross_entropy(models[1](models[0](images.flatten(1))), labels)

    settings = ClientSettings(batch_size=25, weight_decay=0.5, augment=0)
    fit(models, loss_of, shard, settings, epochs=2, rng=make_rng(0))
    assert seen == [25, 25, 10] * 2
    assert all(
        not torch.equal(p, b)
        for p, b in zip((p for m in models for p in m.parameters()), before, strict=True)
    )


@pytest.mark.parametrize("size, epochs, batch, steps", [(60, 3, 16, 12), (1, 1, 64, 1), (64, 2, 64, 2)])
def test_steps_are_those_of_whole_passes(size, epochs, batch, steps):
    assert steps_of(size, epochs, ClientSettings(batch_size=batch)) == steps
