"""attention.py against timm's own blocks: every row or the first few, their gradients, bfloat16."""

from functools import cache, partial

import pytest
import torch
from helpers import loud
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer

import fedmitr as fm
from fedmitr.core.machine import autocast
from fedmitr.vision import attention
from fedmitr.vision.attention import attention_weights, run_blocks


class Gated(Attention):
    """timm's, its values gated; timm wants a class here, no function."""

    def __init__(self, *args, **options):
        super().__init__(*args, gated=True, **options)


class Narrow(Attention):
    """timm's, its heads together narrower than the tokens."""

    def __init__(self, *args, **options):
        super().__init__(*args, attn_head_dim=5, **options)


BUILT = {  # what timm's blocks differ in, on a small scale
    "query and key norm": dict(qk_norm=True),
    "layer scale": dict(init_values=0.3),
    "no bias": dict(qkv_bias=False, proj_bias=False),
    "norm of the mixed values": dict(scale_attn_norm=True, scale_mlp_norm=True),
    "gated": dict(attn_layer=Gated),
    "narrow heads": dict(attn_layer=Narrow),
    "all at once": dict(qk_norm=True, init_values=0.3, scale_attn_norm=True, attn_layer=Gated),
}
MODELS = ["vit_micro", "test_vit", "deit_tiny_patch16_224", *BUILT]


@cache
def model(name):
    """A network in double precision, with weights that tell in every output."""
    if name in BUILT:
        shape = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=4, num_classes=7)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what `loud` leaves as it was initialised must be the same in every run
            vit = VisionTransformer(**shape, **BUILT[name])
        return loud(vit, seed=1).double()
    size = 32 if name.startswith("deit") else None
    return loud(fm.create_vit(name, 7, image_size=size), seed=1, scale=0.05).double()


def random_tokens(vit, batch, length, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, vit.embed_dim, generator=rng, dtype=torch.float64).requires_grad_()


def gradients(vit, made, tokens, rows, seed=0):
    """Of a random weighting of the first `rows` output rows, by the tokens and by every parameter."""
    made = made[:, :rows]
    towards = torch.randn(made.shape, generator=torch.Generator().manual_seed(seed), dtype=made.dtype)
    named = dict(vit.blocks.named_parameters())
    found = torch.autograd.grad((made * towards).sum(), [tokens, *named.values()], allow_unused=True)
    return dict(zip(["tokens", *named], found, strict=True))


def same(one, other, what="values"):
    limit = 1e-10 * max(1.0, other.abs().max().item())
    torch.testing.assert_close(one, other, rtol=1e-10, atol=limit, msg=lambda m: f"{what}: {m}")


def agree(vit, tokens, rows=None):
    """Outputs and gradients of our blocks are timm's; the gradients are returned."""
    ours, timms = run_blocks(vit.blocks, tokens, rows), vit.blocks(tokens)
    assert ours.shape[1] == (rows or tokens.shape[1])
    same(ours, timms[:, :rows])
    found, wanted = (gradients(vit, made, tokens, rows) for made in (ours, timms))
    for name, gradient in wanted.items():
        same(found[name], gradient, name)
    return wanted


@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients_are_those_of_timms_blocks(name, rows):
    for which, gradient in agree(model(name), random_tokens(model(name), 2, 9), rows).items():
        assert gradient.abs().max() > 1e-6 or which.endswith("k_norm.bias"), which  # shifts all scores alike


@given(
    name=st.sampled_from(MODELS),
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    few=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_they_are_for_any_batch_length_and_number_of_rows(name, batch, length, few, seed):
    tokens = random_tokens(model(name), batch, length, seed)
    agree(model(name), tokens)
    agree(model(name), tokens, min(few, length))


def test_the_models_take_both_ways():
    """Half of the tests above would say nothing if our own attention never ran, or always did."""
    tokens = random_tokens(model("vit_micro"), 1, 9)
    explicit = {n for n in MODELS if attention._explicit(model(n).blocks[0].attn, tokens)}
    assert explicit == set(MODELS) - {"query and key norm", "all at once"}


def test_no_blocks_give_the_tokens_back():
    tokens = random_tokens(model("vit_micro"), 2, 5)
    assert run_blocks([], tokens) is tokens


def test_rows_save_all_but_the_last_blocks_keys_and_values():
    """The last block's MLP sees the rows that are read alone, the others see all."""
    vit, seen = model("vit_micro"), []
    hooks = [b.mlp.register_forward_hook(lambda m, a, out: seen.append(a[0].shape[1])) for b in vit.blocks]
    run_blocks(vit.blocks, random_tokens(vit, 2, 9), 2)
    for hook in hooks:
        hook.remove()
    assert seen == [9, 9, 9, 2]


@pytest.mark.parametrize("name", ["vit_micro", "query and key norm", "gated"])
def test_weights_that_are_looked_at_are_a_softmax_by_hand(name):
    vit = model(name)
    tokens, layer = random_tokens(vit, 2, 6), vit.blocks[0].attn
    weights, value = attention_weights(layer, tokens, rows=2)
    query, key, values = layer.qkv(tokens).chunk(3, dim=-1)
    wide = layer.head_dim
    for head in range(layer.num_heads):
        part = slice(head * wide, (head + 1) * wide)
        scores = layer.q_norm(query[:, :2, part]) @ layer.k_norm(key[:, :, part]).mT / wide**0.5
        same(weights[:, head], scores.exp() / scores.exp().sum(dim=-1, keepdim=True))
        same(value[:, head], values[:, :, part])


# Which way a block takes.


@pytest.fixture
def ways(monkeypatch):
    """For every block that is run whole: the tokens that our own attention mixed."""
    taken, real = [], attention._mix_all

    def record(layer, tokens):
        taken.append(tokens.shape[1])
        return real(layer, tokens)

    monkeypatch.setattr(attention, "_mix_all", record)
    return taken


@pytest.mark.parametrize("length, own", [(attention.SHORT, 4), (attention.SHORT + 1, 0)])
def test_a_sequence_longer_than_short_takes_timms_path(length, own, ways):
    vit = model("vit_micro")
    tokens = random_tokens(vit, 1, length)
    same(run_blocks(vit.blocks, tokens), vit.blocks(tokens))
    assert ways == [length] * own


def test_the_limit_is_read_at_every_call(ways, monkeypatch):
    vit = model("vit_micro")
    tokens = random_tokens(vit, 1, 9)
    monkeypatch.setattr(attention, "SHORT", 8)
    agree(vit, tokens)
    agree(vit, tokens, 1)
    assert not ways
    monkeypatch.setattr(attention, "SHORT", 9)
    run_blocks(vit.blocks, tokens, 1)
    assert ways == [9] * 3  # of the last block one row alone


@pytest.mark.parametrize("dropout, own", [(dict(attn_drop_rate=0.3), 0), (dict(proj_drop_rate=0.3), 2)])
def test_in_training_the_same_values_drop_out_as_in_timm(dropout, own, ways):
    shape = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=4, drop_path_rate=0.5)
    vit = loud(VisionTransformer(**shape, **dropout), seed=2).double().train()
    tokens = random_tokens(vit, 4, 9)
    made = []
    for blocks in (partial(run_blocks, vit.blocks), vit.blocks, vit.blocks):
        torch.manual_seed(len(made) // 2)
        made.append(blocks(tokens))
    same(made[0], made[1])
    assert not torch.equal(made[1], made[2]) and ways == [9] * own
    vit.eval()
    same(run_blocks(vit.blocks, tokens), vit.blocks(tokens))


# bfloat16.


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("name", ["vit_micro", "test_vit", "query and key norm", "gated"])
def test_in_bfloat16_the_gradient_stays_near_float32s(name, rows):
    vit = model(name).float()
    tokens = random_tokens(vit, 4, 17).detach().float().requires_grad_()
    found = {}
    for precision in ("fp32", "bf16"):
        with autocast(precision):
            made = run_blocks(vit.blocks, tokens, rows)
        found[precision] = gradients(vit, made.float(), tokens, rows)["tokens"]
    vit.double()
    full, half = found["fp32"], found["bf16"]
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert half.norm().item() == pytest.approx(full.norm().item(), rel=0.02)
    assert (half - full).norm() < 0.02 * full.norm()
