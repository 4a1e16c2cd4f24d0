"""ensemble.py against plain numpy loops over the uploaded models."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import make_upload

import fedmitr as fm
from fedmitr.server.ensemble import Owners, class_weights, client_weights, combine, histograms
from fedmitr.settings.schema import EnsembleSettings
from fedmitr.vision.tokens import cls_attention, forward_tokens, kept_patches

MODES = ("mean_probs", "mean_logits", "size", "class")


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def expected(uploads, logits, mode, temperature=1.0):
    """Return probabilities (..., C) from the clients' logits (K, ..., C), by the definition of each mode."""
    logits, total = np.asarray(logits, dtype=np.float64), sum(u.size for u in uploads)
    if mode == "mean_probs":
        return sum(softmax(z / temperature) for z in logits) / len(uploads)
    if mode == "size":
        return sum(softmax(z / temperature) * u.size / total for z, u in zip(logits, uploads, strict=True))
    mixed = np.zeros(logits.shape[1:])
    for y in range(logits.shape[-1]):
        held = sum(u.class_counts[y] for u in uploads)
        for z, u in zip(logits, uploads, strict=True):
            by_class = u.class_counts[y] / held if held else 1 / len(uploads)
            mixed[..., y] += z[..., y] * (by_class if mode == "class" else 1 / len(uploads))
    return softmax(mixed / temperature)


def make(uploads, mode):
    return fm.Ensemble(uploads, EnsembleSettings(mode=mode))


def close(found, wanted):
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_mode_against_loops(uploads, images, mode, temperature):
    logits = [u.vit()(images).numpy() for u in uploads]
    found = make(uploads, mode)(images, temperature=temperature)
    close(found.exp(), expected(uploads, logits, mode, temperature))


def test_logits_are_every_members_own(uploads, images):
    found = make(uploads, "size").logits(images)
    assert found.shape == (3, 3, 10)
    for u, logits in zip(uploads, found, strict=True):
        close(logits, u.vit()(images).numpy())


@pytest.mark.parametrize("mode", MODES)
def test_any_weights_combine_as_the_mode_says(mode):
    rng = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(2, 4, 5, 3, generator=rng), torch.tensor([[0.2], [0.5]])
    found = combine(logits, weights, mode, temperature=2.0)
    if mode in ("mean_logits", "class"):
        close(found.exp(), softmax((0.2 * logits[0] + 0.5 * logits[1]).numpy() / 2))
    else:
        close(found.exp(), 0.2 * softmax(logits[0].numpy() / 2) + 0.5 * softmax(logits[1].numpy() / 2))


def test_weights_of_their_own_for_every_class():
    logits, weights = torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]]]), torch.tensor([[0.9, 0.1], [0.1, 0.4]])
    close(combine(logits, weights, "mean_logits").exp(), softmax(np.array([[0.9 + 0.3, 0.2 + 2.0]])))


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_combined_like_cls(uploads, images, mode):
    cls_logits, token_logits = zip(*(forward_tokens(u.vit(), images) for u in uploads), strict=True)
    found_cls, found_tokens = make(uploads, mode).forward_tokens(images)
    assert found_tokens.shape == (3, 36, 10)
    close(found_cls.exp(), expected(uploads, torch.stack(cls_logits), mode))
    close(found_tokens.exp(), expected(uploads, torch.stack(token_logits), mode))


@pytest.mark.parametrize("mode", MODES)
def test_rows_sum_to_one(uploads, images, mode):
    teacher = make(uploads, mode)
    for log_probs in (teacher(images), *teacher.forward_tokens(images)):
        total = log_probs.exp().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_one_upload_is_that_model(uploads, images, mode):
    torch.testing.assert_close(make(uploads[:1], mode)(images), uploads[0].vit()(images).log_softmax(-1))


@pytest.mark.parametrize("mode", MODES)
def test_identical_uploads_are_one_of_them(uploads, images, mode):
    copies = [dataclasses.replace(uploads[0], client=k) for k in range(3)]
    wanted = uploads[0].vit()(images).log_softmax(-1)
    torch.testing.assert_close(make(copies, mode)(images), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_the_clients_does_not_matter(uploads, images, mode):
    wanted = make(uploads, mode)(images)
    torch.testing.assert_close(make(uploads[::-1], mode)(images), wanted, rtol=1e-4, atol=1e-5)


def test_kept_patches_reach_every_member(uploads, images):
    keep = torch.stack([torch.randperm(36, generator=torch.Generator().manual_seed(b))[:7] for b in range(3)])
    logits = [forward_tokens(u.vit(), images, keep)[0].numpy() for u in uploads]
    teacher = make(uploads, "mean_probs")
    close(teacher(images, keep).exp(), expected(uploads, logits, "mean_probs"))
    patches = kept_patches(uploads[0].vit(), images, keep)
    torch.testing.assert_close(teacher.forward_patches(*patches), teacher(images, keep))


@pytest.mark.parametrize("mode", MODES)
def test_importance_is_cls_attention_averaged_with_the_ensembles_weights(uploads, images, mode):
    keep = torch.stack([torch.randperm(36, generator=torch.Generator().manual_seed(b))[:7] for b in range(3)])
    share = {"mean_probs": [1 / 3] * 3, "mean_logits": [1 / 3] * 3}.get(mode)
    if mode == "size":
        share = [u.size / sum(u.size for u in uploads) for u in uploads]
    if mode == "class":
        held = np.array([u.class_counts for u in uploads], dtype=float)
        held[:, held.sum(0) == 0] = 1
        share = (held / held.sum(0)).mean(1)
    wanted = sum(
        w * cls_attention(u.vit(), images, keep).numpy() for w, u in zip(share, uploads, strict=True)
    )
    teacher = make(uploads, mode)
    close(teacher.importance(*kept_patches(teacher.members[0], images, keep)), wanted)


def test_class_weights_ignore_who_lacks_a_class_and_share_one_that_nobody_holds(uploads):
    weights = client_weights(uploads, "class")
    assert weights[:, 2].tolist() == [1, 0, 0]
    assert weights[:, 1].tolist() == pytest.approx([0.8, 0.2, 0])
    assert weights[:, 9].tolist() == pytest.approx([1 / 3] * 3)


def test_histograms_are_the_uploads_own_and_make_the_class_weights(uploads):
    counts = histograms(uploads)
    assert [tuple(row) for row in counts.int().tolist()] == [u.class_counts for u in uploads]
    assert torch.equal(class_weights(uploads), client_weights(uploads, "class"))
    held = counts.sum(0) > 0
    torch.testing.assert_close(class_weights(uploads)[:, held], counts[:, held] / counts.sum(0)[held])


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_every_mode_sum_to_one(uploads, mode):
    weights = client_weights(uploads, mode)
    assert weights.shape[0] == 3 and torch.allclose(weights.sum(0), torch.ones(weights.shape[1]))


def test_class_mode_without_a_histogram_is_one_line(uploads, one_line):
    with pytest.raises(fm.BadInput) as error:
        make([uploads[0], uploads[1].without_counts()], "class")
    one_line(error.value, "ensemble.mode='class'", "client 1")
    make([u.without_counts() for u in uploads], "size")


def test_no_uploads_is_one_line(one_line):
    with pytest.raises(fm.BadInput) as error:
        fm.Ensemble([])
    one_line(error.value, "uploads")


def test_the_teacher_is_frozen_but_lets_gradients_through_to_pixels(uploads, images):
    teacher = make(uploads, "size")
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.members)
    pixels = images.clone().requires_grad_(True)
    teacher(pixels)[:, 0].sum().backward()
    assert pixels.grad.abs().sum() > 0 and torch.isfinite(pixels.grad).all()


@pytest.mark.parametrize("mode", MODES)
def test_confident_disagreement_stays_finite(uploads, mode):
    logits = torch.full((3, 1, 10), -500.0)
    logits[0, :, 0], logits[1, :, 3], logits[2, :, 5] = 500.0, 500.0, 500.0
    log_probs = make(uploads, mode).combine(logits.requires_grad_(True))
    log_probs.sum().backward()
    assert torch.isfinite(log_probs).all() and torch.isfinite(logits.grad).all()


def test_owners_forward_their_own_images_alone(ensemble, uploads, images):
    owner = torch.tensor([2, 0, 2])
    keep = torch.tensor([[0, 7, 20], [35, 1, 2], [5, 6, 30]])
    owners = Owners(ensemble, owner)
    patches, positions = kept_patches(ensemble.members[0], images, keep)
    found = owners.forward_patches(patches, positions)
    attention = owners.importance(patches, positions)
    for i, k in enumerate(owner):
        vit = uploads[k].vit()
        wanted = forward_tokens(vit, images[i : i + 1], keep[i : i + 1])[0].log_softmax(dim=-1)
        close(found[i : i + 1], wanted.detach().numpy())
        close(attention[i : i + 1], cls_attention(vit, images[i : i + 1], keep[i : i + 1]).detach().numpy())
    close(
        owners.forward_patches(*kept_patches(ensemble.members[0], images)),
        np.stack([uploads[k].vit()(images)[i].log_softmax(-1).numpy() for i, k in enumerate(owner)]),
    )


def test_owners_are_drawn_by_their_shares_of_the_class(ensemble, uploads):
    counts = np.array([u.class_counts for u in uploads])
    for label in range(10):
        drawn = Owners.draw(ensemble, torch.full((2000,), label), seed=1).owner
        often = torch.bincount(drawn, minlength=3).numpy() / 2000
        held = counts[:, label].sum()
        share = counts[:, label] / held if held else np.full(3, 1 / 3)
        assert np.abs(often - share).max() < 0.05
        assert (often[share == 0] == 0).all()


def test_owners_need_class_histograms(uploads, one_line):
    without = fm.Ensemble([u.without_counts() for u in uploads], EnsembleSettings(mode="mean_probs"))
    with pytest.raises(fm.BadInput) as error:
        Owners.draw(without, torch.zeros(3, dtype=torch.long), seed=0)
    one_line(error.value, "inversion.teacher", "owners")


def test_teachers_in_bfloat16_hold_their_weights_so_and_predict_nearly_alike(uploads, images):
    half = fm.Ensemble(uploads, EnsembleSettings(mode="class", precision="bf16"))
    assert {m.weight.dtype for m in half.members.modules() if isinstance(m, torch.nn.Linear)} == {
        torch.bfloat16
    }
    assert all(w.dtype == torch.float32 for u in uploads for w in u.weights.values())
    full = make(uploads, "class")
    with torch.autocast("cpu", torch.bfloat16):  # weights rounded at every product instead
        wanted = torch.stack([m(images).float() for m in full.members])
    torch.testing.assert_close(half.logits(images), wanted, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half(images).exp(), full(images).exp(), rtol=0.1, atol=0.05)


@pytest.fixture
def many():
    """Eight clients who hold classes in very different shares; class 9 is nobody's."""
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 9, size=(8, 10)) * (rng.random((8, 10)) < 0.5)
    counts[:, 9] = 0
    uploads = [make_upload(k, tuple(map(int, row))) for k, row in enumerate(counts)]
    return fm.Ensemble(uploads, EnsembleSettings(mode="class"))


def test_without_a_number_all_members_are_taken(many):
    rng = torch.Generator().manual_seed(0)
    before = rng.get_state()
    assert many.drawn(None, rng) is many and torch.equal(rng.get_state(), before)


def test_drawn_members_hold_the_class_that_they_are_drawn_for(many, images):
    everyone = many.logits(images)
    for seed in range(5):
        few = many.drawn(1, torch.Generator().manual_seed(seed))
        assert len(few.members) <= 8 and few.weights.shape == (len(few.members), 10)
        close(few.weights.sum(0), np.ones(10))
        assert set(few.weights.unique().tolist()) == {0.0, 1.0}
        assert (few.shares[few.weights > 0] > 0).all()
        # each class's logit is that of one holder
        which = [next(k for k, m in enumerate(many.members) if m is member) for member in few.members]
        owner = [which[int(k)] for k in few.weights.argmax(0)]
        wanted = torch.stack([everyone[k, :, y] for y, k in enumerate(owner)], dim=1).log_softmax(1)
        close(few(images), wanted.numpy())


def test_over_draws_weights_are_the_shares(many):
    rng, total = torch.Generator().manual_seed(0), np.zeros((8, 10))
    for _ in range(400):
        few = many.drawn(2, rng)
        for member, row in zip(few.members, few.weights, strict=True):
            total[next(k for k, m in enumerate(many.members) if m is member)] += row.numpy() / 400
    np.testing.assert_allclose(total, many.shares.numpy(), atol=0.08)  # four standard errors
    assert len(many.members) == 8 and many.weights.shape == (8, 10)


@pytest.mark.parametrize("change", ["no counts", "another mode"])
def test_without_shares_to_draw_by_is_one_line(change, uploads, one_line):
    given = [u.without_counts() for u in uploads] if change == "no counts" else uploads
    teacher = fm.Ensemble(given, EnsembleSettings(mode="mean_probs"))
    with pytest.raises(fm.BadInput) as error:
        teacher.drawn(1, torch.Generator())
    one_line(error.value, "distill.per_class", "class_counts")


def test_drawn_members_keep_the_offset(many, images):
    offset = torch.arange(10.0)
    few = many.calibrated(offset).drawn(3, torch.Generator().manual_seed(0))
    plain = many.drawn(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(few(images), (plain(images) + offset).log_softmax(1))
