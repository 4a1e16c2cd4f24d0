"""Whole runs of inversion.py: what stops, what is returned, precision and compilation."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TARGETS, inversion_settings, inverted, same

import fedmitr as fm
from fedmitr.server.inversion import invert
from fedmitr.settings.schema import EnsembleSettings
from fedmitr.vision.patches import patchify
from fedmitr.vision.tokens import cls_attention, forward_tokens


def test_no_stops_is_dense(teacher):
    dense = inverted(teacher, stop_at=(), stop_ratio=())
    assert dense.mask.all() and (dense.history["kept"] == 1).all()


def test_the_mask_holds_what_is_left_after_every_stop(sparse):
    assert sparse.mask.dtype == torch.bool and (sparse.mask.sum(1) == 18).all()
    kept = (sparse.history["kept"] * 36).round().int().tolist()
    assert kept == [36] * 2 + [25] * 3 + [18] * 3
    seen = dict(zip(sparse.history["frame_at"].tolist(), sparse.history["frame_masks"], strict=True))
    assert [int(seen[s][0].sum()) for s in range(9)] == [36] * 3 + [25] * 3 + [18] * 3
    assert all((seen[s + 1] <= seen[s]).all() for s in range(8))
    assert torch.equal(seen[8], sparse.mask)


def test_stopped_patches_get_no_forward(teacher):
    lengths = []
    first = teacher.members[1].blocks[0]
    hook = first.norm1.register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1] - 1))
    inverted(teacher, tv=1e-4)
    hook.remove()
    # each stop forwards what is live once more, without gradients: 36 and 25
    assert lengths == [36, 36, 36, 25, 25, 25, 25, 18, 18, 18]


def frames(synthetic):
    """Return, per step, patches (B, N, d) and masks (B, N)."""
    history = synthetic.history
    pictures = [patchify(f, (4, 4)) for f in history["frames"]]
    assert history["frame_at"].tolist() == list(range(len(pictures)))
    return pictures, history["frame_masks"]


@pytest.mark.parametrize("background", ["keep", "zero", "noise", "mean"])
@pytest.mark.parametrize("tv_norm, clip", [("squares", False), ("norms", True)])
def test_a_stopped_patch_never_changes_again(teacher, background, tv_norm, clip):
    made = inverted(teacher, background=background, tv=1e-2, tv_norm=tv_norm, clip=clip, keep_best=False)
    pictures, masks = frames(made)
    final = patchify(made.pixels, (4, 4))
    for step in range(len(pictures) - 1):
        stopped = ~masks[step]
        assert torch.equal(pictures[step + 1][stopped], pictures[step][stopped]), step
        assert torch.equal(final[stopped], pictures[step][stopped]), step
        assert not torch.equal(pictures[step + 1][masks[step + 1]], pictures[step][masks[step + 1]])


def test_a_stopped_patch_holds_what_background_says(teacher):
    for background in ("keep", "zero", "noise", "mean"):
        pictures, masks = frames(inverted(teacher, background=background))
        before, after, stopped = pictures[2], pictures[3], ~masks[3]
        if background == "keep":
            assert torch.equal(after[stopped], before[stopped])
        elif background == "zero":
            assert (after[stopped] == 0).all()
        elif background == "mean":
            average = before.mean(dim=(1, 2))[:, None, None].expand_as(before)
            torch.testing.assert_close(after[stopped], average[stopped])
        else:
            values = after[stopped]
            assert not torch.equal(values, before[stopped])
            assert values.mean().abs() < 0.2 and 0.85 < values.std() < 1.15


def test_the_patches_that_stop_are_those_cls_attends_to_least(teacher):
    history = inverted(teacher).history
    for stop, left in ((2, 25), (5, 18)):
        picture, before, after = (
            history[n][i] for n, i in (("frames", stop), ("frame_masks", stop), ("frame_masks", stop + 1))
        )
        keep = torch.stack([torch.nonzero(row)[:, 0] for row in before])
        attention = sum(cls_attention(m, picture, keep) for m in teacher.members) / 2
        for row, index, kept in zip(attention, keep, after, strict=True):
            ranked = sorted(zip(row.tolist(), index.tolist(), strict=True), reverse=True)
            assert {i for _, i in ranked[:left]} == set(torch.nonzero(kept)[:, 0].tolist())


def test_clipped_pixels_lie_between_black_and_white(teacher):
    """ViT-Micro's pixels are normalised by 0.5 and 0.25, so that these are -2 and 2."""
    free, clipped = (inverted(teacher, lr=2.0, clip=clip, keep_best=False) for clip in (False, True))
    assert free.pixels.abs().max() > 3
    pictures, masks = frames(clipped)
    for picture, mask in zip(pictures[1:], masks[1:], strict=True):
        assert picture.min() >= -2 and picture.max() <= 2
        assert (picture[mask].abs() == 2).any() and (picture[mask].abs() < 2).any()
    assert pictures[0].abs().max() > 2  # the first noise is what it was
    torch.testing.assert_close(pictures[1], patchify(free.history["frames"][1], (4, 4)).clamp(-2, 2))


@pytest.mark.parametrize("who", ["ensemble", "owners"])
def test_an_attention_mask_is_what_cls_attends_to_most_in_the_finished_image(teacher, who):
    settings = [inversion_settings(teacher=who, mask=mask) for mask in ("survivors", "attention")]
    one, other = (invert(teacher, TARGETS, s, 0) for s in settings)
    assert torch.equal(one.pixels, other.pixels) and torch.equal(one.loss, other.loss)
    assert not torch.equal(one.mask, other.mask) and (other.mask.sum(1) == 18).all()
    attention = torch.stack([cls_attention(m, other.pixels) for m in teacher.members])  # (2, 4, 36)
    for b, owner in enumerate((1, 0, None, 1)):  # who alone holds 3, 0 and 3; nobody holds 9
        if who == "owners" and owner is None:
            continue
        shown = attention[:, b].mean(0) if who == "ensemble" else attention[owner, b]
        wanted = shown.argsort(descending=True)[:18].tolist()
        assert sorted(wanted) == other.mask[b].nonzero()[:, 0].tolist()


def test_a_dense_image_is_all_foreground_whatever_the_mask(teacher):
    assert inverted(teacher, stop_at=(), stop_ratio=(), mask="attention").mask.all()


@pytest.mark.parametrize("keep_best, mask", [(True, "survivors"), (False, "survivors"), (True, "attention")])
def test_the_last_picture_shows_what_the_student_receives(teacher, keep_best, mask):
    made = inverted(teacher, jitter=0.3, iterations=12, keep_best=keep_best, mask=mask)
    assert made.history["frame_at"][-1] == 12
    assert torch.equal(made.history["frames"][-1], made.pixels)
    assert torch.equal(made.history["frame_masks"][-1], made.mask)


def test_the_loss_falls(teacher):
    log = inverted(teacher, iterations=25, lr=0.1).history
    assert log["loss"][-3:].mean() < 0.5 * log["loss"][:3].mean()
    assert log["confidence"][-1] > log["confidence"][0]


def test_the_target_matters(teacher):
    other = torch.tensor([1, 2, 3, 4])
    one, two = inverted(teacher), inverted(teacher, labels=other)
    assert torch.equal(one.history["frames"][0], two.history["frames"][0])
    assert not torch.equal(one.pixels, two.pixels) and torch.equal(two.labels, other)


def test_a_seed_fixes_every_byte(teacher):
    one, again, other = (
        inverted(teacher, seed=s, jitter=0.125, flip=True, background="noise") for s in (7, 7, 8)
    )
    assert same(one, again) and not torch.equal(one.pixels, other.pixels)


def test_inversion_leaves_the_ensemble_and_the_random_state_alone(teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    state = torch.get_rng_state()
    inverted(teacher)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_everything_is_finite_and_in_shape(teacher):
    labels = torch.arange(25) % 10
    made = inverted(teacher, labels=labels, iterations=4, stop_at=(1,), stop_ratio=(0.9,))
    assert made.pixels.shape == (25, 1, 24, 24) and made.mask.shape == (25, 36) and len(made) == 25
    assert torch.isfinite(made.pixels).all() and torch.isfinite(made.loss).all()
    for name in ("loss", "cross_entropy", "confidence", "kept"):
        assert made.history[name].shape == (4,) and torch.isfinite(made.history[name]).all()
    count = len(made.history["frame_at"])
    assert made.history["frames"].shape == (count, 20, 1, 24, 24)
    assert made.history["frame_masks"].shape == (count, 20, 36)
    assert not made.pixels.requires_grad


def test_progress_counts_iterations(teacher):
    steps = []
    invert(teacher, TARGETS, inversion_settings(), 0, progress=steps.append)
    assert steps == [1] * 8


def test_with_owners_every_image_passes_its_client_alone(uploads):
    teacher = fm.Ensemble(uploads, EnsembleSettings(mode="mean_probs"))
    seen = [0, 0, 0]

    def count(k):
        def hook(module, args, out):
            seen[k] += len(args[0])

        return hook

    hooks = [m.blocks[0].norm1.register_forward_hook(count(k)) for k, m in enumerate(teacher.members)]
    labels = torch.tensor([1, 6, 7, 2, 4])  # client 2 alone knows 7 and 6, client 1 4, client 0 2
    made = invert(teacher, labels, inversion_settings(teacher="owners"), 0)
    for hook in hooks:
        hook.remove()
    passes = 8 + 2  # iterations and stops
    assert sum(seen) == passes * len(labels) and seen[2] >= 2 * passes and min(seen) >= passes
    assert made.labels.tolist() == labels.tolist()
    for i, k in {1: 2, 2: 2, 3: 0, 4: 1}.items():
        keep = torch.nonzero(made.mask[i])[:, 0][None]
        alone = forward_tokens(teacher.members[k], made.pixels[i : i + 1], keep)[0]
        wanted = F.cross_entropy(alone, labels[i : i + 1]).item()
        assert made.loss[i].item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("mode", ["mean_probs", "class"])
def test_bf16_inversion_follows_fp32(uploads, mode):
    """A few small steps in bfloat16 move the pixels nearly as in float32, but not to the same bits."""
    made = [
        inverted(
            fm.Ensemble(uploads[:2], EnsembleSettings(mode=mode, precision=p)),
            lr=0.01,
            stop_at=(),
            stop_ratio=(),
        )
        for p in ("fp32", "bf16")
    ]
    start = made[0].history["frames"][0]
    assert torch.equal(start, made[1].history["frames"][0])
    moved = [m.history["frames"][-1] - start for m in made]
    agree = F.cosine_similarity(*(m.flatten(1) for m in moved))
    assert (agree > 0.95).all() and not torch.equal(*moved)
    assert made[1].pixels.dtype == torch.float32 and made[1].loss.dtype == torch.float32


def test_auto_is_what_the_machine_has(uploads, monkeypatch):
    made = {}
    for native in (True, False):
        monkeypatch.setattr("fedmitr.core.machine.native_bf16", lambda native=native: native)
        made[native] = inverted(fm.Ensemble(uploads[:2], EnsembleSettings(precision="auto")))
    for native, name in ((True, "bf16"), (False, "fp32")):
        assert same(made[native], inverted(fm.Ensemble(uploads[:2], EnsembleSettings(precision=name))))
    assert not same(made[True], made[False])


def test_published_settings_stay_the_published_ones():
    found = fm.Settings.load("paper")
    inversion = found.inversion
    assert (inversion.iterations, inversion.lr, inversion.betas) == (4000, 0.25, (0.5, 0.99))
    assert inversion.schedule == "constant" and inversion.stop_at == (50, 100, 200, 300)
    assert {found.ensemble.precision, found.distill.precision, found.client.precision} == {"fp32"}
