"""inversion.py: the geometry of views, what stops, what is optimised and what is returned."""

import pytest
import torch
import torch.nn.functional as F
from helpers import same
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import distance
from scipy.special import softmax

import fedmitr as fm
from fedmitr.core.rng import make_rng
from fedmitr.server.inversion import _look, invert, jensen_shannon, remaining
from fedmitr.server.synthetic import balanced_labels, label_batches, load_synthetic, save_synthetic
from fedmitr.server.views import random_move
from fedmitr.settings.schema import EnsembleSettings, InversionSettings
from fedmitr.vision.augment import random_maps
from fedmitr.vision.patches import PatchGrid, patchify, unpatchify
from fedmitr.vision.tokens import cls_attention, forward_tokens

LABELS = torch.tensor([3, 0, 9, 3])


@pytest.fixture(scope="module")
def teacher(uploads):
    return fm.Ensemble(uploads[:2], EnsembleSettings(mode="mean_probs"))


def settings(**options):
    """Eight iterations with two stops; views as they are, cross-entropy alone."""
    base = dict(iterations=8, stop_at=(2, 5), stop_ratio=(0.3, 0.3), lr=0.1, betas=(0.5, 0.99))
    base |= dict(
        schedule="constant", ce=1.0, tv=0.0, l2=0.0, jitter=0.0, flip=False, background="keep", keep_best=True
    )
    base |= dict(teacher="ensemble", augment=0.0)
    return InversionSettings(**(base | options))


def run(teacher, seed=0, labels=LABELS, **options):
    return invert(teacher, labels, settings(**options), seed)


@pytest.fixture(scope="module")
def sparse(teacher):
    return run(teacher, jitter=0.125, flip=True, tv=1e-4)


# What stops, and when.


def test_published_stops_leave_24_percent():
    assert [remaining(36, [0.3] * k) for k in range(5)] == [36, 25, 18, 13, 9]
    assert [remaining(196, [0.3] * k) for k in range(5)] == [196, 137, 96, 67, 47]


@given(st.integers(1, 400), st.lists(st.floats(0.01, 0.99), max_size=5))
def test_at_least_one_patch_remains_and_the_shares_are_taken_to_within_one(count, ratios):
    for ratio in ratios:
        left = remaining(count, [ratio])
        assert 1 <= left <= count and abs(left - max(1, count * (1 - ratio))) <= 0.5 + 1e-9
        count = left


def test_no_stops_is_dense(teacher):
    dense = run(teacher, stop_at=(), stop_ratio=())
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
    run(teacher, tv=1e-4)
    hook.remove()
    # each stop looks once more, without gradients, at what is live: 36 and 25
    assert lengths == [36, 36, 36, 25, 25, 25, 25, 18, 18, 18]


def frames(synthetic):
    """Per step: patches (B, N, d) and masks (B, N)."""
    history = synthetic.history
    pictures = [patchify(f, (4, 4)) for f in history["frames"]]
    assert history["frame_at"].tolist() == list(range(len(pictures)))
    return pictures, history["frame_masks"]


@pytest.mark.parametrize("background", ["keep", "zero", "noise", "mean"])
def test_a_stopped_patch_never_changes_again(teacher, background):
    made = run(teacher, background=background, tv=1e-2)
    pictures, masks = frames(made)
    final = patchify(made.pixels, (4, 4))
    for step in range(len(pictures) - 1):
        stopped = ~masks[step]
        assert torch.equal(pictures[step + 1][stopped], pictures[step][stopped]), step
        assert torch.equal(final[stopped], pictures[step][stopped]), step
        assert not torch.equal(pictures[step + 1][masks[step + 1]], pictures[step][masks[step + 1]])


def test_a_stopped_patch_holds_what_background_says(teacher):
    for background in ("keep", "zero", "noise", "mean"):
        pictures, masks = frames(run(teacher, background=background))
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
    history = run(teacher).history
    for stop, left in ((2, 25), (5, 18)):
        picture, before, after = (
            history[n][i] for n, i in (("frames", stop), ("frame_masks", stop), ("frame_masks", stop + 1))
        )
        keep = torch.stack([torch.nonzero(row)[:, 0] for row in before])
        attention = sum(cls_attention(m, picture, keep) for m in teacher.members) / 2
        for row, index, kept in zip(attention, keep, after, strict=True):
            ranked = sorted(zip(row.tolist(), index.tolist(), strict=True), reverse=True)
            assert {i for _, i in ranked[:left]} == set(torch.nonzero(kept)[:, 0].tolist())


# What is optimised, and what is returned.


@pytest.fixture
def double():
    """Everything made inside is in double precision, so that two paths can agree closely."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("ce, tv, l2", [(1.0, 0.0, 0.0), (0.5, 1e-3, 1e-2)])
def test_dense_inversion_is_torchs_adam_on_the_pixels(uploads, double, ce, tv, l2, schedule):
    teacher = fm.Ensemble(uploads[:2], EnsembleSettings(mode="mean_probs")).double()
    options = dict(stop_at=(), stop_ratio=(), keep_best=False, ce=ce, tv=tv, l2=l2, schedule=schedule)
    made = run(teacher, lr=0.25, betas=(0.5, 0.99), **options)
    x = made.history["frames"][0].clone().requires_grad_(True)
    adam = torch.optim.Adam([x], lr=0.25, betas=(0.5, 0.99))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=8)
    for _ in range(8):
        probs = sum(m(x).softmax(-1) for m in teacher.members) / 2
        loss = ce * -probs[torch.arange(4), LABELS].log().sum() + l2 * x.pow(2).sum()
        loss = loss + tv * (x.diff(dim=2).pow(2).sum() + x.diff(dim=3).pow(2).sum())
        adam.zero_grad()
        loss.backward()
        adam.step()
        if schedule == "cosine":
            falling.step()
    torch.testing.assert_close(made.pixels, x.detach(), rtol=1e-6, atol=1e-6)


def test_surviving_patches_keep_adams_moments_over_a_stop(uploads, double):
    """With a stop of the CLS-irrelevant kind: an Adam per pixel, masked, agrees on the survivors."""
    teacher = fm.Ensemble(uploads[:1], EnsembleSettings(mode="mean_probs")).double()
    made = run(teacher, lr=0.25, stop_at=(3,), stop_ratio=(0.5,), keep_best=False)
    x = patchify(made.history["frames"][0], (4, 4)).clone().requires_grad_(True)
    adam = torch.optim.Adam([x], lr=0.25, betas=(0.5, 0.99))
    keep = torch.stack([torch.nonzero(row)[:, 0] for row in made.mask])
    for step in range(8):
        image = unpatchify(x, (4, 4), (24, 24))
        log_probs = teacher(image) if step < 3 else teacher(image, keep)
        adam.zero_grad()
        F.nll_loss(log_probs, LABELS, reduction="sum").backward()
        adam.step()
    found = patchify(made.pixels, (4, 4))
    torch.testing.assert_close(found[made.mask], x.detach()[made.mask], rtol=1e-6, atol=1e-6)


def test_the_loss_falls(teacher):
    log = run(teacher, iterations=25, lr=0.1).history
    assert log["loss"][-3:].mean() < 0.5 * log["loss"][:3].mean()
    assert log["confidence"][-1] > log["confidence"][0]


def loss_of(teacher, made):
    """Cross-entropy (B,) of the returned pixels on their surviving patches."""
    keep = torch.stack([torch.nonzero(row)[:, 0] for row in made.mask])
    return F.nll_loss(teacher(made.pixels, keep), LABELS, reduction="none")


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_reported_loss_is_that_of_the_returned_pixels(teacher, keep_best):
    made = run(teacher, lr=2.0, keep_best=keep_best)
    torch.testing.assert_close(made.loss, loss_of(teacher, made), rtol=1e-4, atol=1e-5)


def test_the_best_iterate_is_each_images_least_loss_after_the_last_stop(teacher, monkeypatch):
    losses, real = [], teacher.forward_patches

    def record(patches, position):
        log_probs = real(patches, position)
        losses.append(-log_probs.detach()[torch.arange(4), LABELS])
        return log_probs

    monkeypatch.setattr(teacher, "forward_patches", record)
    made = run(teacher, jitter=0.3, iterations=12)  # views move, so that the last is not always the best
    after = torch.stack(losses[5:12])
    best = 5 + after.argmin(0)
    assert torch.equal(made.loss, after.min(0).values) and (best < 11).any()
    assert made.history["frame_at"].tolist() == list(range(13))
    for b in range(4):
        assert torch.equal(made.pixels[b], made.history["frames"][best[b], b])


def test_without_keep_best_the_last_iterate_is_returned(teacher):
    made = run(teacher, keep_best=False)
    assert torch.equal(made.pixels, made.history["frames"][-1])


def test_the_target_matters(teacher):
    other = torch.tensor([1, 2, 3, 4])
    one, two = run(teacher), run(teacher, labels=other)
    assert torch.equal(one.history["frames"][0], two.history["frames"][0])
    assert not torch.equal(one.pixels, two.pixels) and torch.equal(two.labels, other)


def test_a_seed_fixes_every_byte(teacher):
    one, again, other = (run(teacher, seed=s, jitter=0.125, flip=True, background="noise") for s in (7, 7, 8))
    assert same(one, again) and not torch.equal(one.pixels, other.pixels)


def test_inversion_leaves_the_ensemble_and_the_random_state_alone(teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    state = torch.get_rng_state()
    run(teacher)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_everything_is_finite_and_in_shape(teacher):
    labels = torch.arange(25) % 10
    made = run(teacher, labels=labels, iterations=4, stop_at=(1,), stop_ratio=(0.9,))
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
    invert(teacher, LABELS, settings(), 0, progress=steps.append)
    assert steps == [1] * 8


# Precision and compilation.


@pytest.mark.parametrize("mode", ["mean_probs", "class"])
def test_bf16_inversion_follows_fp32(uploads, mode):
    """A few small steps in bfloat16 move the pixels nearly as in float32, but not to the same bits."""
    made = [
        run(
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
        made[native] = run(fm.Ensemble(uploads[:2], EnsembleSettings(precision="auto")))
    for native, name in ((True, "bf16"), (False, "fp32")):
        assert same(made[native], run(fm.Ensemble(uploads[:2], EnsembleSettings(precision=name))))
    assert not same(made[True], made[False])


def test_a_compiled_teacher_is_used_and_gives_the_same_images(uploads, monkeypatch, teacher):
    calls = []

    def compile(function, dynamic):
        return lambda *args: calls.append(len(args)) or function(*args)

    monkeypatch.setattr(torch, "compile", compile)
    compiled = fm.Ensemble(uploads[:2], EnsembleSettings(mode="mean_probs", compile=True))
    assert same(run(compiled), run(teacher)) and len(calls) == 2 * 8


def test_where_compilation_fails_inversion_goes_on_and_says_so_once(uploads, monkeypatch, teacher):
    def broken(*args):
        raise RuntimeError("no compiler here\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: broken)
    compiled = fm.Ensemble(uploads[:2], EnsembleSettings(mode="mean_probs", compile=True))
    with pytest.warns(UserWarning, match="going on without it: no compiler here$") as warned:
        made = run(compiled)
    assert len(warned) == 1 and same(made, run(teacher))


def test_published_settings_stay_the_published_ones():
    found = fm.Settings.load("paper")
    inversion = found.inversion
    assert (inversion.iterations, inversion.lr, inversion.betas) == (4000, 0.25, (0.5, 0.99))
    assert inversion.schedule == "constant" and inversion.stop_at == (50, 100, 200, 300)
    assert {found.ensemble.precision, found.distill.precision, found.client.precision} == {"fp32"}
    assert not found.ensemble.compile


# A rival: images on which ensemble and student differ.


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


def compete(teacher, rival, competition, **options):
    return invert(teacher, LABELS, settings(**options), 0, rival=rival, competition=competition)


def test_without_a_rival_or_a_weight_on_it_no_byte_changes(teacher, micro, sparse):
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


def test_a_rival_sees_the_live_patches_alone_and_is_left_as_it_is(teacher, micro):
    lengths, before = [], {k: v.clone() for k, v in micro.state_dict().items()}
    hook = micro.blocks[0].norm1.register_forward_hook(
        lambda m, args, out: lengths.append(args[0].shape[1] - 1)
    )
    compete(teacher, micro, 1.0)
    hook.remove()
    assert lengths == [36, 36, 25, 25, 25, 18, 18, 18]
    assert all(torch.equal(v, before[k]) for k, v in micro.state_dict().items())
    assert all(p.grad is None for p in micro.parameters())


# One client an image, and views through affine maps.


def test_with_owners_every_image_passes_its_client_alone(uploads):
    teacher = fm.Ensemble(uploads, EnsembleSettings(mode="mean_probs"))
    seen = [0, 0, 0]

    def count(k):
        def hook(module, args, out):
            seen[k] += len(args[0])

        return hook

    hooks = [m.blocks[0].norm1.register_forward_hook(count(k)) for k, m in enumerate(teacher.members)]
    labels = torch.tensor([1, 6, 7, 2, 4])  # client 2 alone knows 7 and 6, client 1 4, client 0 2
    made = invert(teacher, labels, settings(teacher="owners"), 0)
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


@pytest.mark.parametrize("kept", [36, 12])
@pytest.mark.parametrize("flip", [False, True])
def test_an_augmented_view_is_the_warped_image_where_most_of_the_kept_patches_shows(kept, flip, double):
    rng = torch.Generator().manual_seed(3)
    shape = PatchGrid(2, (24, 24), (4, 4), (6, 6))
    image = torch.randn(5, 2 * 24 * 24, generator=rng)
    keep = torch.arange(36)[None] if kept == 36 else torch.rand(5, 36, generator=rng).argsort(1)[:, :kept]
    mirrored = set()
    for seed in range(6):
        view, place, back = _look(
            image, keep, shape, settings(augment=0.7, flip=flip, jitter=0.125), make_rng(seed)
        )
        again = make_rng(seed)
        _, turned = random_move(shape, 0.125, flip, again)
        maps = random_maps(5, 0.7, again).to(image)
        mirrored.add(turned)
        x = image.clone().requires_grad_()
        base = F.affine_grid(maps, [5, 2, 24, 24], align_corners=False)
        if turned:
            base = base.flip(2)  # what a map shows at the right now stands at the left
        whole = F.grid_sample(x.view(5, 2, 24, 24), base, padding_mode="reflection", align_corners=False)
        place = place.expand(5, -1)
        wanted = patchify(whole, (4, 4)).gather(1, place[:, :, None].expand(-1, -1, 32))
        torch.testing.assert_close(view, wanted)
        of_view = torch.randn(view.shape, generator=rng)
        torch.testing.assert_close(back(of_view), torch.autograd.grad(wanted, x, of_view)[0])
        mask = torch.zeros(5, 1, 6, 6).view(5, 36).scatter(1, keep.expand(5, -1), 1.0).view(5, 1, 6, 6)
        shown = F.grid_sample(
            mask.repeat_interleave(4, 2).repeat_interleave(4, 3), base, padding_mode="reflection",
            align_corners=False,
        )  # fmt: skip
        for row, at in zip(patchify(shown, (4, 4)).mean(-1), place, strict=True):
            assert row[at].min() >= row.topk(kept).values.min() - 1e-9
    assert mirrored == ({False, True} if flip else {False})


# Batches.


@given(count=st.integers(1, 60), classes=st.integers(1, 12), seed=st.integers(0, 99))
def test_labels_are_balanced_and_shuffled(count, classes, seed):
    labels = balanced_labels(count, classes, torch.Generator().manual_seed(seed))
    counts = torch.bincount(labels, minlength=classes)
    assert len(labels) == count and len(counts) == classes and counts.max() - counts.min() <= 1


def test_label_batches_cover_the_images_asked_for():
    batches = label_batches(InversionSettings(images=70, batch_size=32), torch.arange(10), seed=1)
    assert [len(b) for b in batches] == [32, 32, 6]
    assert torch.bincount(torch.cat(batches)).tolist() == [7] * 10
    assert torch.cat(batches).tolist() != sorted(torch.cat(batches).tolist())
    again = label_batches(InversionSettings(images=70, batch_size=32), torch.arange(10), seed=2)
    assert not torch.equal(torch.cat(batches), torch.cat(again))
    some = label_batches(InversionSettings(images=6, batch_size=6), torch.tensor([2, 5, 7]), seed=1)
    assert sorted(some[0].tolist()) == [2, 2, 5, 5, 7, 7]


def test_a_synthetic_set_comes_back_from_disk(sparse, tmp_path):
    save_synthetic(sparse, tmp_path)
    assert same(load_synthetic(tmp_path), sparse)


def test_sets_join_in_order_and_average_their_curves(teacher, sparse):
    other = run(teacher, seed=1)
    joined = fm.SyntheticSet.concat([sparse, other])
    assert torch.equal(joined.pixels, torch.cat([sparse.pixels, other.pixels])) and len(joined) == 8
    assert torch.equal(joined.mask[4:], other.mask) and torch.equal(joined.labels[:4], sparse.labels)
    mean = (sparse.history["loss"] + other.history["loss"]) / 2
    torch.testing.assert_close(joined.history["loss"], mean)
    assert torch.equal(joined.history["frames"], sparse.history["frames"])
