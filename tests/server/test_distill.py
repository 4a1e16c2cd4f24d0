"""distill.py: the loss in closed form, its gradients in parts, and learning."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fedmitr as fm
from fedmitr.core.rng import make_rng
from fedmitr.server import distill as distill_module
from fedmitr.server.distill import add_gradients, distill, distill_loss
from fedmitr.server.ensemble import CombinedModels
from fedmitr.settings.schema import DistillSettings, EnsembleSettings, RelabelSettings
from fedmitr.vision.tokens import forward_tokens

SHORT = DistillSettings(steps=3, batch_size=4, views=2)


@pytest.fixture(scope="module")
def teacher(uploads):
    return fm.Ensemble(uploads, EnsembleSettings(mode="mean_probs"))


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

    cls_logits, token_logits = (z.double().numpy() for z in forward_tokens(micro, images))
    p = softmax(teacher.double().numpy() / heat)
    q = softmax(cls_logits / heat)
    wanted = heat**2 * (p * np.log(p / q)).sum() / 3
    log_p = np.log(softmax(cls_logits))
    wanted += by_ce * -(log_p[0, 4] + log_p[1, 0] + log_p[2, 1]) / 3
    tokens = -(targets.double().numpy() * np.log(softmax(token_logits))).sum(-1)
    wanted += by_tokens * tokens.mean()
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_a_token_head_of_its_own_classifies_the_patch_tokens_alone(micro, images):
    student, rng = copy.deepcopy(micro), make_rng(0)
    student.aux_head = torch.nn.Linear(96, 10).requires_grad_(True)
    student.head.requires_grad_(True)
    targets = torch.randn(3, 36, 10, generator=rng).softmax(-1)
    teacher = torch.randn(3, 10, generator=rng).log_softmax(-1)
    rest = (teacher, torch.tensor([4, 0, 1]), targets)
    losses = [
        distill_loss(student, images, *rest, DistillSettings(token_weight=w, ce_weight=0), RelabelSettings())
        for w in (1.0, 0.0)
    ]
    of_tokens = losses[0] - losses[1]
    tokens = micro.forward_features(images)[:, 1:].double().numpy()  # timm's own
    weight, bias = (p.detach().double().numpy() for p in student.aux_head.parameters())
    wanted = -(targets.double().numpy() * np.log(softmax(tokens @ weight.T + bias))).sum(-1).mean()
    assert of_tokens.item() == pytest.approx(wanted, rel=1e-3)
    of_tokens.backward()
    assert student.aux_head.weight.grad.abs().max() > 1e-4
    assert (
        student.head.weight.grad.abs().max() < 1e-6
    )  # but for rounding, CLS's head learns nothing from them


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


def test_the_token_head_starts_as_a_copy_learns_with_the_student_and_is_dropped(
    teacher, synthetic, monkeypatch
):
    losses, heads = {"shared": [], "own": []}, []
    for head, taken in losses.items():

        def record(learner, *args, taken=taken):
            loss = distill_loss(learner, *args)
            taken.append(loss.item())
            heads.append(getattr(learner, "aux_head", learner.head).weight.detach().clone())
            return loss

        monkeypatch.setattr(distill_module, "distill_loss", record)
        model = learn(teacher, synthetic, relabel=RelabelSettings(head=head))
        assert model.state_dict().keys() == student().state_dict().keys()
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses["shared"][0] == losses["own"][0] and losses["shared"][2] != losses["own"][2]
    steps = len(losses["own"])
    assert torch.equal(heads[steps], student().head.weight) and not torch.equal(heads[-1], heads[steps])


@pytest.mark.parametrize("head", ["shared", "own"])
def test_with_train_head_all_but_the_classifier_stays(teacher, synthetic, head):
    before = student().state_dict()
    settings = DistillSettings(steps=3, batch_size=4, views=2, train="head")
    after = learn(teacher, synthetic, settings, RelabelSettings(head=head)).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"} and after.keys() == before.keys()


def test_a_trained_head_is_that_of_a_linear_layer_on_frozen_features(teacher, synthetic):
    """As SMI's knowledge transfer, T = 20: the same steps on the features that timm computes."""
    heat, steps, rate = 20.0, 12, 0.02
    settings = DistillSettings(
        train="head", temperature=heat, steps=steps, lr=rate, batch_size=10, views=1, ce_weight=0.0,
        calibrate=0.0, augment=0.0, background="keep",
    )  # fmt: skip
    found = learn(teacher, synthetic, settings, RelabelSettings(mode="none"))
    start = student().eval()
    with torch.no_grad():
        features = start.forward_features(synthetic.pixels)[:, 0]  # (10, 96)
        wanted_probs = (teacher(synthetic.pixels) / heat).softmax(-1)
    layer = copy.deepcopy(start.head).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": [layer.weight], "weight_decay": 0.05}, {"params": [layer.bias], "weight_decay": 0.0}]
    )
    for step in range(steps):
        share = (step + 1) if step < 1 else 0.5 * (1 + np.cos(np.pi * (step - 1) / (steps - 1)))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        loss = F.kl_div((layer(features) / heat).log_softmax(-1), wanted_probs, reduction="batchmean")
        optimizer.zero_grad()
        (heat**2 * loss).backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(found.head.weight, layer.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.head.bias, layer.bias, rtol=1e-3, atol=1e-4)
    assert (layer.weight - start.head.weight).abs().max() > 0.05


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
        counts = []

        def count(self, images, *rest):
            counts.append(len(images))
            return real(self, images, *rest)

        monkeypatch.setattr(CombinedModels, "forward_tokens", count)
        learn(teacher, synthetic, DistillSettings(steps=steps, batch_size=5, views=views))
        return sum(counts)

    real = CombinedModels.forward_tokens

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


def test_a_student_that_diverges_is_refused_in_one_line(micro, teacher, synthetic, one_line):
    settings = DistillSettings(steps=3, batch_size=4, lr=1e30, views=1)
    student = copy.deepcopy(micro)
    with pytest.raises(fm.BadInput) as error:
        distill(student, teacher, synthetic, settings, RelabelSettings(), 0)
    one_line(error.value, "distill.lr=1e+30")


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
    add_gradients(student, tuple(batch), settings, relabel)
    assert seen == [3, 3, 1]
    for parameter, value in zip(student.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-3, atol=1e-6)
