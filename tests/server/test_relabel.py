"""relabel.py: token targets by loops, and the labels of the background."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fedmitr as fm
from fedmitr.server.relabel import background_labels, relabel_tokens, tempered, token_targets
from fedmitr.settings.schema import EnsembleSettings, RelabelSettings
from fedmitr.vision.tokens import forward_tokens

MODES = ("relabel", "pseudo", "soft")
SOURCES = ("token_logits", "background_cls")


@pytest.fixture(scope="module")
def teacher(uploads):
    return fm.Ensemble(uploads, EnsembleSettings(mode="mean_probs"))


@pytest.fixture(scope="module")
def made_up():
    """Labels (4,), mask (4, 5) and soft labels (4, 5, 6)."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.tensor([2, 2, 0, 5])
    mask = torch.rand(4, 5, generator=rng) < 0.5
    return labels, mask, torch.randn(4, 5, 6, generator=rng).softmax(-1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mixed", [0.0, 0.3, 1.0])
def test_token_targets_by_loops(made_up, mode, mixed):
    labels, mask, soft = made_up
    found = token_targets(labels, mask, soft, RelabelSettings(mode=mode, foreground_soft=mixed))
    for b in range(4):
        for i in range(5):
            hard = mode == "pseudo" or (mode == "relabel" and mask[b, i])
            wanted = soft[b, i].clone()
            if hard:
                wanted = mixed * soft[b, i]
                wanted[labels[b]] += 1 - mixed
            torch.testing.assert_close(found[b, i], wanted)


def test_token_targets_leave_their_arguments_alone(made_up):
    before = [t.clone() for t in made_up]
    token_targets(*made_up, RelabelSettings(foreground_soft=0.5))
    assert all(torch.equal(a, b) for a, b in zip(made_up, before, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", SOURCES)
def test_targets_of_a_set_are_distributions_that_carry_the_label_where_the_patch_survived(
    teacher, synthetic, mode, source
):
    settings = RelabelSettings(mode=mode, source=source, temperature=2.0, foreground_soft=0.0)
    targets = relabel_tokens(teacher, synthetic, settings)
    assert targets.shape == (10, 36, 10) and (targets >= 0).all()
    torch.testing.assert_close(targets.sum(-1), torch.ones(10, 36))
    hard = targets.max(-1).values == 1
    carries = {"relabel": synthetic.mask, "pseudo": torch.ones(10, 36, dtype=torch.bool)}.get(mode)
    if carries is not None:
        assert hard[carries].all()
        right = targets.argmax(-1) == synthetic.labels[:, None]
        assert right[carries].all()
    else:
        assert not hard.any()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_labels_are_the_teachers_token_probabilities_at_a_temperature(
    teacher, uploads, synthetic, temperature
):
    targets = relabel_tokens(teacher, synthetic, RelabelSettings(temperature=temperature))
    each = [forward_tokens(u.vit(), synthetic.pixels)[1].softmax(-1).double().numpy() for u in uploads]
    probs = np.mean(each, axis=0) ** (1 / temperature)
    wanted = probs / probs.sum(-1, keepdims=True)
    stopped = ~synthetic.mask.numpy()
    np.testing.assert_allclose(targets.numpy()[stopped], wanted[stopped], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_background_labels_are_the_ensemble_on_the_stopped_patches_alone(teacher, synthetic, temperature):
    found = background_labels(teacher, synthetic, temperature)
    for b in range(len(synthetic)):
        stopped = torch.nonzero(~synthetic.mask[b])[:, 0][None]
        wanted = teacher(synthetic.pixels[b : b + 1], stopped, temperature).exp()[0]
        torch.testing.assert_close(found[b], wanted, rtol=1e-4, atol=1e-5)


def test_background_cls_gives_every_stopped_patch_of_an_image_the_same_label(teacher, synthetic):
    targets = relabel_tokens(teacher, synthetic, RelabelSettings(source="background_cls"))
    of_background = background_labels(teacher, synthetic, 1.0)
    for b in range(len(synthetic)):
        stopped = targets[b][~synthetic.mask[b]]
        torch.testing.assert_close(stopped, of_background[b].expand_as(stopped))


def test_dense_sets_have_no_background_and_only_pseudo_labels(teacher, synthetic):
    dense = fm.SyntheticSet(
        synthetic.pixels, synthetic.labels, torch.ones(10, 36, dtype=torch.bool), synthetic.loss
    )
    torch.testing.assert_close(background_labels(teacher, dense, 1.0), teacher(dense.pixels).exp())
    targets = relabel_tokens(teacher, dense, RelabelSettings(foreground_soft=0.0))
    assert torch.equal(targets, F.one_hot(dense.labels, 10)[:, None].expand(-1, 36, -1).float())


def test_temperature_flattens_and_one_changes_nothing():
    probs = torch.tensor([[0.7, 0.2, 0.1]])
    torch.testing.assert_close(tempered(probs.log(), 1.0), probs)
    root = probs.sqrt() / probs.sqrt().sum()
    torch.testing.assert_close(tempered(probs.log(), 2.0), root)
