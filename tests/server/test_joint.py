"""joint.py: log A + β r, normalised, against plain numpy; an ensemble in all other things."""

import numpy as np
import pytest
import torch

import fedmitr as fm
from fedmitr.server.distill import distill, fit_offset
from fedmitr.server.joint import EnsembleWithStatistics
from fedmitr.settings.schema import DistillSettings, EnsembleSettings, RelabelSettings
from fedmitr.vision.features import FeatureClassifier

BETA = 3.0
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=["mean_probs", "class"])
def ensemble(request, uploads):
    offset = torch.linspace(-1, 1, 10)
    return fm.Ensemble(uploads, EnsembleSettings(mode=request.param)).calibrated(offset)


@pytest.fixture(scope="module")
def classifier(micro):
    rng = torch.Generator().manual_seed(7)
    weight, bias = torch.randn(10, 192, generator=rng) / 5, torch.randn(10, generator=rng)
    return FeatureClassifier([micro], "both", weight.double(), bias.double())


@pytest.fixture(scope="module")
def joint(ensemble, classifier):
    return EnsembleWithStatistics(ensemble, classifier, BETA)


def normalised(scores):
    """log softmax of scores (B, C), in numpy."""
    scores = scores - scores.max(1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def by_hand(ensemble, classifier, images, keep=None, temperature=1.0):
    log_probs, scores = (part(images, keep).double().numpy() for part in (ensemble, classifier))
    return normalised((log_probs + BETA * scores) / temperature)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("kept", [None, 7])
def test_it_is_the_normalised_sum(kept, temperature, joint, ensemble, classifier, images):
    keep = None if kept is None else torch.stack([torch.arange(kept) + 3 * k for k in range(3)])
    found = joint(images, keep, temperature=temperature)
    np.testing.assert_allclose(
        found, by_hand(ensemble, classifier, images, keep, temperature), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(found.exp().sum(1), torch.ones(3))
    assert not torch.allclose(found, ensemble(images, keep), atol=1e-2)


def test_without_weight_it_is_the_ensemble(ensemble, classifier, images):
    plain = EnsembleWithStatistics(ensemble, classifier, 0.0)
    torch.testing.assert_close(plain(images), ensemble(images), **CLOSE)


def test_with_all_the_weight_it_decides_as_the_classifier(ensemble, classifier, images):
    heavy = EnsembleWithStatistics(ensemble, classifier, 1e6)
    assert heavy(images).argmax(1).tolist() == classifier(images).argmax(1).tolist()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_token_labels_are_those_of_the_ensemble_alone(temperature, joint, ensemble, images):
    cls, tokens = joint.forward_tokens(images, temperature)
    torch.testing.assert_close(cls, joint(images, temperature=temperature))
    torch.testing.assert_close(tokens, ensemble.forward_tokens(images, temperature)[1])


def test_calibrated_it_has_other_offsets_and_the_same_models(joint, ensemble, classifier, images):
    offset = torch.linspace(2, -2, 10)
    found = joint.calibrated(offset)
    torch.testing.assert_close(found.offset, offset)
    assert found.classifier is classifier and found.weight == BETA
    wanted = by_hand(ensemble.calibrated(offset), classifier, images)
    np.testing.assert_allclose(found(images), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(joint.offset, torch.linspace(-1, 1, 10))  # it is left as it was


def test_offsets_fitted_to_it_are_fitted_to_the_sum(joint, images):
    """`calibrated` adds to the ensemble's log-probabilities, which only shifts the sum's."""
    labels, shift = torch.tensor([3, 0, 5]), fit_offset(joint(images), torch.tensor([3, 0, 5]), 0.1)
    found = joint.calibrated(joint.offset + shift)(images)
    torch.testing.assert_close(found, (joint(images) + shift).log_softmax(1), **CLOSE)
    assert found[range(3), labels].sum() > joint(images)[range(3), labels].sum()


def test_drawn_members_are_those_of_the_ensemble_and_the_classifier_stays(uploads, classifier, images):
    members = fm.Ensemble(uploads, EnsembleSettings(mode="class"))
    joint = EnsembleWithStatistics(members, classifier, BETA)
    drawn = joint.drawn(2, torch.Generator().manual_seed(5))
    alone = members.drawn(2, torch.Generator().manual_seed(5))
    assert drawn.classifier is classifier
    np.testing.assert_allclose(drawn(images), by_hand(alone, classifier, images), rtol=1e-4, atol=1e-4)
    kept = joint.drawn(None, torch.Generator())
    assert kept.ensemble is members


def test_what_cannot_be_drawn_is_one_line(uploads, classifier, one_line):
    plain = EnsembleWithStatistics(fm.Ensemble(uploads), classifier, BETA)
    with pytest.raises(fm.BadInput) as error:
        plain.drawn(2, torch.Generator())
    one_line(error.value, "distill.per_class=2")


@pytest.mark.parametrize("source", ["token_logits", "background_cls"])
@pytest.mark.parametrize("calibrate", [0.0, 0.1])
def test_a_student_can_be_distilled_from_it(source, calibrate, joint, synthetic):
    """Whatever the distillation asks of a teacher, it has."""
    how = DistillSettings(steps=2, batch_size=4, views=1, calibrate=calibrate, temperature=2.0)
    vit = fm.create_vit("vit_micro", 10)
    student = distill(vit, joint, synthetic, how, RelabelSettings(source=source), seed=0)
    assert all(p.isfinite().all() for p in student.parameters())
