"""augment.py and distill.py: the loss in closed form, pixels and mask that move together, learning."""

import copy
import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fedmitr as fm
from fedmitr.core.rng import make_rng
from fedmitr.core.store import Store
from fedmitr.methods.fedavg import average_weights
from fedmitr.server.distill import calibrated, distill, distill_loss, fit_offset, take_gradients
from fedmitr.server.relabel import soft_token_labels
from fedmitr.server.views import epochs, random_textures, view
from fedmitr.settings import Settings
from fedmitr.settings.schema import DistillSettings, EnsembleSettings, ModelSettings, RelabelSettings
from fedmitr.vision.augment import random_maps, warp, warp_mask
from fedmitr.vision.patches import pixel_mask
from fedmitr.vision.tokens import forward_tokens

distill_module = importlib.import_module("fedmitr.distill")
pipeline = importlib.import_module("fedmitr.methods.fedmitr")  # the package's name for it is the method
GRID = (6, 6)


@pytest.fixture(scope="module")
def teacher(uploads):
    return fm.Ensemble(uploads, EnsembleSettings(mode="mean_probs"))


def masks(n, share=0.4, seed=0):
    return torch.rand(n, 36, generator=torch.Generator().manual_seed(seed)) < share


# Geometry.


def affine(*rows):
    return torch.tensor([rows], dtype=torch.float32)


def test_identity_maps_change_nothing(images):
    identity = torch.eye(2, 3).expand(3, -1, -1)
    torch.testing.assert_close(warp(images, identity), images, rtol=1e-5, atol=1e-5)
    mask = masks(3)
    assert torch.equal(warp_mask(mask, identity, GRID), mask)
    assert torch.allclose(random_maps(3, 0.0, make_rng(0)), identity)


@pytest.mark.parametrize("down, right", [(0, 1), (2, 0), (-1, 3)])
def test_a_shift_by_whole_patches_moves_pixels_and_mask_alike(down, right):
    """An output point looks 2·shift/cells further up or left, in the frame's coordinates."""
    maps = affine([1, 0, -2 * right / 6], [0, 1, -2 * down / 6]).expand(4, -1, -1)
    mask = masks(4)
    moved = warp_mask(mask, maps, GRID).view(4, 6, 6)
    rows = slice(max(0, down), 6 + min(0, down)), slice(max(0, -down), 6 - max(0, down))
    columns = slice(max(0, right), 6 + min(0, right)), slice(max(0, -right), 6 - max(0, right))
    assert torch.equal(moved[:, rows[0], columns[0]], mask.view(4, 6, 6)[:, rows[1], columns[1]])
    pixels = warp(pixel_mask(mask, GRID, (24, 24)).float(), maps)
    torch.testing.assert_close(
        pixels, pixel_mask(moved.flatten(1), GRID, (24, 24)).float(), atol=1e-4, rtol=0
    )


def test_a_quarter_turn_turns_pixels_and_mask_alike(images):
    quarter = affine([0, -1, 0], [1, 0, 0]).expand(3, -1, -1)
    turned = warp(images, quarter)
    by = 1 if torch.allclose(turned, images.rot90(1, (2, 3)), atol=1e-4) else -1
    torch.testing.assert_close(turned, images.rot90(by, (2, 3)), rtol=1e-4, atol=1e-4)
    mask = masks(3)
    assert torch.equal(warp_mask(mask, quarter, GRID).view(3, 6, 6), mask.view(3, 6, 6).rot90(by, (1, 2)))


def test_what_comes_into_view_mirrors_the_border():
    maps = random_maps(20, 1.0, make_rng(1))
    white = torch.ones(20, 1, 24, 24)
    torch.testing.assert_close(warp(white, maps), white, rtol=1e-5, atol=1e-5)
    assert warp_mask(torch.ones(20, 36, dtype=torch.bool), maps, GRID).all()


@pytest.mark.parametrize("patch", [4, 16])
def test_a_marker_painted_on_the_kept_patches_stays_on_them(patch):
    size = (6 * patch, 6 * patch)
    mask = masks(40)
    maps = random_maps(40, 1.0, make_rng(3))
    painted = warp(pixel_mask(mask, GRID, size).float(), maps)
    share = F.avg_pool2d(painted, patch).flatten(1)
    moved = warp_mask(mask, maps, GRID)
    clear = (share - 0.5).abs() > 0.1
    assert clear.double().mean() > 0.6 and torch.equal(moved[clear], share[clear] > 0.5)
    assert not torch.equal(moved, mask)


def test_strength_one_reaches_its_limits_and_no_further():
    maps = random_maps(4000, 1.0, make_rng(0)).double()
    area = torch.linalg.det(maps[:, :, :2]) ** -0.5
    assert 0.74 < area.min() < 0.78 and 1.22 < area.max() < 1.26
    centre = torch.linalg.solve(maps[:, :, :2], -maps[:, :, 2])
    assert 0.38 < centre.abs().max() <= 0.4 + 1e-6


def test_pixel_mask_by_loops():
    mask = masks(2)
    found = pixel_mask(mask, GRID, (12, 18))
    assert found.shape == (2, 1, 12, 18)
    for y in range(12):
        for x in range(18):
            assert torch.equal(found[:, 0, y, x], mask[:, y // 2 * 6 + x // 3])


# Views.


def look(student, synthetic, pick=None, seed=5, **options):
    settings = DistillSettings(**(dict(augment=0.0, background="keep") | options))
    pick = torch.arange(len(synthetic)) if pick is None else pick
    return view(student, synthetic, pick, settings, make_rng(seed))


@pytest.fixture(scope="module")
def marked(synthetic):
    """A synthetic set whose pixels are its mask."""
    pixels = pixel_mask(synthetic.mask, GRID, (24, 24)).float()
    return fm.SyntheticSet(pixels, synthetic.labels, synthetic.mask, synthetic.loss)


def test_without_augmentation_a_view_is_the_picked_images(micro, synthetic):
    pick = torch.tensor([7, 2, 2])
    images, mask = look(micro, synthetic, pick)
    assert torch.equal(images, synthetic.pixels[pick]) and torch.equal(mask, synthetic.mask[pick])


def test_pixels_and_mask_of_a_view_move_together(micro, marked):
    images, mask = look(micro, marked, augment=1.0)
    share = F.avg_pool2d(images, 4).flatten(1)
    clear = (share - 0.5).abs() > 1e-3
    assert torch.equal(mask[clear], share[clear] > 0.5) and not torch.equal(mask, marked.mask)


def test_texture_replaces_only_the_low_density_patches(micro, marked):
    images, mask = look(micro, marked, background="texture")
    on = pixel_mask(mask, GRID, (24, 24))
    assert torch.equal(mask, marked.mask) and (images[on] == 1).all()
    assert (images[~on] != 0).double().mean() > 0.99
    again, _ = look(micro, marked, background="texture")
    other, _ = look(micro, marked, background="texture", seed=6)
    assert torch.equal(images, again) and not torch.equal(images, other)


def test_textures_are_smooth_and_in_the_range_of_the_models_pixels(micro, images):
    made = random_textures(micro, images.expand(3, 2, 24, 24), make_rng(0))
    assert made.shape == (3, 2, 24, 24)
    assert made.min() >= -2 - 1e-4 and made.max() <= 2 + 1e-4  # [0, 1] in units of 0.25 around 0.5
    assert (made.diff(dim=-1).abs() < 1).all() and made.std() > 0.1


def test_a_dense_set_has_no_background_to_replace(micro, synthetic):
    everything = torch.ones_like(synthetic.mask)
    dense = fm.SyntheticSet(synthetic.pixels, synthetic.labels, everything, synthetic.loss)
    images, mask = look(micro, dense, background="texture")
    assert torch.equal(images, synthetic.pixels) and mask.all()


def test_views_leave_the_synthetic_set_alone(micro, synthetic):
    before = [t.clone() for t in (synthetic.pixels, synthetic.mask, synthetic.labels)]
    look(micro, synthetic, augment=1.0, background="texture")
    look(micro, synthetic, background="texture")
    after = (synthetic.pixels, synthetic.mask, synthetic.labels)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@given(count=st.integers(1, 30), batch=st.integers(1, 12), times=st.integers(0, 4))
def test_every_image_comes_once_an_epoch(count, batch, times):
    batches = list(epochs(count, batch, make_rng(0), times))
    assert len(batches) == times * math.ceil(count / batch)
    drawn = torch.cat([torch.empty(0, dtype=torch.int64), *batches])
    for epoch in range(times):
        part = drawn[epoch * count : (epoch + 1) * count]
        assert sorted(part.tolist()) == list(range(count))


# The loss.


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("heat", [1.0, 3.0])
@pytest.mark.parametrize("by_ce, by_tokens", [(0.0, 0.0), (0.4, 0.0), (0.0, 0.3), (0.4, 0.3)])
def test_the_loss_in_closed_form(micro, images, heat, by_ce, by_tokens):
    rng = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 10, generator=rng).log_softmax(-1)
    targets = torch.randn(3, 36, 10, generator=rng).softmax(-1)
    labels = torch.tensor([4, 0, 1])
    settings = DistillSettings(temperature=heat, ce_weight=by_ce, token_weight=by_tokens)
    found = distill_loss(micro, images, teacher, labels, targets, settings, RelabelSettings())

    of_cls, of_tokens = (z.double().numpy() for z in forward_tokens(micro, images))
    p = softmax(teacher.double().numpy() / heat)
    q = softmax(of_cls / heat)
    wanted = heat**2 * (p * np.log(p / q)).sum() / 3
    log_p = np.log(softmax(of_cls))
    wanted += by_ce * -(log_p[0, 4] + log_p[1, 0] + log_p[2, 1]) / 3
    tokens = -(targets.double().numpy() * np.log(softmax(of_tokens))).sum(-1)
    wanted += by_tokens * tokens.mean()
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_mode_none_drops_the_token_term(micro, images):
    rng = torch.Generator().manual_seed(0)
    rest = (torch.randn(3, 10, generator=rng).log_softmax(-1), torch.tensor([4, 0, 1]), torch.ones(3, 36, 10))
    heavy, off = DistillSettings(token_weight=5.0), DistillSettings(token_weight=0.0)
    none = distill_loss(micro, images, *rest, heavy, RelabelSettings(mode="none"))
    assert none == distill_loss(micro, images, *rest, off, RelabelSettings())
    assert none != distill_loss(micro, images, *rest, heavy, RelabelSettings())


def test_the_loss_is_least_where_student_and_teacher_agree(micro, images):
    settings, relabel = DistillSettings(token_weight=0.0, ce_weight=0.0, temperature=2.0), RelabelSettings()
    rest = (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 36, 10), settings, relabel)
    own = micro(images).log_softmax(-1)
    assert distill_loss(micro, images, own, *rest).item() == pytest.approx(0, abs=1e-5)
    assert distill_loss(micro, images, own.flip(0), *rest) > 0.01


# Learning.

SHORT = DistillSettings(steps=3, batch_size=4, views=2)


def student():
    return fm.create_vit("vit_micro", 10)


def learn(teacher, synthetic, settings=SHORT, relabel=None, seed=0, **how):
    return distill(student(), teacher, synthetic, settings, relabel or RelabelSettings(), seed, **how)


def divergence(model, teacher, images):
    """Mean KL from the teacher to the model."""
    with torch.no_grad():
        return F.kl_div(model(images).log_softmax(-1), teacher(images).exp(), reduction="batchmean").item()


@pytest.mark.parametrize("views", [0, 3])
def test_distillation_brings_the_student_to_the_teacher(teacher, synthetic, views):
    plain = dict(ce_weight=0.0, calibrate=0.0)  # nothing but the teacher as it is
    settings = DistillSettings(steps=40, batch_size=10, lr=1e-3, views=views, augment=0.2, **plain)
    before = divergence(student().eval(), teacher, synthetic.pixels)
    after = divergence(learn(teacher, synthetic, settings), teacher, synthetic.pixels)
    assert after < 0.6 * before


@pytest.mark.parametrize("mode", ["relabel", "pseudo", "soft", "none"])
@pytest.mark.parametrize("source", ["token_logits", "background_cls"])
@pytest.mark.parametrize("views", [0, 2])
def test_every_way_to_label_tokens_trains(teacher, synthetic, mode, source, views):
    settings = DistillSettings(steps=2, batch_size=4, views=views)
    model = learn(teacher, synthetic, settings, RelabelSettings(mode=mode, source=source))
    fresh = student().state_dict()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(model.head.weight, fresh["head.weight"])


def test_the_token_labels_change_what_is_learnt(teacher, synthetic):
    heads = [
        learn(teacher, synthetic, relabel=RelabelSettings(mode=mode)).head.weight
        for mode in ("relabel", "pseudo", "soft", "none")
    ]
    assert len({h.detach().numpy().tobytes() for h in heads}) == 4


def test_a_seed_fixes_every_byte(teacher, synthetic):
    one, again, other = (learn(teacher, synthetic, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_the_student_is_trained_in_place_and_the_teacher_is_not(teacher, synthetic):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    learner, steps = student(), []
    back = distill(learner, teacher, synthetic, SHORT, RelabelSettings(), 0, progress=steps.append)
    assert back is learner and not back.training and steps == [1, 1, 1]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_stored_views_are_labelled_by_the_teacher_once(teacher, synthetic, monkeypatch):
    def labelled(views, steps):
        seen, real = [], type(teacher).forward_tokens
        monkeypatch.setattr(
            teacher, "forward_tokens", lambda x, *a: seen.append(len(x)) or real(teacher, x, *a)
        )
        learn(teacher, synthetic, DistillSettings(steps=steps, batch_size=5, views=views))
        return sum(seen)

    assert labelled(views=3, steps=2) == labelled(views=3, steps=9) == 3 * len(synthetic)
    assert labelled(views=0, steps=9) == 9 * 5


@pytest.mark.parametrize("views", [0, 2])
def test_every_image_is_learnt_equally_often(teacher, synthetic, monkeypatch, views):
    seen = []

    def record(learner, images, teacher, labels, tokens, *how):
        seen.extend(zip(images, labels.tolist(), strict=True))
        return distill_loss(learner, images, teacher, labels, tokens, *how)

    monkeypatch.setattr(distill_module, "distill_loss", record)
    # two epochs of the ten images, or one of their two views
    learn(
        teacher, synthetic, DistillSettings(steps=4, batch_size=5, views=views, augment=0, background="keep")
    )
    assert sorted(label for _, label in seen) == sorted([*range(10)] * 2)
    assert all(torch.equal(image, synthetic.pixels[label]) for image, label in seen)


# Where the student starts.


def test_from_the_average_the_student_is_one_shot_fedavg_before_the_first_step(uploads, tmp_path):
    start = pipeline.student_start(uploads, Settings(distill=DistillSettings(start="average")))
    (averaged,) = fm.experiment.METHODS["fedavg"](uploads, Settings(), Store(tmp_path)).models
    closed = average_weights(uploads)
    for name, value in start.state_dict().items():
        assert torch.equal(value, averaged.state_dict()[name]) and torch.equal(value, closed[name]), name


def test_from_the_initial_model_the_student_is_what_clients_started_from(uploads):
    settings = Settings(distill=DistillSettings(start="initial"), model=ModelSettings(pretrained=False))
    start = pipeline.student_start(uploads, settings).state_dict()
    assert all(torch.equal(start[name], value) for name, value in student().state_dict().items())


def test_the_global_model_is_distilled_once_and_comes_back_from_the_store(
    uploads, synthetic, tmp_path, monkeypatch
):
    settings = Settings(distill=SHORT, ensemble=EnsembleSettings(mode="size"))
    first = pipeline.global_model(uploads, synthetic, settings, Store(tmp_path)).state_dict()

    def again(*_, **__):
        raise AssertionError("distilled twice")

    monkeypatch.setattr(pipeline, "distill", again)
    back = pipeline.global_model(uploads, synthetic, settings, Store(tmp_path))
    assert not back.training
    assert all(torch.equal(v, first[k]) for k, v in back.state_dict().items())
    with pytest.raises(AssertionError, match="distilled twice"):
        warmer = settings.model_copy(update={"relabel": RelabelSettings(temperature=2.0)})
        pipeline.global_model(uploads, synthetic, warmer, Store(tmp_path))


def test_a_student_that_diverges_is_refused_in_one_line(micro, teacher, synthetic, one_line):
    settings = DistillSettings(steps=3, batch_size=4, lr=1e30, views=1)
    student = copy.deepcopy(micro)
    with pytest.raises(fm.BadInput) as error:
        distill(student, teacher, synthetic, settings, RelabelSettings(), 0)
    one_line(error.value, "distill.lr=1e+30")


# Calibration.


@pytest.fixture(scope="module")
def overlooked(ensemble):
    """Sixty images, more of them labelled 4 than the ensemble would."""
    pixels = torch.randn(60, 1, 24, 24, generator=torch.Generator().manual_seed(2))
    labels = (ensemble(pixels) + 2 * F.one_hot(torch.tensor(4), 10)).argmax(1)
    return fm.SyntheticSet(pixels, labels, masks(60), torch.zeros(60))


@pytest.mark.parametrize("penalty", [0.001, 0.02])
def test_calibration_mends_a_class_that_the_ensemble_overlooks(ensemble, micro, overlooked, penalty):
    settings = DistillSettings(augment=0.0, background="keep", calibrate=penalty)
    heard = calibrated(ensemble, micro, overlooked, settings, seed=0)
    images, labels = overlooked.pixels, overlooked.labels
    wanted = fit_offset(ensemble(images), labels, penalty)  # every view is the image itself
    torch.testing.assert_close(heard.offset, wanted, rtol=1e-3, atol=1e-3)
    assert heard.offset.argmax() == 4
    plain, mended = (e(images).argmax(1) for e in (ensemble, heard))
    assert (plain == 4).sum() < 0.1 * (labels == 4).sum() and (mended == 4).sum() > 0.8 * (labels == 4).sum()
    assert (mended == labels).float().mean() > (plain == labels).float().mean() + 0.3


def test_a_seed_fixes_the_views_that_calibration_sees(ensemble, micro, overlooked):
    settings = DistillSettings(augment=1.0, background="texture", calibrate=0.02)
    one, again, other = (calibrated(ensemble, micro, overlooked, settings, s).offset for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("calibrate", [0.0, 0.1])
def test_the_student_is_taught_by_the_calibrated_ensemble(uploads, synthetic, monkeypatch, calibrate):
    teachers = []

    def spy(ensemble, *args):
        teachers.append(ensemble.offset.clone())
        return soft_token_labels(ensemble, *args)

    monkeypatch.setattr(distill_module, "soft_token_labels", spy)
    settings = DistillSettings(steps=1, batch_size=4, views=1, calibrate=calibrate)
    ensemble = fm.Ensemble(uploads)
    student = fm.create_vit("vit_micro", 10)
    fm.distill(student, ensemble, synthetic, settings, RelabelSettings(), seed=0)
    assert teachers and all(bool(offset.any()) == bool(calibrate) for offset in teachers)
    assert not ensemble.offset.any()


@pytest.mark.parametrize("tokens", [True, False])
def test_a_batch_taken_in_parts_has_the_gradients_of_the_whole(tokens, micro, images, monkeypatch):
    """Seven images, three at a time: the parts weigh what they hold, and no more is held at once."""
    rng = make_rng(0)
    batch = [images.repeat(3, 1, 1, 1)[:7], torch.randn(7, 10, generator=rng).log_softmax(1)]
    batch += [torch.arange(7), torch.rand(7, 36, 10, generator=rng).softmax(-1) if tokens else None]
    settings = DistillSettings(ce_weight=0.5, token_weight=0.3, temperature=2.0)
    relabel = RelabelSettings(mode="relabel" if tokens else "none")
    student = copy.deepcopy(micro).requires_grad_(True)
    distill_loss(student, *batch, settings, relabel).backward()
    wanted = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    seen = []
    monkeypatch.setattr("fedmitr.vision.tokens.PATCHES_IN_TRAINING", 3 * 36)
    real = distill_loss

    def record(student, images, *rest):
        seen.append(len(images))
        return real(student, images, *rest)

    monkeypatch.setattr(distill_module, "distill_loss", record)
    take_gradients(student, tuple(batch), settings, relabel)
    assert seen == [3, 3, 1]
    for parameter, value in zip(student.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-3, atol=1e-6)
