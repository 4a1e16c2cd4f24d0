"""fedavg_ridge.py and stacking.py: two exchanges, against scikit-learn, their bytes counted by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import loud, make_upload
from safetensors.torch import save_file
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from tiny_runs import images_of, small

import fedmitr as fm
from fedmitr.client.statistics import StatisticsClient
from fedmitr.core.store import Store
from fedmitr.methods import METHODS
from fedmitr.methods.fedavg import average_weights
from fedmitr.upload import ModelShape, Statistics

COUNTS = [(9, 8, 7, 0, 0, 0, 0, 0, 0, 0), (0, 2, 0, 4, 6, 8, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1, 0, 0, 0, 0)]
METHODS_OF_TWO = ("fedavg_ridge", "stacking")


def client_of(k, shared, name="vit_micro"):
    upload = make_upload(k, COUNTS[k], side=12)
    if name != "vit_micro":
        vit = loud(fm.create_vit(name, 10, image_size=12), seed=70 + k)
        upload = dataclasses.replace(upload, shape=ModelShape.of(name, vit), weights=dict(vit.state_dict()))
    return StatisticsClient(upload, shared, images_of(upload))


@pytest.fixture
def shared():
    return fm.create_vit("vit_micro", 10, image_size=12)


@pytest.fixture
def clients(shared):
    """Three clients, the last of one image."""
    return [client_of(k, shared) for k in range(3)]


def options(tokens="both", **more):
    return small({"statistics.tokens": tokens} | {n.replace("__", "."): v for n, v in more.items()})


def timm_features(vits, images, tokens):
    parts = []
    for vit in vits:
        with torch.no_grad():
            out = vit.double().forward_features(images.double())
        parts += [out[:, 0]] * (tokens != "patches") + [out[:, 1:].mean(1)] * (tokens != "cls")
    return torch.cat(parts, 1).numpy()


def by_hand(vits, clients, tokens, penalty):
    """Weights and intercepts of scikit-learn's ridge regression on all clients' images in one place."""
    shards = [images_of(client.upload) for client in clients]
    features = np.concatenate([timm_features(vits, shard.images, tokens) for shard in shards])
    labels = torch.cat([shard.labels for shard in shards]).numpy()
    scaler = StandardScaler().fit(features)
    model = Ridge(alpha=penalty, solver="svd").fit(scaler.transform(features), np.eye(10)[labels])
    weight = model.coef_ / scaler.scale_
    return weight, model.intercept_ - weight @ scaler.mean_, np.unique(labels)


def matches(model, wanted):
    weight, bias, held = wanted
    np.testing.assert_allclose(model.head.weight[held], weight[held], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.head.bias[held], bias[held], rtol=1e-4, atol=1e-5)


def average_of(clients):
    vit = clients[0].upload.shape.build()
    vit.load_state_dict(average_weights([client.upload for client in clients]))
    return vit.eval()


@pytest.mark.parametrize("tokens", ["cls", "patches", "both"])
def test_fedavg_ridge_is_ridge_on_the_averages_features(tokens, clients, tmp_path):
    run = options(tokens, statistics__ridge=0.3)
    (model,) = METHODS["fedavg_ridge"](clients, run, Store(tmp_path)).models
    average = average_of(clients)
    assert len(model.vits) == 1
    for name, value in model.vits[0].state_dict().items():
        assert torch.equal(value, average.state_dict()[name])
    matches(model, by_hand([average], clients, tokens, 0.3))


@pytest.mark.parametrize("tokens", ["cls", "both"])
def test_stacking_is_ridge_on_all_models_features(tokens, clients, tmp_path):
    run = options(tokens, statistics__ridge=0.3)
    (model,) = METHODS["stacking"](clients, run, Store(tmp_path)).models
    vits = [client.upload.vit() for client in clients]
    assert len(model.vits) == 3
    matches(model, by_hand(vits, clients, tokens, 0.3))


def test_models_of_other_architectures_are_stacked_too(shared, tmp_path):
    names = ("vit_micro", "vit_micro_deep", "vit_micro_patch6")
    clients = [client_of(k, shared, name) for k, name in enumerate(names)]
    (model,) = METHODS["stacking"](clients, options("cls"), Store(tmp_path)).models
    assert model.head.weight.shape == (10, 96 + 64 + 96)
    matches(model, by_hand([client.upload.vit() for client in clients], clients, "cls", 1.0))


@pytest.mark.parametrize("method", METHODS_OF_TWO)
def test_one_client_alone_is_ridge_on_its_own_models_features(method, clients, tmp_path):
    (model,) = METHODS[method](clients[:1], options("cls"), Store(tmp_path)).models
    matches(model, by_hand([clients[0].upload.vit()], clients[:1], "cls", 1.0))


def size(arrays, folder):
    save_file(arrays, folder / "arrays.safetensors")
    return (folder / "arrays.safetensors").stat().st_size


@pytest.mark.parametrize("method", METHODS_OF_TWO)
def test_bytes_up_and_down_are_those_of_all_messages(method, clients, shared, tmp_path):
    """Up: three uploads, then three messages of sums. Down: the shared model, then one model or all three."""
    outcome = METHODS[method](clients, options("cls"), Store(tmp_path))
    wide = 96 * (3 if method == "stacking" else 1)
    sums = {
        "counts": torch.zeros(10, dtype=torch.int64),
        "sums": torch.zeros(10, wide, dtype=torch.float64),
        "gram": torch.zeros(wide * (wide + 1) // 2, dtype=torch.float64),
    }
    model = size(shared.state_dict(), tmp_path)
    assert model == size(clients[0].upload.weights, tmp_path)
    cards = sum(client.upload.card.bytes for client in clients)
    assert outcome.uplink_bytes == 3 * model + cards + 3 * size(sums, tmp_path)
    assert outcome.downlink_bytes == 3 * model + 3 * model * (3 if method == "stacking" else 1)
    assert METHODS[method].exchanges_under(small()) == 2
    assert set(outcome.seconds) == {"solving"}


def test_clients_are_asked_for_their_sums_once_and_say_how_long_it_took(clients, tmp_path, monkeypatch):
    asked, ask = [], StatisticsClient.statistics

    def note(self, models, tokens, views):
        asked.append((self.upload.client, [shape.name for shape, _ in models], tokens, views))
        return ask(self, models, tokens, views)

    monkeypatch.setattr(StatisticsClient, "statistics", note)
    METHODS["stacking"](clients, options("patches"), Store(tmp_path))
    assert asked == [(k, ["vit_micro"] * 3, "patches", 0) for k in range(3)]
    assert all(client.seconds > 0 for client in clients)


# What a client may send in the second exchange.


def nudged(found, **change):
    return dataclasses.replace(found, **{name: f(getattr(found, name)) for name, f in change.items()})


def poison(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[0, 0] = value
        return tensor

    return change


HOSTILE = {
    "NaN": (lambda s: nudged(s, gram=poison(float("nan"))), "gram holds NaN"),
    "a huge number": (lambda s: nudged(s, sums=poison(1e200)), "sums holds"),
    "a negative count": (lambda s: nudged(s, counts=lambda c: c - 1), "negative"),
    "more images": (lambda s: nudged(s, counts=lambda c: 2 * c), "its size is 20"),
    "another width": (lambda s: Statistics(s.counts, s.sums[:, :9], s.gram[:9, :9]), "[10, 9]"),
    "fewer classes": (lambda s: Statistics(s.counts[1:], s.sums[1:], s.gram), "counts is torch.int64 [9]"),
    "single precision": (lambda s: nudged(s, sums=lambda t: t.float()), "float32"),
    "longer features": (lambda s: nudged(s, sums=lambda t: 99 * t, gram=lambda g: 99**2 * g), "mean |f|²"),
    "a gram that is not symmetric": (lambda s: nudged(s, gram=torch.triu), "not symmetric"),
    "a gram that no images have": (lambda s: nudged(s, gram=lambda g: -g), "no images have these sums"),
}


@pytest.mark.parametrize("method", METHODS_OF_TWO)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_second_message_is_one_line(name, method, clients, tmp_path, monkeypatch, one_line):
    spoil, word = HOSTILE[name]
    honest = clients[1].statistics
    monkeypatch.setattr(clients[1], "statistics", lambda *message: spoil(honest(*message)), raising=False)
    with pytest.raises(fm.BadInput) as error:
        METHODS[method](clients, options("cls"), Store(tmp_path))
    who = "all clients" if "no images" in name else "client 1"
    one_line(error.value, f"of {who}: statistics: ", word)
    assert str(error.value).startswith("second message")


@pytest.mark.parametrize("method", METHODS_OF_TWO)
def test_no_clients_and_models_that_do_not_go_together_are_one_line(method, clients, tmp_path, one_line):
    with pytest.raises(fm.BadInput) as error:
        METHODS[method]([], options(), Store(tmp_path))
    one_line(error.value, "uploads=[]")
    vit = fm.create_vit("vit_micro", 10, image_size=24)
    other = dataclasses.replace(
        clients[1].upload, shape=ModelShape.of("vit_micro", vit), weights=vit.state_dict()
    )
    clients[1].upload = other
    with pytest.raises(fm.BadInput) as error:
        METHODS[method](clients, options(), Store(tmp_path))
    one_line(error.value, "client 1")


def test_averages_need_one_architecture_and_stacks_do_not(shared, tmp_path, one_line):
    clients = [client_of(0, shared), client_of(1, shared, "vit_micro_deep")]
    with pytest.raises(fm.BadInput) as error:
        METHODS["fedavg_ridge"](clients, options(), Store(tmp_path))
    one_line(error.value, "client 1", "one architecture")
    assert METHODS["fedavg_ridge"].averages and not METHODS["stacking"].averages
