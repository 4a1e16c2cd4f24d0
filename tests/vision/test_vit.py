"""vit.py: the models that can be built, those that cannot, and weights from files."""

import hashlib
import socket

import pytest
import timm
import torch
from helpers import loud
from safetensors.torch import load_file, save_file

import fedmitr as fm
from fedmitr.settings.schema import ModelSettings
from fedmitr.vision.vit import letter_weights, normalisation, weights_digest

STARTS = ("vit_micro", "vit_micro_early")


def test_normalisation_is_the_models_own():
    mean, std = normalisation(fm.create_vit("deit_tiny_patch16_224"))
    assert mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert all(s.shape == (1, 1, 1) for s in normalisation(fm.create_vit("vit_micro")))


def test_a_fresh_model_is_the_same_in_every_call_and_leaves_the_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fm.create_vit("vit_micro", 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for name, value in fm.create_vit("vit_micro", 5).state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name


def test_channels_and_size_can_be_chosen():
    vit = fm.create_vit("vit_micro", 4, image_size=40, in_chans=3)
    assert vit(torch.zeros(1, 3, 40, 40)).shape == (1, 4)
    assert vit.patch_embed.grid_size == (10, 10)
    assert len(normalisation(vit)[0]) == 3


def test_the_early_start_is_the_same_network_with_other_weights():
    usual, early = (fm.create_vit(name, pretrained=True) for name in STARTS)
    assert str(usual) == str(early)
    states = usual.state_dict(), early.state_dict()
    assert [k for k, v in states[0].items() if v.shape != states[1][k].shape] == []
    assert not torch.equal(usual.patch_embed.proj.weight, early.patch_embed.proj.weight)
    fresh = fm.create_vit("vit_micro_early").state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in fm.create_vit("vit_micro").state_dict().items())
    digests = {weights_digest(ModelSettings(name=name)) for name in STARTS}
    assert digests == {hashlib.sha256(letter_weights(n).read_bytes()).hexdigest() for n in STARTS}
    assert len(digests) == 2  # the store keeps the uploads of each apart


# What cannot be: one line each.


@pytest.mark.parametrize(
    "name, options",
    [
        ("no_such_model", {}),
        ("resnet18", {}),
        ("resnet18", {"image_size": 64}),
        ("swin_tiny_patch4_window7_224", {}),
        ("vit_wee_patch16_reg1_gap_256", {}),  # averages its tokens: no CLS
        ("vit_tiny_r_s16_p8_224", {}),  # patches are cut by a convolutional network
        ("vit_small_patch16_18x2_224", {}),  # two attentions in parallel in every block
        ("deit_tiny_patch16_224.no_such_tag", {}),
    ],
)
def test_a_model_that_cannot_be_used_is_one_line_naming_model_name(name, options, one_line):
    with pytest.raises(fm.BadInput) as error:
        fm.create_vit(name, **options)
    one_line(error.value, "model.name", repr(name))


@pytest.mark.parametrize(
    "name, size", [("vit_micro", 25), ("deit_tiny_patch16_224", 100), ("test_vit", 50), ("vit_micro", 2)]
)
def test_an_image_size_that_is_no_multiple_of_the_patch(name, size, one_line):
    with pytest.raises(fm.BadInput) as error:
        fm.create_vit(name, image_size=size)
    one_line(error.value, f"model.image_size={size}", "multiple")


def test_a_failed_download_is_one_line_naming_the_checkpoint(monkeypatch, one_line):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def no_network(*_, **__):
        raise LocalEntryNotFoundError("Cannot find the requested files\nin the cache.")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    with pytest.raises(fm.BadInput) as error:
        fm.create_vit("deit_tiny_patch16_224", pretrained=True)
    one_line(error.value, "model.pretrained", "deit_tiny_patch16_224", "model.checkpoint")


@pytest.mark.parametrize(
    "name",
    ["vit_micro", "test_vit.r160_in1k", "hf-hub:timm/vit_tiny_patch16_224", "hf_hub:a/b", "local-dir:."],
)
def test_without_pretrained_nothing_is_fetched_whatever_the_name(name, forbid):
    forbid(socket.socket, "connect")
    forbid(socket, "getaddrinfo")
    if name.startswith(("vit_micro", "test_vit")):
        assert fm.create_vit(name).num_classes == 10
    else:
        with pytest.raises(fm.BadInput, match="unknown"):
            fm.create_vit(name)


# Weights from files.


def state(vit):
    return {k: v.detach().clone() for k, v in vit.state_dict().items()}


@pytest.fixture
def checkpoint(tmp_path, micro):
    path = tmp_path / "weights.safetensors"
    save_file(state(micro), path)
    return path


def test_a_checkpoint_comes_back_bit_for_bit(checkpoint, micro):
    again = fm.create_vit("vit_micro", 10, checkpoint=checkpoint)
    for name, value in micro.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_checkpoint_of_other_class_count_keeps_all_but_the_head(checkpoint, micro):
    other = fm.create_vit("vit_micro", 3, checkpoint=checkpoint)
    twin = fm.create_vit("vit_micro", 3, checkpoint=checkpoint)
    assert other.head.weight.shape == (3, 96)
    for name, value in other.state_dict().items():
        wanted = twin if name.startswith("head") else micro
        assert torch.equal(value, wanted.state_dict()[name]), name


def test_a_checkpoint_at_another_image_size_resamples_positions_as_timm_does(checkpoint, micro):
    from timm.layers import resample_abs_pos_embed

    larger = fm.create_vit("vit_micro", 10, checkpoint=checkpoint, image_size=32)
    wanted = resample_abs_pos_embed(micro.pos_embed, new_size=(8, 8), num_prefix_tokens=1)
    torch.testing.assert_close(larger.pos_embed, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(larger.blocks[0].attn.qkv.weight, micro.blocks[0].attn.qkv.weight)


def spoilt_missing(path):
    path.unlink()


def spoilt_truncated(path):
    path.write_bytes(path.read_bytes()[:5000])


def spoilt_text(path):
    path.write_text("not weights")


def respell(change):
    """Rewrites a checkpoint's tensors; fed by the cases below."""

    def rewrite(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


MISFITS = {
    "missing": spoilt_missing,
    "truncated": spoilt_truncated,
    "text": spoilt_text,
    "empty": respell(dict.clear),
    "lacks a block": respell(lambda t: t.pop("blocks.2.mlp.fc1.weight")),
    "unknown tensor": respell(lambda t: t.update(extra=torch.zeros(1))),
    "unknown head": respell(lambda t: t.update({"head_dist.weight": torch.zeros(10, 96)})),
    "wide": respell(lambda t: t.update({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)})),
    "flat positions": respell(lambda t: t.update(pos_embed=torch.zeros(96))),
    "odd positions": respell(lambda t: t.update(pos_embed=torch.zeros(1, 31, 96))),
    "three channels": respell(lambda t: t.update({"patch_embed.proj.weight": torch.zeros(96, 3, 4, 4)})),
}


@pytest.mark.parametrize("spoil", MISFITS.values(), ids=MISFITS.keys())
def test_a_checkpoint_that_does_not_fit_is_one_line(checkpoint, spoil, one_line):
    spoil(checkpoint)
    with pytest.raises(fm.BadInput) as error:
        fm.create_vit("vit_micro", 10, checkpoint=checkpoint)
    one_line(error.value, "model.checkpoint")


def test_pretrained_timm_weights_go_through_timms_own_loader(tmp_path, monkeypatch):
    """As after a download, but from a file made here; another class count brings a fresh head."""
    name, path = "deit_tiny_patch16_224", tmp_path / "published.safetensors"
    source = loud(timm.create_model(name), seed=7, scale=0.05)
    save_file(state(source), path)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: load_file(path))
    vit = fm.create_vit(name, 10, pretrained=True)
    for key, value in vit.state_dict().items():
        if not key.startswith("head"):
            assert torch.equal(value, source.state_dict()[key]), key
    assert vit.head.weight.shape == (10, 192)
    assert torch.equal(vit.head.weight, fm.create_vit(name, 10, pretrained=True).head.weight)
    offline = fm.create_vit(name, 10, checkpoint=path)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(8))
    found, wanted = offline.forward_features(images), source.forward_features(images)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_a_checkpoint_spares_the_download(checkpoint, monkeypatch, micro, tmp_path):
    def no_network(*_, **__):
        raise AssertionError("downloaded")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    path = tmp_path / "deit.safetensors"
    save_file(state(timm.create_model("test_vit")), path)
    fm.create_vit("test_vit", 10, pretrained=True, checkpoint=path)
    loaded = fm.create_vit("vit_micro", 10, pretrained=True, checkpoint=checkpoint)
    assert torch.equal(loaded.pos_embed, micro.pos_embed)
