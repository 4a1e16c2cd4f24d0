"""metrics.py against loops and the counter of torch."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fedmitr as fm
from fedmitr.data.tasks import Split
from fedmitr.evaluation import metrics
from fedmitr.evaluation.flops import forward_flops, inference_flops
from fedmitr.evaluation.foreground import (
    estimated_foreground,
    foreground_kept,
    surviving_patches,
    token_features,
)
from fedmitr.evaluation.metrics import (
    accuracy,
    accuracy_per_class,
    label_skew,
    predict,
    predict_with_members,
    recall,
    share_correct,
)
from fedmitr.server.relabel import background_labels, relabel_tokens
from fedmitr.settings.schema import EnsembleSettings, RelabelSettings
from fedmitr.vision.patches import patch_share
from fedmitr.vision.tokens import cls_attention, kept_patches, patch_features


class Echo(nn.Module):
    """Answers with the logits that are written into its images."""

    def forward(self, images):
        return images.flatten(1)


@pytest.fixture(scope="module")
def answers():
    """Nine images whose pixels are logits of four classes; nobody is of class 3."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 1, 1, 4, generator=rng)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    return Split(logits, labels, torch.zeros(9, 1, 1, 1))


def test_accuracy_is_the_share_of_right_answers(answers):
    hits = [
        int(max(range(4), key=lambda c: x.flatten()[c]) == y)
        for x, y in zip(answers.images, answers.labels, strict=True)
    ]
    assert 0 < sum(hits) < 9
    assert accuracy(Echo(), answers) == pytest.approx(sum(hits) / 9)
    per_class = accuracy_per_class(Echo(), answers, 4)
    for c in range(3):
        wanted = np.mean([h for h, y in zip(hits, answers.labels, strict=True) if y == c])
        assert per_class[c].item() == pytest.approx(wanted)
    assert per_class[3].isnan()


def test_predictions_do_not_depend_on_the_batch_and_sum_to_one(micro, answers):
    images = torch.randn(7, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    wanted = micro(images).softmax(-1)
    for batch_size in (1, 3, 256):
        torch.testing.assert_close(predict(micro, images, batch_size), wanted, rtol=1e-4, atol=1e-5)
    logs = predict(Echo(), answers.images.log_softmax(-1))
    torch.testing.assert_close(logs, predict(Echo(), answers.images))


@pytest.mark.parametrize("mode", ["mean_probs", "class"])
def test_an_ensemble_and_its_members_answer_at_once_what_they_answer_image_by_image(uploads, images, mode):
    teacher = fm.Ensemble(uploads, EnsembleSettings(mode=mode))
    found = predict_with_members(teacher, images)
    assert found.shape == (4, 3, 10)
    for b in range(3):
        each = [u.vit()(images[b : b + 1])[0] for u in uploads]  # timm's own forward
        together = teacher(images[b : b + 1])[0].exp()
        for row, wanted in zip(found[:, b], [together, *(z.softmax(-1) for z in each)], strict=True):
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], predict(teacher, images))


def test_every_member_sees_every_image_once(uploads, images, block_passes):
    predict_with_members(fm.Ensemble(uploads), images)
    assert block_passes == [len(images)] * 3 * 4  # three members of four blocks


def test_answers_and_shares_are_those_of_each_model(micro, uploads, images):
    models, labels = [micro, uploads[1].vit()], torch.tensor([4, 2, 4])
    found = metrics.answers(models, images)
    wanted = [[int(m(x[None]).argmax()) for x in images] for m in models]
    assert found.tolist() == wanted
    for row, right in zip(wanted, share_correct(found, torch.tensor(wanted[1])), strict=True):
        assert right.item() == np.mean([a == b for a, b in zip(row, wanted[1], strict=True)])
    assert recall(labels, labels, 5).isnan().tolist() == [True, True, False, True, False]


def test_evaluation_tells_how_many_images_it_has_seen(micro, monkeypatch):
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


def test_nothing_depends_on_how_many_images_are_seen_at_once(uploads, synthetic, block_passes, monkeypatch):
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
    monkeypatch.setattr(vit, "PATCHES_AT_ONCE", 3 * 36 + 35)
    for part, wanted in zip(everything(), whole, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-5)
    assert max(block_passes) == 3


def test_surviving_patches_are_found_stop_by_stop(uploads):
    teacher = fm.Ensemble(uploads[:2], EnsembleSettings(mode="mean_probs"))
    images = torch.randn(3, 1, 24, 24, generator=torch.Generator().manual_seed(2))
    found = surviving_patches(teacher, images, (0.3, 0.5))
    for b in range(3):
        live = list(range(36))
        for left in (25, 13):  # 36 · 0.7 and 25 · 0.5, rounded
            keep = torch.tensor([live])
            attention = sum(cls_attention(m, images[b : b + 1], keep)[0] for m in teacher.members)
            live = [live[i] for i in attention.argsort(descending=True)[:left]]
        assert sorted(live) == torch.nonzero(found[b])[:, 0].tolist()
    assert surviving_patches(teacher, images, ()).all()


def test_foreground_kept_by_loops():
    rng = torch.Generator().manual_seed(0)
    foreground = (torch.rand(4, 1, 24, 24, generator=rng) < 0.3).float()
    mask = torch.rand(4, 36, generator=rng) < 0.4
    found = foreground_kept(foreground, mask, 4)
    for b in range(4):
        inside = total = 0
        for y in range(24):
            for x in range(24):
                total += foreground[b, 0, y, x].item()
                inside += foreground[b, 0, y, x].item() * mask[b, y // 4 * 6 + x // 4].item()
        assert found[b].item() == pytest.approx(inside / total)
    assert torch.equal(foreground_kept(foreground, torch.ones(4, 36, dtype=torch.bool), 4), torch.ones(4))


def test_label_skew_is_half_the_distance_between_mixes():
    counts = torch.tensor([[10, 0, 0], [0, 5, 15], [4, 2, 6]])
    common = counts.sum(0) / counts.sum()
    for k, found in enumerate(label_skew(counts)):
        brute = sum(abs(counts[k, c] / counts[k].sum() - common[c]) for c in range(3)) / 2
        assert found.item() == pytest.approx(brute.item())
    assert torch.allclose(label_skew(torch.tensor([[2, 4], [1, 2]])), torch.zeros(2))


@pytest.mark.parametrize("name, kept", [("vit_micro", 36), ("vit_micro", 9), ("test_vit", 40)])
def test_flops_are_those_that_torch_counts(name, kept):
    vit = fm.create_vit(name).eval()
    images = torch.zeros(1, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        seen = kept_patches(vit, images, torch.arange(kept)[None])
        patch_features(vit, *seen, rows=vit.num_prefix_tokens)
    assert forward_flops(vit, kept) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["vit_micro", "test_vit"])
def test_inference_is_the_forward_pass_and_the_classifier(name):
    vit = fm.create_vit(name, 7).eval()
    image = torch.zeros(1, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)
    forward = forward_flops(vit, vit.patch_embed.num_patches)
    assert inference_flops(vit, image) == forward + 2 * vit.embed_dim * 7


@pytest.mark.parametrize("mode", ["mean_probs", "class"])
def test_inference_of_an_ensemble_costs_every_members(uploads, micro, images, mode):
    teacher = fm.Ensemble(uploads, EnsembleSettings(mode=mode))
    assert inference_flops(teacher, images[:1]) == 3 * inference_flops(micro, images[:1])


def test_token_features_are_timms_output_tokens(micro, images):
    found = token_features(micro, images)
    torch.testing.assert_close(
        torch.from_numpy(found), micro.forward_features(images)[:, 1:], rtol=1e-4, atol=1e-4
    )


def test_the_estimated_foreground_is_found_where_it_truly_is(micro, task):
    """On real scenes taken for synthetic ones, whose foreground is known."""
    real, other = task.train.subset(torch.arange(100)), task.test.subset(torch.arange(60))
    covered = patch_share(other.foreground, 4)

    def estimate(mask):
        made = fm.SyntheticSet(other.images, other.labels, mask, torch.zeros(60))
        share, chance = estimated_foreground(micro, real, made)
        assert share.shape == (60,) and chance == pytest.approx(mask.double().mean().item())
        return share.mean().item() / chance

    most = torch.zeros(60, 36, dtype=torch.bool).scatter(1, covered.topk(9, dim=1).indices, True)
    anywhere = torch.rand(60, 36, generator=torch.Generator().manual_seed(0)).argsort(1) < 9
    assert estimate(most) > 1.8 and 0.85 < estimate(anywhere) < 1.15 and estimate(~most) < 0.8
