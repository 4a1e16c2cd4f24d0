"""F-DAFL: its generator's loss by hand, and the features that it excites."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import small

import fedmitr as fm
from fedmitr.core.rng import make_rng
from fedmitr.core.store import Store
from fedmitr.methods import METHODS
from fedmitr.methods.fdafl import FdaflSettings, excite, generator_loss
from fedmitr.settings.schema import EnsembleSettings

MODES = ("mean_probs", "mean_logits", "size", "class")


@pytest.mark.parametrize("one_hot", [1.0, 0.05])
def test_fdafls_generator_loss_by_hand(one_hot):
    p, features = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([[[1.0, -3.0]], [[0.0, 4.0]]])
    found = generator_loss(p.log(), features, FdaflSettings(one_hot=one_hot, activation=0.1, entropy=5.0))
    entropy = -(0.55 * math.log(0.55) + 0.45 * math.log(0.45))
    wanted = -one_hot * (math.log(0.8) + math.log(0.7)) / 2 - 0.1 * (1 + 3 + 0 + 4) / 4 - 5 * entropy
    assert found.item() == pytest.approx(wanted, rel=1e-5)


@given(seed=st.integers(0, 999))
def test_the_entropy_term_is_least_for_balanced_predictions(seed):
    """Predictions are certain here, so that the one-hot term is zero."""
    settings = FdaflSettings(activation=0.0, entropy=1.0)

    def loss(labels):
        return generator_loss(F.one_hot(labels, 4).double().log(), torch.zeros(1), settings).item()

    least = loss(torch.arange(12) % 4)
    assert least == pytest.approx(-math.log(4))
    assert loss(torch.randint(4, (12,), generator=make_rng(seed))) >= least - 1e-9
    assert loss(torch.zeros(12, dtype=torch.int64)) == pytest.approx(0)


def test_a_class_that_the_ensemble_never_predicts_leaves_finite_gradients():
    logits = torch.tensor([[0.0, -200.0], [0.0, -150.0]], requires_grad=True)  # below what exp can hold
    generator_loss(logits.log_softmax(-1), torch.zeros(1), FdaflSettings()).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("mode", MODES)
def test_what_excites_is_the_ensembles_forward_and_the_input_of_its_heads(uploads, images, mode):
    teacher = fm.Ensemble(uploads, EnsembleSettings(mode=mode))
    log_probs, features = excite(teacher, images)
    torch.testing.assert_close(log_probs, teacher(images), rtol=1e-4, atol=1e-5)
    for upload, found in zip(uploads, features.view(3, 3, -1), strict=True):
        vit = upload.vit()
        wanted = vit.forward_head(vit.forward_features(images), pre_logits=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_fdafl_labels_its_images_with_what_the_ensemble_predicts(clients, tmp_path):
    made = METHODS["fdafl"](clients, small(), Store(tmp_path)).synthetic
    with torch.no_grad():
        assert torch.equal(made.labels, fm.Ensemble(clients)(made.pixels).argmax(1))
