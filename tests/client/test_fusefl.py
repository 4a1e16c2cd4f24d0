"""fusefl.py: one client of FuseFL, which trains stages, keeps them, and checks what it receives."""

import dataclasses

import pytest
import torch
from fusion_clients import LOCAL, equal, make_clients, run_settings, several, shared_model, three_shards

import fedmitr as fm
from fedmitr.client.fusefl import FusionClient
from fedmitr.client.train import train_client
from fedmitr.core.store import Store
from fedmitr.server.fused import Fused
from fedmitr.settings.schema import FuseflSettings


@pytest.fixture(scope="module")
def initial():
    return shared_model()


@pytest.fixture(scope="module")
def shards(task):
    return three_shards(task)


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


def test_more_stages_than_blocks_are_one_line(initial, shards, tmp_path, one_line):
    with pytest.raises(fm.BadInput) as error:
        make_clients(initial, shards, Store(tmp_path), run_settings(stages=5))
    one_line(error.value, "fusefl.stages=5", "4")


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
