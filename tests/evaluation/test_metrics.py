"""metrics.py against loops over images, classes and clients."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fedmitr as fm
from fedmitr.data.tasks import Split
from fedmitr.evaluation import metrics
from fedmitr.evaluation.foreground import surviving_patches, token_features
from fedmitr.evaluation.metrics import (
    accuracy,
    accuracy_per_class,
    error_kinds,
    label_skew,
    predict,
    predict_with_members,
    predicted_classes,
    recall,
    share_correct,
)
from fedmitr.server.relabel import background_labels, relabel_tokens
from fedmitr.settings.schema import EnsembleSettings, RelabelSettings
from fedmitr.vision import tokens


class Echo(nn.Module):
    """Returns the logits that are written into its images."""

    def forward(self, images):
        return images.flatten(1)


@pytest.fixture(scope="module")
def logit_split():
    """Nine images whose pixels are logits of four classes; nobody is of class 3."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 1, 1, 4, generator=rng)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    return Split(logits, labels, torch.zeros(9, 1, 1, 1))


def test_accuracy_is_the_share_of_correct_predictions(logit_split):
    hits = [
        int(max(range(4), key=lambda c: x.flatten()[c]) == y)
        for x, y in zip(logit_split.images, logit_split.labels, strict=True)
    ]
    assert 0 < sum(hits) < 9
    assert accuracy(Echo(), logit_split) == pytest.approx(sum(hits) / 9)
    per_class = accuracy_per_class(Echo(), logit_split, 4)
    for c in range(3):
        wanted = np.mean([h for h, y in zip(hits, logit_split.labels, strict=True) if y == c])
        assert per_class[c].item() == pytest.approx(wanted)
    assert per_class[3].isnan()


def test_predictions_do_not_depend_on_the_batch_and_sum_to_one(micro, logit_split):
    images = torch.randn(7, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    wanted = micro(images).softmax(-1)
    for batch_size in (1, 3, 256):
        torch.testing.assert_close(predict(micro, images, batch_size), wanted, rtol=1e-4, atol=1e-5)
    logs = predict(Echo(), logit_split.images.log_softmax(-1))
    torch.testing.assert_close(logs, predict(Echo(), logit_split.images))


@pytest.mark.parametrize("mode", ["mean_probs", "class"])
def test_an_ensemble_and_its_members_predict_at_once_what_they_predict_image_by_image(uploads, images, mode):
    teacher = fm.Ensemble(uploads, EnsembleSettings(mode=mode))
    found = predict_with_members(teacher, images)
    assert found.shape == (4, 3, 10)
    for b in range(3):
        each = [u.vit()(images[b : b + 1])[0] for u in uploads]  # timm's own forward
        together = teacher(images[b : b + 1])[0].exp()
        for row, wanted in zip(found[:, b], [together, *(z.softmax(-1) for z in each)], strict=True):
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], predict(teacher, images))


def test_every_member_runs_on_every_image_once(uploads, images, block_passes):
    predict_with_members(fm.Ensemble(uploads), images)
    assert block_passes == [len(images)] * 3 * 4  # three members of four blocks


def test_predictions_and_shares_are_those_of_each_model(micro, uploads, images):
    models, labels = [micro, uploads[1].vit()], torch.tensor([4, 2, 4])
    found = predicted_classes(models, images)
    wanted = [[int(m(x[None]).argmax()) for x in images] for m in models]
    assert found.tolist() == wanted
    for row, right in zip(wanted, share_correct(found, torch.tensor(wanted[1])), strict=True):
        assert right.item() == np.mean([a == b for a, b in zip(row, wanted[1], strict=True)])
    assert recall(labels, labels, 5).isnan().tolist() == [True, True, False, True, False]


def test_evaluation_reports_its_progress_in_images(micro, monkeypatch):
    """Its bar waits: what is evaluated in a moment shows none."""
    bars = []

    def bar(*given, **named):
        bars.append(SimpleNamespace(given=given, named=named, seen=[]))
        bars[-1].update = bars[-1].seen.append
        return nullcontext(bars[-1])

    monkeypatch.setattr(metrics, "progress", bar)
    predict(micro, torch.zeros(7, 1, 24, 24), batch_size=3)
    (one,) = bars
    assert one.given == (7, "evaluation", "image") and one.named["delay"] >= 1 and one.seen == [3, 3, 1]


def test_nothing_depends_on_how_many_images_run_at_once(uploads, synthetic, block_passes, monkeypatch):
    teacher = fm.Ensemble(uploads, EnsembleSettings(mode="mean_probs"))
    images, model = synthetic.pixels, teacher.members[0]

    def everything():
        block_passes.clear()
        return [
            predict(model, images),
            predict_with_members(teacher, images),
            torch.from_numpy(token_features(model, images)),
            surviving_patches(teacher, images, (0.3, 0.5)),
            background_labels(teacher, synthetic, 2.0),
            relabel_tokens(teacher, synthetic, RelabelSettings()),
        ]

    whole = everything()
    assert max(block_passes) == len(images) == 10
    monkeypatch.setattr(tokens, "PATCHES_AT_ONCE", 3 * 36 + 35)
    for part, wanted in zip(everything(), whole, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-5)
    assert max(block_passes) == 3


def test_label_skew_is_half_the_distance_between_mixes():
    counts = torch.tensor([[10, 0, 0], [0, 5, 15], [4, 2, 6]])
    common = counts.sum(0) / counts.sum()
    for k, found in enumerate(label_skew(counts)):
        brute = sum(abs(counts[k, c] / counts[k].sum() - common[c]) for c in range(3)) / 2
        assert found.item() == pytest.approx(brute.item())
    assert torch.allclose(label_skew(torch.tensor([[2, 4], [1, 2]])), torch.zeros(2))


def test_kinds_of_errors_tell_whether_one_client_has_seen_both_classes():
    counts = torch.tensor([[9, 5, 0, 1], [0, 1, 7, 6]])  # classes 0 and 1 are client 0's, 2 and 3 client 1's
    labels = torch.tensor([0, 0, 1, 2, 2, 3, 3, 3])
    predicted = torch.tensor([0, 1, 2, 2, 3, 3, 0, 1])
    found = error_kinds(predicted, labels, counts)
    assert found == {
        "right": 3 / 8,
        "another class of the same client": 2 / 8,
        "a class of another client": 3 / 8,
    }
