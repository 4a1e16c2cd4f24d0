"""FuseFL as a whole: what crosses between clients and server, what is trained, and runs that are killed."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fusion_clients import (
    LOCAL,
    MODES,
    Ready,
    Wire,
    equal,
    make_clients,
    run_settings,
    several,
    shared_model,
    three_shards,
)
from safetensors.torch import load_file, save_file
from torch import nn

import fedmitr as fm
from fedmitr.client.fusefl import FusionClient
from fedmitr.core.rng import make_rng
from fedmitr.core.store import Store
from fedmitr.methods.fusefl import METHOD, fusefl
from fedmitr.server.ensemble import client_weights
from fedmitr.server.fused import Fused
from fedmitr.settings.schema import ClientSettings, FuseflSettings
from fedmitr.vision.stages import average_adaptor, stage_names


@pytest.fixture(scope="module")
def initial():
    return shared_model()


@pytest.fixture(scope="module")
def shards(task):
    return three_shards(task)


def file_bytes(arrays, folder):
    path = Path(folder) / "message.safetensors"
    save_file(arrays, path)
    return path.stat().st_size


@pytest.fixture(scope="module", params=["average", "linear"])
def passed(request, initial, shards, tmp_path_factory):
    """A whole run of three clients in two stages: its wires, its outcome, its settings, its store."""
    # FedProx pulls on every weight, so that one that should be frozen and is not would move
    run, store = run_settings(adaptor=request.param, mode="class"), Store(tmp_path_factory.mktemp("store"))
    run = run.model_copy(update={"client": LOCAL.model_copy(update={"fedprox": 0.5})})
    wires = [Wire(c) for c in make_clients(initial, shards, store, run)]
    return wires, fusefl(wires, run, store), run, store


def test_the_outcome_is_one_frozen_model(passed, images):
    (model,) = passed[1].models
    log_probs = model(images)
    assert log_probs.shape == (3, 10) and not model.training
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3))
    assert not any(p.requires_grad for p in model.parameters())
    assert set(passed[1].seconds) == {"fusing"} and passed[1].student_steps == 0


def test_only_the_arrays_of_the_stage_leave_a_client(passed, initial):
    wires, _, run, _ = passed
    for wire in wires:
        for stage, message in enumerate(wire.sent):
            names = set(stage_names(initial, 2, stage))
            if stage and run.fusefl.adaptor == "linear":
                names |= {"adaptor.weight", "adaptor.bias"}
            assert set(message) == names
            assert all(type(value) is torch.Tensor for value in message.values())


def test_what_comes_down_is_what_all_sent(passed):
    wires, _, _, _ = passed
    sent = {f"members.{k}.{name}": v for k, wire in enumerate(wires) for name, v in wire.sent[0].items()}
    for wire in wires:
        assert wire.received[0] == {}
        assert equal(wire.received[1], sent)


def test_fused_stages_stay(passed):
    """Every member of the fused model is bit for bit what its client sent, once."""
    wires, outcome, _, _ = passed
    for wire, member in zip(wires, outcome.models[0].members, strict=True):
        sent = {name: value for message in wire.sent for name, value in message.items()}
        sent = {name: value for name, value in sent.items() if not name.startswith("adaptor.")}
        assert equal({name: value.cpu() for name, value in member.state_dict().items()}, sent)


def test_training_a_stage_moves_it_and_leaves_the_frozen_one(passed, initial):
    wires, _, _, store = passed
    states = [load_file(path) for path in store.root.glob("fuse/*/state.safetensors")]
    first = initial.state_dict()
    for wire in wires:
        (late,) = [s for s in states if torch.equal(s["head.weight"], wire.sent[1]["head.weight"])]
        assert all(torch.equal(late[name], value) for name, value in wire.sent[0].items())
        for message, name in ((wire.sent[0], "blocks.0.attn.qkv.weight"), (wire.sent[1], "head.weight")):
            assert not torch.equal(message[name], first[name])


def test_adaptors_are_averaged_by_size(passed):
    wires, outcome, run, _ = passed
    if run.fusefl.adaptor == "average":
        assert len(outcome.models[0].adaptors) == 0
        return
    (adaptor,) = outcome.models[0].adaptors
    for name in ("weight", "bias"):
        each = [w.sent[1][f"adaptor.{name}"] for w in wires]
        assert not torch.equal(each[0], each[1])
        wanted = (12 * each[0] + 9 * each[1] + 3 * each[2]) / 24
        torch.testing.assert_close(adaptor.state_dict()[name].cpu(), wanted, rtol=1e-5, atol=1e-7)


def test_bytes_are_those_of_the_files(passed, initial, tmp_path):
    wires, outcome, run, _ = passed
    assert all(len(wire.sent) == METHOD.exchanges_under(run) for wire in wires)
    cards = []
    for k, wire in enumerate(wires):
        card = fm.Upload(k, wire.size, wire.shape, {}, wire.class_counts).card
        cards.append(len(card.model_dump_json().encode()))
    up = sum(file_bytes(message, tmp_path) for wire in wires for message in wire.sent)
    down = 3 * file_bytes(dict(initial.state_dict()), tmp_path)
    down += sum(file_bytes(wire.received[1], tmp_path) for wire in wires)
    assert outcome.uplink_bytes == up + sum(cards)
    assert outcome.downlink_bytes == down


def test_uplink_is_about_one_model_per_client(initial, shards, tmp_path):
    model = 4 * sum(value.numel() for value in initial.state_dict().values())
    for stages in (1, 2, 4):
        clients = [Ready(initial, k, 3, stages) for k in range(3)]
        outcome = fusefl(clients, run_settings(stages=stages), Store(tmp_path))
        assert 3 * model < outcome.uplink_bytes < 1.05 * 3 * model
    once = fusefl([Ready(initial, 0, 3, 1)], run_settings(stages=1), Store(tmp_path))
    one = fm.Upload(0, 3, Ready(initial, 0, 3, 1).shape, initial.state_dict())
    assert once.uplink_bytes == one.bytes


def test_counts_cross_only_where_the_ensemble_needs_them(initial, tmp_path):
    sizes = {
        mode: fusefl([Ready(initial, 0, 3, 2)], run_settings(mode=mode), Store(tmp_path)).uplink_bytes
        for mode in MODES
    }
    assert sizes["mean_probs"] == sizes["mean_logits"] == sizes["size"]
    assert sizes["class"] - sizes["size"] == len("[3,0,0,0,0,0,0,0,0,0]") - len("null")


@pytest.mark.parametrize("mode", MODES)
def test_ready_models_are_fused_as_they_are(images, mode, tmp_path):
    members = several(2)
    clients = [Ready(m, k, 3 + k, 2) for k, m in enumerate(members)]
    (found,) = fusefl(clients, run_settings(mode=mode), Store(tmp_path)).models
    wanted = Fused(members, FuseflSettings(stages=2), client_weights(clients, mode), mode)
    torch.testing.assert_close(found.cpu()(images), wanted(images))


def blockwise(vit, shard, lr, stages, seed):
    """Plain block-wise training: the whole network, then with the first half frozen, on SGD."""
    vit = copy.deepcopy(vit).train()
    for stage, epochs in enumerate(stages):
        if stage:
            frozen = [vit.patch_embed, vit.blocks[0], vit.blocks[1]]
            for p in itertools.chain([vit.cls_token, vit.pos_embed], *(f.parameters() for f in frozen)):
                p.requires_grad_(False)
        rng = make_rng(seed, "client", 0, *([stage] if stage else []))
        torch.randint(2**31, (1,), generator=rng)
        moving = [p for p in vit.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(moving, lr=lr, momentum=0.9)
        for _ in range(epochs):
            for pick in torch.randperm(len(shard), generator=rng).split(5):
                optimizer.zero_grad()
                F.cross_entropy(vit(shard.images[pick]), shard.labels[pick]).backward()
                nn.utils.clip_grad_norm_(moving, 1.0)
                optimizer.step()
    return vit.eval()


def test_one_client_is_plain_blockwise_training(initial, shards, images, tmp_path):
    local = ClientSettings(
        epochs=3, batch_size=5, optimizer="sgd", lr=0.02, weight_decay=0, schedule="constant", augment=0
    )
    run = run_settings().model_copy(update={"client": local})
    clients = make_clients(initial, shards[:1], Store(tmp_path), run, seed=3)
    (found,) = fusefl(clients, run, Store(tmp_path)).models
    wanted = blockwise(initial, shards[0], 0.02, [2, 1], seed=3)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found.members[0].state_dict()[name].cpu(), value, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.cpu()(images), wanted(images).log_softmax(-1), rtol=1e-3, atol=1e-4)
    whole = blockwise(initial, shards[0], 0.02, [3], seed=3)
    assert not torch.allclose(whole.head.weight, wanted.head.weight, rtol=1e-3, atol=1e-5)


def test_a_later_stage_learns_from_the_others_features(initial, shards, tmp_path):
    """The same client, beside other members: another second stage."""
    first, second = [], []
    for others in (0, 1):
        run, store = run_settings(), Store(tmp_path / str(others))
        (client,) = make_clients(initial, shards[:1], store, run)
        wires = [Wire(client), Ready(several(2)[others], 1, 3, 2)]
        fusefl(wires, run, store)
        first.append(wires[0].sent[0])
        second.append(wires[0].sent[1])
    assert equal(*first)
    assert not torch.equal(second[0]["head.weight"], second[1]["head.weight"])


@pytest.mark.parametrize("adaptor", ["average", "linear"])
def test_four_stages_and_a_shard_of_one_class(initial, shards, images, tmp_path, adaptor):
    run, store = run_settings(stages=4, adaptor=adaptor, mode="class"), Store(tmp_path)
    wires = [Wire(c) for c in make_clients(initial, shards[1:], store, run)]
    (model,) = fusefl(wires, run, store).models
    assert wires[1].class_counts == (0, 0, 0, 0, 0, 0, 0, 3, 0, 0)
    assert torch.isfinite(model.cpu()(images)).all()
    assert all(torch.isfinite(v).all() for wire in wires for message in wire.sent for v in message.values())
    if adaptor == "linear":  # the adaptor before the second stage comes down with it
        assert {"adaptors.0.weight", "adaptors.0.bias"} <= set(wires[0].received[2])


def no_training(self, stage, known):
    raise AssertionError("trained again")


def test_a_second_run_trains_nothing_and_gives_the_same_bytes(passed, initial, shards, monkeypatch):
    wires, outcome, run, store = passed
    monkeypatch.setattr(FusionClient, "_train", no_training)
    steps = []
    clients = make_clients(initial, shards, store, run, progress=steps.append)
    again = [Wire(c) for c in clients]
    second = fusefl(again, run, store)
    for a, b in zip(wires, again, strict=True):
        assert all(equal(x, y) for x, y in zip(a.sent, b.sent, strict=True))
    assert equal(outcome.models[0].state_dict(), second.models[0].state_dict())
    assert (outcome.uplink_bytes, outcome.downlink_bytes) == (second.uplink_bytes, second.downlink_bytes)
    assert sum(steps) == sum(c.steps for c in clients) == 2 * (2 + 2 + 1)
    assert all(c.seconds > 0 for c in clients)


def test_a_killed_run_goes_on_from_its_last_whole_stage(initial, shards, tmp_path, monkeypatch):
    run = run_settings(adaptor="linear")
    whole = fusefl(make_clients(initial, shards, Store(tmp_path / "a"), run), run, Store(tmp_path / "a"))
    store, steps, trained = Store(tmp_path / "b"), [], []

    def killed(step):
        steps.append(step)
        if len(steps) == 8:  # 2 + 2 + 1 steps of the first stage, 2 of the next's first client, 1 of 2 more
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fusefl(make_clients(initial, shards, store, run, progress=killed), run, store)
    train = FusionClient._train
    monkeypatch.setattr(
        FusionClient, "_train", lambda c, s, known: trained.append((s, c.client)) or train(c, s, known)
    )
    resumed = fusefl(make_clients(initial, shards, store, run), run, store)
    assert trained == [(1, 1), (1, 2)]
    assert equal(whole.models[0].state_dict(), resumed.models[0].state_dict())


def test_progress_counts_every_step(initial, shards, tmp_path):
    local = LOCAL.model_copy(update={"epochs": 3})
    run = run_settings(stages=2).model_copy(update={"client": local})
    steps = []
    clients = make_clients(initial, shards, Store(tmp_path), run, progress=steps.append)
    fusefl(clients, run, Store(tmp_path))
    assert set(steps) == {1} and len(steps) == sum(c.steps for c in clients) == 3 * (2 + 2 + 1)


def overwrite(value):
    def spoil(message):
        message["norm.bias"][3] = value

    return spoil


SPOILT = {
    "missing": (lambda m: m.pop("norm.bias"), "missing"),
    "unknown": (lambda m: m.update({"norm.extra": torch.zeros(1)}), "unknown"),
    "earlier stage": (lambda m: m.update({"cls_token": torch.zeros(1, 1, 96)}), "unknown"),
    "no adaptor": (lambda m: m.pop("adaptor.bias"), "missing"),
    "wrong shape": (lambda m: m.update({"norm.bias": torch.zeros(97)}), "[96]"),
    "wrong type": (lambda m: m.update({"norm.bias": torch.zeros(96, dtype=torch.float64)}), "float32"),
    "not an array": (lambda m: m.update({"norm.bias": [0.0] * 96}), "list"),
    "NaN": (overwrite(float("nan")), "NaN"),
    "Inf": (overwrite(float("-inf")), "NaN or Inf"),
}


@pytest.mark.parametrize("spoil, word", SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_message_is_one_line_naming_client_and_array(spoil, word, tmp_path, one_line):
    class Spoilt(Ready):
        def train_stage(self, stage, received):
            message = super().train_stage(stage, received)
            if stage:
                spoil(message)
            return message

    vit, adaptor = several(1)[0], average_adaptor(2, 96)
    clients = [Ready(vit, 0, 3, 2, adaptor), Spoilt(vit, 1, 3, 2, adaptor)]
    with pytest.raises(fm.BadInput) as error:
        fusefl(clients, run_settings(adaptor="linear"), Store(tmp_path))
    one_line(error.value, "client 1", "stage 1", word)


def test_clients_that_cannot_be_fused_are_one_line(micro, tmp_path, one_line):
    with pytest.raises(fm.BadInput) as error:
        fusefl([], run_settings(), Store(tmp_path))
    one_line(error.value, "empty")
    other, uncounted = Ready(micro, 1, 3, 2), Ready(micro, 1, 3, 2)
    other.shape = other.shape.model_copy(update={"num_classes": 9})
    uncounted.class_counts = None
    for odd, mode, word in ((other, "size", "architecture"), (uncounted, "class", "class_counts")):
        with pytest.raises(fm.BadInput) as error:
            fusefl([Ready(micro, 0, 3, 2), odd], run_settings(mode=mode), Store(tmp_path))
        one_line(error.value, "client 1", word)


def test_more_stages_than_blocks_are_one_line(initial, tmp_path, one_line):
    with pytest.raises(fm.BadInput) as error:
        fusefl([Ready(initial, 0, 3, 1)], run_settings(stages=5), Store(tmp_path))
    one_line(error.value, "fusefl.stages=5", "4")
