"""FuseFL: stages of a ViT, what crosses between clients and server, and that only that is trained."""

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import loud
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import fedmitr as fm
from fedmitr.client.fusefl import FusionClient
from fedmitr.client.train import train_client
from fedmitr.core.rng import make_rng
from fedmitr.core.store import Store
from fedmitr.methods.fusefl import fusefl
from fedmitr.server.ensemble import client_weights
from fedmitr.server.fused import Fused
from fedmitr.settings import Settings
from fedmitr.settings.schema import ClientSettings, EnsembleSettings, FuseflSettings
from fedmitr.vision.stages import (
    average_adaptor,
    fuse_tokens,
    run_stage,
    stage_blocks,
    stage_epochs,
    stage_names,
)

MODES = ("mean_probs", "mean_logits", "size", "class")
LOCAL = ClientSettings(epochs=2, batch_size=6, lr=1e-3)
HELD = [(0, 1, 2, 3), (3, 4, 5), (7,)]  # classes of the three clients: 12, 9 and 3 images


@pytest.fixture(scope="module")
def initial():
    return loud(fm.create_vit("vit_micro", 10), seed=5, scale=0.05).requires_grad_(True)


@pytest.fixture(scope="module")
def shards(task):
    def of(classes):
        index = [torch.nonzero(task.train.labels == c)[:3, 0] for c in classes]
        return task.train.subset(torch.cat(index))

    return [of(classes) for classes in HELD]


def run_settings(stages=2, adaptor="average", mode="mean_probs"):
    return Settings(
        client=LOCAL,
        ensemble=EnsembleSettings(mode=mode),
        fusefl=FuseflSettings(stages=stages, adaptor=adaptor),
    )


def make_clients(initial, shards, store, run, **options):
    return [
        FusionClient(initial, shard, run.client, run.fusefl, store, client=k, key=f"client {k}", **options)
        for k, shard in enumerate(shards)
    ]


class Wire:
    """A client that notes what passes: everything received and sent, stage by stage."""

    def __init__(self, inner):
        self.inner, self.received, self.sent = inner, [], []
        self.client, self.size, self.shape = inner.client, inner.size, inner.shape
        self.class_counts = inner.class_counts

    def train_stage(self, stage, received):
        self.received.append({name: value.clone() for name, value in received.items()})
        message = self.inner.train_stage(stage, received)
        self.sent.append({name: value.clone() for name, value in message.items()})
        return message


class Ready:
    """A client that trains nothing: it sends the stages of a finished model, and an adaptor."""

    def __init__(self, vit, client, size, stages, adaptor=None):
        self.client, self.size, self.vit, self.stages = client, size, vit, stages
        self.shape = fm.upload.ModelShape.of("vit_micro", vit)
        self.class_counts, self.adaptor = (size, *[0] * 9), adaptor

    def train_stage(self, stage, received):
        state = self.vit.state_dict()
        message = {name: state[name].clone() for name in stage_names(self.vit, self.stages, stage)}
        if stage and self.adaptor:
            message |= {f"adaptor.{n}": v.clone() for n, v in self.adaptor.state_dict().items()}
        return message


def several(count):
    return [loud(fm.create_vit("vit_micro", 10), seed=20 + k) for k in range(count)]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def file_bytes(arrays, folder):
    path = Path(folder) / "message.safetensors"
    save_file(arrays, path)
    return path.stat().st_size


# Stages.

TINY = dict(img_size=16, patch_size=4, num_classes=5, embed_dim=24, num_heads=2, class_token=True)
VITS = {
    "micro": lambda: fm.create_vit("vit_micro", 5),
    "test_vit": lambda: fm.create_vit("test_vit", 5, image_size=32),
    "registers": lambda: VisionTransformer(**TINY, depth=3, reg_tokens=4, init_values=1e-2),
    "norm before": lambda: VisionTransformer(**TINY, depth=2, pre_norm=True, no_embed_class=True),
    "mean of tokens": lambda: VisionTransformer(**TINY, depth=5, global_pool="avg", qk_norm=True),
    "distilled": lambda: VisionTransformerDistilled(**TINY, depth=4),
}


@pytest.fixture(scope="module", params=VITS.values(), ids=VITS.keys())
def any_vit(request):
    return loud(request.param(), seed=1).requires_grad_(False)


def counts_of(vit):
    return sorted({1, 2, 3, len(vit.blocks)} & set(range(1, len(vit.blocks) + 1)))


def test_all_stages_in_turn_are_timms_own_forward(any_vit):
    side, channels = any_vit.patch_embed.img_size[0], any_vit.patch_embed.proj.in_channels
    images = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))
    for count in counts_of(any_vit):
        x = images
        for stage in range(count):
            x = run_stage(any_vit, x, stage, count)
        torch.testing.assert_close(x, any_vit(images), rtol=1e-4, atol=1e-4)


def test_every_entry_belongs_to_exactly_one_stage(any_vit):
    for count in counts_of(any_vit):
        stages = [stage_names(any_vit, count, stage) for stage in range(count)]
        assert sorted(itertools.chain(*stages)) == sorted(any_vit.state_dict())
        assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= set(stages[0])
        ends = {name for name in any_vit.state_dict() if name.startswith(("head", "norm.", "fc_norm"))}
        assert ends and ends <= set(stages[-1])
        for stage, blocks in enumerate(stage_blocks(len(any_vit.blocks), count)):
            assert {f"blocks.{i}.norm1.weight" for i in blocks} <= set(stages[stage])


@pytest.mark.parametrize(
    "depth, count, sizes", [(4, 1, [4]), (4, 2, [2, 2]), (4, 3, [2, 1, 1]), (12, 5, [3, 3, 2, 2, 2])]
)
def test_stages_are_consecutive_and_as_equal_as_can_be(depth, count, sizes):
    blocks = stage_blocks(depth, count)
    assert [len(b) for b in blocks] == sizes
    assert list(itertools.chain(*blocks)) == list(range(depth))


def test_more_stages_than_blocks_are_one_line(initial, shards, tmp_path, one_line):
    run = run_settings(stages=5)
    with pytest.raises(fm.BadInput) as error:
        make_clients(initial, shards, Store(tmp_path), run)
    one_line(error.value, "fusefl.stages=5", "4")
    with pytest.raises(fm.BadInput) as error:
        fusefl([Ready(initial, 0, 3, 1)], run, Store(tmp_path))
    one_line(error.value, "fusefl.stages=5", "4")


@pytest.mark.parametrize("epochs, count, each", [(15, 2, [8, 7]), (4, 4, [1] * 4), (1, 3, [1] * 3)])
def test_local_epochs_are_divided_over_the_stages(epochs, count, each):
    assert stage_epochs(epochs, count) == each


# The fused model.


@pytest.mark.parametrize("adaptor", ["average", "linear"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_identical_members_are_one_of_them(micro, images, stages, adaptor):
    members = [copy.deepcopy(micro) for _ in range(3)]
    fused = Fused(members, FuseflSettings(stages=stages, adaptor=adaptor))
    torch.testing.assert_close(fused(images), micro(images).log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_linear_adaptor_starts_as_the_average(images, stages):
    made = [Fused(several(3), FuseflSettings(stages=stages, adaptor=a)) for a in ("average", "linear")]
    torch.testing.assert_close(made[0](images), made[1](images), rtol=1e-4, atol=1e-4)
    assert len(made[0].adaptors) == 0 and len(made[1].adaptors) == stages - 1


def test_an_adaptor_is_one_matrix_on_the_members_tokens_side_by_side():
    rng = torch.Generator().manual_seed(0)
    tokens, adaptor = torch.randn(2, 3, 5, 4, generator=rng), average_adaptor(2, 4)
    with torch.no_grad():
        adaptor.weight.copy_(torch.randn(4, 8, generator=rng))
        adaptor.bias.copy_(torch.randn(4, generator=rng))
    found = fuse_tokens(tokens, adaptor)
    for b, t in itertools.product(range(3), range(5)):
        wanted = adaptor.weight @ torch.cat([tokens[0, b, t], tokens[1, b, t]]) + adaptor.bias
        torch.testing.assert_close(found[b, t], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adaptor", ["average", "linear"])
def test_two_members_by_hand(images, adaptor):
    """timm's own modules one by one: half the blocks each, the tokens fused, the other halves."""
    members, weights = several(2), torch.full((2, 1), 0.5)
    fused = Fused(members, FuseflSettings(stages=2, adaptor=adaptor), weights, "mean_probs")
    with torch.no_grad():
        halves = [m.blocks[:2](m._pos_embed(m.patch_embed(images))) for m in members]
        tokens = (halves[0] + halves[1]) / 2
        if adaptor == "linear":
            loud(fused.adaptors[0], seed=3)
            tokens = torch.cat(halves, dim=-1) @ fused.adaptors[0].weight.T + fused.adaptors[0].bias
        logits = [m.forward_head(m.norm(m.blocks[2:](tokens))) for m in members]
    wanted = (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2
    torch.testing.assert_close(fused(images).exp(), wanted, rtol=1e-4, atol=1e-5)
    alone = sum(m(images).softmax(-1) for m in members) / 2
    assert not torch.allclose(wanted, alone, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_one_stage_is_the_ensemble(uploads, images, mode):
    fused = Fused([u.vit() for u in uploads], FuseflSettings(stages=1), client_weights(uploads, mode), mode)
    wanted = fm.Ensemble(uploads, EnsembleSettings(mode=mode))(images)
    torch.testing.assert_close(fused(images), wanted, rtol=1e-4, atol=1e-4)


# Clients and server together.


@pytest.fixture(scope="module", params=["average", "linear"])
def passed(request, initial, shards, tmp_path_factory):
    """A whole run of three clients in two stages: its wires, its outcome, its settings, its store."""
    # FedProx pulls on every weight, so that one that should be frozen and is not would move
    run, store = run_settings(adaptor=request.param, mode="class"), Store(tmp_path_factory.mktemp("store"))
    run = run.model_copy(update={"client": LOCAL.model_copy(update={"fedprox": 0.5})})
    wires = [Wire(c) for c in make_clients(initial, shards, store, run)]
    return wires, fusefl(wires, run, store), run, store


def test_the_outcome_is_one_frozen_model_that_answers(passed, images):
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
    wires, outcome, _, _ = passed
    cards = []
    for k, wire in enumerate(wires):
        card = fm.Upload(k, wire.size, wire.shape, {}, wire.class_counts).card
        cards.append(len(card.model_dump_json().encode()))
    up = sum(file_bytes(message, tmp_path) for wire in wires for message in wire.sent)
    down = 3 * file_bytes(dict(initial.state_dict()), tmp_path)
    down += sum(file_bytes(wire.received[1], tmp_path) for wire in wires)
    assert outcome.exchanges == 2
    assert outcome.uplink_bytes == up + sum(cards)
    assert outcome.downlink_bytes == down


def test_uplink_is_about_one_model_per_client(initial, shards, tmp_path):
    model = 4 * sum(value.numel() for value in initial.state_dict().values())
    for stages in (1, 2, 4):
        clients = [Ready(initial, k, 3, stages) for k in range(3)]
        outcome = fusefl(clients, run_settings(stages=stages), Store(tmp_path))
        assert 3 * model < outcome.uplink_bytes < 1.05 * 3 * model
        assert outcome.exchanges == stages
    once = fusefl([Ready(initial, 0, 3, 1)], run_settings(stages=1), Store(tmp_path))
    one = fm.Upload(0, 3, Ready(initial, 0, 3, 1).shape, initial.state_dict())
    assert once.uplink_bytes == one.bytes


def test_counts_cross_only_where_the_ensemble_asks(initial, tmp_path):
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


# Local training.


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(optimizer="sgd", lr=0.05, schedule="cosine"),
        dict(label_smoothing=0.1, augment=0.0),
        dict(fedprox=0.5, token_weight=1.0, schedule="constant"),
    ],
    ids=["default", "sgd", "smooth", "fedprox"],
)
def test_one_stage_trains_as_every_other_client_does(initial, shards, tmp_path, options):
    """With token labels, so that both embed the patches with the same operations: then bit for bit."""
    local = LOCAL.model_copy(update={"token_weight": 0.3, **options})
    run = run_settings(stages=1).model_copy(update={"client": local})
    wanted = [train_client(initial, s, local, client=k, seed=4).weights for k, s in enumerate(shards)]
    clients = make_clients(initial, shards, Store(tmp_path), run, seed=4)
    assert all(equal(c.train_stage(0, {}), w) for c, w in zip(clients, wanted, strict=True))


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


def test_the_shared_model_and_what_is_received_are_left_as_they_were(initial, shards, tmp_path):
    before = {name: value.clone() for name, value in initial.state_dict().items()}
    client = make_clients(initial, shards, Store(tmp_path), run_settings(adaptor="linear"))[0]
    client.train_stage(0, {})
    members = several(2)
    received = Fused(members, FuseflSettings(stages=2, adaptor="linear")).part(0)
    copied = {name: value.clone() for name, value in received.items()}
    client.train_stage(1, received)
    assert equal(received, copied) and equal(dict(initial.state_dict()), before)


def test_stages_come_in_order(initial, shards, tmp_path):
    client = make_clients(initial, shards, Store(tmp_path), run_settings())[0]
    with pytest.raises(ValueError, match="order"):
        client.train_stage(1, {})


# Stop and resume.


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


@pytest.mark.parametrize("change", ["key", "stages", "adaptor", "received"])
def test_other_clients_settings_and_messages_have_other_addresses(initial, shards, tmp_path, change):
    store, fused = Store(tmp_path), Fused(several(2), FuseflSettings(stages=2))

    def addresses(key="k", received=None, **fusion):
        fusion = FuseflSettings(**{"stages": 2, **fusion})
        client = FusionClient(initial, shards[2], LOCAL, fusion, store, client=0, key=key)
        client.train_stage(0, {})
        if fusion.stages == 2:
            client.train_stage(1, received or fused.part(0))
        return set(client._keys)

    other = {
        "key": dict(key="other"),
        "stages": dict(stages=1),
        "adaptor": dict(adaptor="linear"),
        "received": dict(received=Fused(several(3), FuseflSettings(stages=2)).part(0)),
    }[change]
    shared = addresses() & addresses(**other)
    assert len(shared) == (1 if change == "received" else 0)


def test_a_damaged_state_is_one_line_that_says_what_to_delete(initial, shards, tmp_path, one_line):
    run, store = run_settings(), Store(tmp_path)
    make_clients(initial, shards, store, run)[2].train_stage(0, {})
    (path,) = tmp_path.glob("fuse/*/state.safetensors")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(fm.BadInput) as error:
        make_clients(initial, shards, store, run)[2].train_stage(0, {})
    one_line(error.value, "delete", str(path.parent))


# Spoilt messages: one line that names the client and the array.


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


def test_a_spoilt_message_of_the_server_is_one_line(initial, shards, tmp_path, one_line):
    good = Fused(several(2), FuseflSettings(stages=2)).part(0)
    short = {name: value for name, value in good.items() if name != "members.1.cls_token"}
    for received, name in (({}, "members.0."), (short, "members.1.cls_token")):
        client = make_clients(initial, shards, Store(tmp_path), run_settings())[2]
        client.train_stage(0, {})
        with pytest.raises(fm.BadInput) as error:
            client.train_stage(1, received)
        one_line(error.value, "server", "client 2", name, "missing")


def test_training_that_diverges_neither_leaves_nor_is_kept(initial, shards, tmp_path, one_line):
    images = torch.full_like(shards[2].images, float("nan"))
    shard = dataclasses.replace(shards[2], images=images)
    client = make_clients(initial, [shard], Store(tmp_path), run_settings())[0]
    with pytest.raises(fm.BadInput) as error:
        client.train_stage(0, {})
    one_line(error.value, "client 0", "NaN")
    assert not list(tmp_path.glob("fuse/*"))


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
