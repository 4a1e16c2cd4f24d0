"""inversion.py: how many patches remain, and the terms of the loss."""

import copy

import pytest
import torch
from helpers import TARGETS, inversion_settings, same
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import distance
from scipy.special import softmax

import fedmitr as fm
from fedmitr.core.rng import make_rng
from fedmitr.server.inversion import invert, jensen_shannon, loss_at, remaining
from fedmitr.server.iterate import LivePatches
from fedmitr.settings.schema import EnsembleSettings
from fedmitr.vision.patches import patchify, unpatchify
from fedmitr.vision.tokens import forward_tokens


def test_published_stops_leave_24_percent():
    assert [remaining(36, [0.3] * k) for k in range(5)] == [36, 25, 18, 13, 9]
    assert [remaining(196, [0.3] * k) for k in range(5)] == [196, 137, 96, 67, 47]


@given(st.integers(1, 400), st.lists(st.floats(0.01, 0.99), max_size=5))
def test_at_least_one_patch_remains_and_the_shares_are_taken_to_within_one(count, ratios):
    for ratio in ratios:
        left = remaining(count, [ratio])
        assert 1 <= left <= count and abs(left - max(1, count * (1 - ratio))) <= 0.5 + 1e-9
        count = left


@pytest.mark.parametrize("kept", [36, 11])
@pytest.mark.parametrize("tv_norm", ["squares", "norms"])
def test_the_loss_and_its_gradient_are_those_of_the_equation(uploads, micro, double, kept, tv_norm):
    teacher = fm.Ensemble(uploads[:2], EnsembleSettings(mode="mean_probs")).double()
    opponent = copy.deepcopy(micro).double()
    rng = make_rng(3)
    image = torch.randn(4, 24 * 24, generator=rng)
    keep = torch.rand(4, 36, generator=rng).argsort(1)[:, :kept].sort(1).values
    settings = inversion_settings(ce=0.5, tv=1e-2, tv_norm=tv_norm, l2=3e-2)
    live = LivePatches(image.clone(), teacher.grid, settings)
    live.retain(keep)
    found = loss_at(live, teacher, TARGETS, settings, rng, opponent, competition=0.7)

    patches = patchify(image.view(4, 1, 24, 24), (4, 4)).requires_grad_()
    x = unpatchify(patches, (4, 4), (24, 24))
    p = sum(forward_tokens(m, x, keep)[0].softmax(-1) for m in teacher.members) / 2
    q = forward_tokens(opponent, x, keep)[0].softmax(-1)
    cross_entropy = -p[torch.arange(4), TARGETS].log()
    soft_p, soft_q = (z ** (1 / 3) / (z ** (1 / 3)).sum(-1, keepdim=True) for z in (p, q))  # T = 3
    middle = (soft_p + soft_q) / 2
    divergence = sum((z * (z / middle).log2()).sum(-1) for z in (soft_p, soft_q)) / 2
    live_pixels = patches[torch.arange(4)[:, None], keep]
    value = 0.5 * cross_entropy + 3e-2 * live_pixels.pow(2).sum((1, 2)) + 0.7 * (1 - divergence)
    if tv_norm == "squares":
        variation = x.diff(dim=2).pow(2).sum((1, 2, 3)) + x.diff(dim=3).pow(2).sum((1, 2, 3))
    else:  # of the whole batch, in every image's loss
        sides = x.diff(dim=2), x.diff(dim=3)
        diagonals = x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:]
        variation = sum(d.pow(2).sum().sqrt() for d in (*sides, *diagonals))
    value = value + 1e-2 * variation
    (gradient,) = torch.autograd.grad(value.sum(), patches)
    torch.testing.assert_close(found.value, value.detach())
    torch.testing.assert_close(found.cross_entropy, cross_entropy.detach())
    torch.testing.assert_close(found.confidence, p[torch.arange(4), TARGETS].detach())
    torch.testing.assert_close(found.gradient, gradient[torch.arange(4)[:, None], keep].flatten(1))


@given(seed=st.integers(0, 999), size=st.floats(0.1, 30), heat=st.sampled_from([1.0, 3.0]))
def test_jensen_shannon_is_scipys_in_bits_of_softened_predictions(seed, size, heat):
    one, other = (size * torch.randn(4, 6, generator=make_rng(seed, n)).double() for n in "ab")
    found = jensen_shannon(one, other, heat)
    p, q = (softmax(x.numpy() / heat, axis=1) for x in (one, other))
    wanted = torch.from_numpy(distance.jensenshannon(p, q, base=2, axis=1) ** 2)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found, jensen_shannon(other, one, heat))
    torch.testing.assert_close(found, jensen_shannon(one.log_softmax(-1), other + 5, heat))
    assert (found > -1e-12).all() and (found <= 1 + 1e-12).all()


def test_jensen_shannon_is_one_where_predictions_share_no_class():
    sure = 1000 * torch.eye(3)
    logits = sure[:2].requires_grad_(True)
    found = jensen_shannon(logits, sure[1:])
    torch.testing.assert_close(found, torch.ones(2))
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert jensen_shannon(sure, sure).abs().max() == 0


def compete(teacher, opponent, competition, **options):
    return invert(
        teacher, TARGETS, inversion_settings(**options), 0, opponent=opponent, competition=competition
    )


def test_without_an_opponent_or_a_weight_on_it_no_byte_changes(teacher, micro, sparse):
    options = dict(jitter=0.125, flip=True, tv=1e-4)
    assert same(compete(teacher, micro, 0.0, **options), sparse)
    assert same(compete(teacher, None, 2.0, **options), sparse)
    assert not torch.equal(compete(teacher, micro, 2.0, **options).pixels, sparse.pixels)


def test_competition_adds_its_weight_times_what_is_left_of_the_divergence(teacher, micro):
    made = compete(teacher, micro, 0.6)
    start = made.history["frames"][0]
    wanted = 0.6 * (1 - jensen_shannon(teacher(start), micro(start)).mean())
    found = made.history["loss"][0] - made.history["cross_entropy"][0]
    assert found.item() == pytest.approx(wanted.item(), abs=1e-4)


def test_competition_makes_images_more_disputed(teacher, micro):
    options = dict(iterations=25, stop_at=(), stop_ratio=(), keep_best=False)
    disputed = []
    for competition in (0.0, 10.0):
        pixels = compete(teacher, micro, competition, **options).pixels
        disputed.append(jensen_shannon(teacher(pixels), micro(pixels)).mean().item())
    assert disputed[1] > disputed[0] + 0.02


def test_an_opponent_forwards_the_live_patches_alone_and_is_left_as_it_is(teacher, micro):
    lengths, before = [], {k: v.clone() for k, v in micro.state_dict().items()}
    hook = micro.blocks[0].norm1.register_forward_hook(
        lambda m, args, out: lengths.append(args[0].shape[1] - 1)
    )
    compete(teacher, micro, 1.0)
    hook.remove()
    assert lengths == [36, 36, 25, 25, 25, 18, 18, 18]
    assert all(torch.equal(v, before[k]) for k, v in micro.state_dict().items())
    assert all(p.grad is None for p in micro.parameters())
