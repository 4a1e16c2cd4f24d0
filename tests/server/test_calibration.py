"""Class offsets: their fit against scipy, the calibrated ensemble, and the student that it teaches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import log_softmax

import fedmitr as fm
from fedmitr.server import distill as distill_module
from fedmitr.server.distill import calibrated, fit_offset
from fedmitr.server.relabel import soft_token_labels
from fedmitr.settings.schema import DistillSettings, RelabelSettings


@pytest.mark.parametrize("penalty", [0.01, 0.3])
def test_offsets_are_scipys_minimum(penalty):
    rng = np.random.default_rng(0)
    z, y = 2 * rng.normal(size=(60, 5)), rng.integers(0, 5, 60)
    z[:, 2] += 3  # a class whose logits are too high

    def loss(o):
        return -log_softmax(z + o, axis=1)[np.arange(60), y].mean() + penalty * (o**2).sum()

    found = fit_offset(torch.tensor(z, dtype=torch.float32), torch.tensor(y), penalty)
    assert found.dtype == torch.float32 and found.argmin() == 2
    np.testing.assert_allclose(found, minimize(loss, np.zeros(5), tol=1e-10).x, atol=1e-3)


def test_a_calibrated_ensemble_adds_its_offset_and_leaves_the_other_as_it_was(ensemble, images):
    before, token_log_probs = ensemble(images), ensemble.forward_tokens(images)[1]
    offset = torch.linspace(-2, 2, 10)
    other = ensemble.calibrated(offset)
    for heat in (1.0, 2.0):
        wanted = ((ensemble(images) + offset) / heat).log_softmax(-1)
        torch.testing.assert_close(other(images, temperature=heat), wanted)
        cls_log_probs, of_tokens = other.forward_tokens(images, heat)
        torch.testing.assert_close(cls_log_probs, wanted)
        # the offset was fitted to CLS: tokens are labelled as before
        torch.testing.assert_close(of_tokens, (token_log_probs / heat).log_softmax(-1))
    assert torch.equal(ensemble(images), before) and not ensemble.offset.any()
    assert all(a is b for a, b in zip(other.members, ensemble.members, strict=True))  # shared, not copied


@pytest.fixture(scope="module")
def overlooked(ensemble):
    """Sixty images, more of them labelled 4 than the ensemble would."""
    pixels = torch.randn(60, 1, 24, 24, generator=torch.Generator().manual_seed(2))
    labels = (ensemble(pixels) + 2 * F.one_hot(torch.tensor(4), 10)).argmax(1)
    mask = torch.rand(60, 36, generator=torch.Generator().manual_seed(0)) < 0.4
    return fm.SyntheticSet(pixels, labels, mask, torch.zeros(60))


@pytest.mark.parametrize("penalty", [0.001, 0.02])
def test_calibration_mends_a_class_that_the_ensemble_overlooks(ensemble, micro, overlooked, penalty):
    settings = DistillSettings(augment=0.0, background="keep", calibrate=penalty)
    mended = calibrated(ensemble, micro, overlooked, settings, seed=0)
    images, labels = overlooked.pixels, overlooked.labels
    wanted = fit_offset(ensemble(images), labels, penalty)  # every view is the image itself
    torch.testing.assert_close(mended.offset, wanted, rtol=1e-3, atol=1e-3)
    assert mended.offset.argmax() == 4
    before, after = (e(images).argmax(1) for e in (ensemble, mended))
    assert (before == 4).sum() < 0.1 * (labels == 4).sum() and (after == 4).sum() > 0.8 * (labels == 4).sum()
    assert (after == labels).float().mean() > (before == labels).float().mean() + 0.3


def test_a_seed_fixes_the_views_that_calibration_is_fitted_to(ensemble, micro, overlooked):
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
