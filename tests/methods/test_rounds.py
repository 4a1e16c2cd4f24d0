"""methods/generator.py and rounds.py: images that models can see, and students that learn from them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_upload
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from timm.models.vision_transformer import VisionTransformer
from torch.distributions import Categorical, kl_divergence

import fedmitr as fm
import fedmitr.methods._generator as module
import fedmitr.methods._student as rounds
from fedmitr.core.rng import make_rng
from fedmitr.core.store import Store
from fedmitr.methods import METHODS
from fedmitr.methods._generator import Generator, GeneratorSettings, budget, divergence, learned_batch, noise
from fedmitr.methods._student import Student, portions
from fedmitr.methods.co_boosting import ON
from fedmitr.methods.dense import DenseSettings, generator_loss
from fedmitr.methods.fedavg import average_weights
from fedmitr.methods.fedftg import class_ensemble
from fedmitr.server.ensemble import class_weights
from fedmitr.settings import Settings
from fedmitr.settings.schema import DistillSettings, EnsembleSettings, InversionSettings, ModelSettings

NARROW = dict(width=4, latent=5)
CLOSE = dict(rtol=1e-4, atol=1e-4)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=make_rng(seed)).double()


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(total=st.integers(0, 500), parts=st.integers(1, 40))
def test_portions_are_whole_sum_up_and_differ_by_at_most_one(total, parts):
    found = portions(total, parts)
    assert len(found) == parts and sum(found) == total and max(found) - min(found) <= 1


@pytest.mark.parametrize("heat", [1.0, 3.0])
def test_divergence_is_torchs_and_scipys_kl_from_teacher_to_student(heat):
    teacher, student = randn(4, 6), randn(4, 6, seed=1)
    found = divergence(teacher, student.log_softmax(-1), heat)
    wanted = heat**2 * kl_divergence(Categorical(logits=teacher / heat), Categorical(logits=student / heat))
    torch.testing.assert_close(found, wanted)
    p, q = (softmax(x.numpy() / heat, axis=1) for x in (teacher, student))
    np.testing.assert_allclose(found, heat**2 * rel_entr(p, q).sum(1))
    torch.testing.assert_close(divergence(student, student + 3), torch.zeros(4).double(), atol=1e-12, rtol=0)


def test_the_budget_is_everyones_or_the_methods_own():
    equal = Settings(inversion=InversionSettings(images=6), distill=DistillSettings(steps=3))
    own = DenseSettings(images=11, student_steps=13)
    assert budget(equal, own) == (6, 3)
    assert budget(equal.model_copy(update={"budget": "own"}), own) == (11, 13)


# The generator.


def vit_of(side, channels, patch):
    sizes = dict(img_size=side, patch_size=patch, in_chans=channels)
    vit = VisionTransformer(**sizes, num_classes=10, embed_dim=12, depth=1, num_heads=2)
    vit.pretrained_cfg = {"mean": (0.2, 0.5, 0.7)[:channels], "std": (0.1, 0.25, 0.4)[:channels]}
    return vit


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(
    "side, channels, patch",
    [(24, 1, 4), (32, 3, 4), (8, 1, 4), (4, 1, 4), (36, 1, 4), (25, 2, 5), ((24, 32), 3, 4), ((8, 20), 1, 4)],
    ids=str,
)
def test_generated_images_fit_the_model_and_are_of_possible_brightness(side, channels, patch, conditional):
    vit = vit_of(side, channels, patch)
    maker = Generator(vit, GeneratorSettings(**NARROW), make_rng(0), conditional)
    images = maker(20 * randn(3, 5).float(), torch.tensor([0, 9, 4]) if conditional else None)
    assert images.shape == (3, channels, *(side if isinstance(side, tuple) else (side, side)))
    mean, std = (torch.tensor(vit.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    brightness = images * std + mean
    assert -1e-6 < brightness.min() < 0.4 and 0.6 < brightness.max() < 1 + 1e-6
    assert vit(images).shape == (3, 10)


def test_a_seed_fixes_the_generator_and_torchs_own_random_state_is_left_alone(micro):
    settings, state = GeneratorSettings(**NARROW), torch.get_rng_state()
    one, again, other = (Generator(micro, settings, make_rng(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert unchanged(again, one.state_dict()) and not unchanged(other, one.state_dict())
    rng = make_rng(1)
    first, second = (Generator(micro, settings, rng).start.weight for _ in range(2))
    assert not torch.equal(first, second)


def test_the_class_tells_in_what_a_conditional_generator_makes(micro):
    maker = Generator(micro, GeneratorSettings(**NARROW), make_rng(0), conditional=True).eval()
    z = randn(1, 5).float().expand(2, -1)
    assert torch.allclose(*maker(z, torch.tensor([3, 3])), atol=1e-5)
    assert not torch.allclose(*maker(z, torch.tensor([3, 4])), atol=1e-3)


def test_noise_is_standard_normal():
    z = noise(400, GeneratorSettings(latent=50), make_rng(0))
    assert z.shape == (400, 50) and z.mean().abs() < 0.03 and (z.std() - 1).abs() < 0.03


def test_a_learned_batch_is_the_best_iterate(micro):
    seen, steps, labels = [], [], torch.tensor([1, 2])
    bumps = [5.0, 4.0, 0.0, 4.0, 2.0]  # added to the loss: the third iterate is the best

    def loss_of(images, given):
        assert torch.equal(given, labels)
        seen.append(images.detach().clone())
        return images.square().mean() + 100 * bumps[len(seen) - 1]

    settings = GeneratorSettings(**NARROW, generator_steps=5)
    best = learned_batch(micro, labels, loss_of, settings, make_rng(0), steps.append)
    assert steps == [1] * 5 and len(seen) == 5
    assert torch.equal(best, seen[2]) and not torch.equal(best, seen[4]) and not best.requires_grad


def test_a_learned_batch_fits_generator_and_noise(micro, monkeypatch):
    started, losses = [], []

    def make_adam(parameters, settings):
        started.extend((p, p.detach().clone()) for p in parameters)
        return torch.optim.Adam([p for p, _ in started], settings.lr)

    def loss_of(images, labels):
        losses.append(F.cross_entropy(micro(images), labels))
        return losses[-1]

    monkeypatch.setattr(module, "make_adam", make_adam)
    settings = GeneratorSettings(**NARROW, generator_steps=8, lr=1e-2)
    learned_batch(micro, torch.tensor([1, 2, 7]), loss_of, settings, make_rng(0), lambda step: None)
    assert losses[-1] < losses[0]
    assert (3, 5) in [tuple(p.shape) for p, _ in started]
    assert all(not torch.equal(p, before) for p, before in started)


# The student.


@pytest.fixture(scope="module")
def clients():
    """Two clients with models of 12×12 images."""
    return [make_upload(k, (3, 0, 2, 0, 0, 1, 0, 0, 0, k), side=12) for k in range(2)]


def settings_of(**distill):
    base = dict(steps=6, batch_size=4, views=1, augment=0.0)
    return Settings(distill=DistillSettings(**(base | distill)))


def student_of(clients, steps=6, change=None, **distill):
    return Student(clients, settings_of(**distill), "fdafl", steps, change)


def some(count, seed=3):
    return torch.randn(count, 1, 12, 12, generator=make_rng(seed))


def learn(student, steps, progress=None):
    student.learn(steps, lambda logits, _: student.ensemble.combine(logits), progress)


def test_the_pool_grows_by_every_view_of_what_is_added(clients):
    student = student_of(clients, views=3, augment=0.5)
    for added, size in ((2, 6), (5, 21), (1, 24)):
        student.add(some(added), torch.zeros(added, dtype=torch.int64))
        images, labels, logits = student.pool()
        assert len(images) == len(labels) == len(logits) == size and logits.shape == (size, 2, 10)
    assert len(student.images) == 8 and student.images.mask.all() and len(student.images.mask[0]) == 9


def test_the_pool_holds_each_view_its_label_and_every_clients_logits_of_it(clients):
    student, images, labels = student_of(clients), some(5), torch.tensor([4, 0, 1, 3, 2])
    student.add(images, labels)
    views, of_views, logits = student.pool()
    order = [int((view == images).flatten(1).all(1).nonzero()) for view in views]
    assert sorted(order) == [*range(5)] and torch.equal(of_views, labels[order])
    for k, upload in enumerate(clients):
        torch.testing.assert_close(logits[:, k], upload.vit()(views), **CLOSE)


def test_views_are_changed_before_clients_and_student_see_them(clients):
    def change(ensemble, seen):
        return seen + len(ensemble.members)

    student = student_of(clients, change=change)
    student.add(some(1), torch.tensor([3]))
    views, _, logits = student.pool()
    assert torch.equal(views, some(1) + 2) and torch.equal(student.images.pixels, some(1))
    torch.testing.assert_close(logits[:, 0], clients[0].vit()(views), **CLOSE)


@pytest.mark.parametrize("views", [0, 1])
def test_the_student_learns_from_the_images_of_all_rounds(clients, views):
    student, seen, steps = student_of(clients, views=views), [], []

    def teacher(logits, labels):
        assert logits.shape == (2, len(labels), 10)
        seen.extend(labels.tolist())
        return student.ensemble.combine(logits)

    for label in range(3):
        seen.clear()
        student.add(some(4, seed=label), torch.full((4,), label))
        before = copy_of(student.vit)
        student.learn(label + 1, teacher, steps.append)
        assert sorted(seen) == sorted([*range(label + 1)] * 4)  # batches of four: every image once
        assert not unchanged(student.vit, before)
    assert steps == [1] * 6 and len(student.pool()[0]) == 12


def test_the_learning_rate_follows_one_cycle_over_all_rounds(clients):
    student, rates = student_of(clients, steps=10), []
    student.add(some(2), torch.tensor([0, 1]))
    for share in portions(10, 4):
        rates.append(student.optimizer.param_groups[0]["lr"] / student.settings.lr)
        learn(student, share)
    assert rates == pytest.approx([1, *(0.5 + 0.5 * math.cos(math.pi * (n - 1) / 9) for n in (2, 5, 7))])


def test_the_frozen_student_gets_no_gradient_and_learns_afterwards(clients):
    student, pixels = student_of(clients), some(4).requires_grad_(True)
    rival = student.frozen
    assert rival is student.vit and not rival.training
    generator_loss(student.ensemble, rival, DenseSettings(), pixels, torch.arange(4)).backward()
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None for p in [*rival.parameters(), *student.ensemble.parameters()])
    members, before = copy_of(student.ensemble), copy_of(student.vit)
    student.add(some(4), torch.arange(4))
    learn(student, 1)
    assert all(p.requires_grad and p.grad is not None for p in student.vit.parameters())
    assert not any(torch.equal(p, before[n]) for n, p in student.vit.named_parameters() if p.ndim > 1)
    assert unchanged(student.ensemble, members)


def test_the_student_starts_at_the_average_or_at_the_shared_model(clients):
    average, fresh = average_weights(clients), fm.create_vit("vit_micro", 10, image_size=12)
    assert unchanged(student_of(clients).vit, average)
    initial = settings_of(start="initial").model_copy(update={"model": ModelSettings(pretrained=False)})
    assert unchanged(Student(clients, initial, "fdafl", 1).vit, fresh.state_dict())


def test_with_identical_uploads_every_aggregate_is_one_of_them(clients, tmp_path):
    copies, images = [dataclasses.replace(clients[1], client=k) for k in range(3)], some(3)
    one = clients[1].vit()(images).log_softmax(-1)
    (fedavg,) = METHODS["fedavg"](copies, Settings(), Store(tmp_path)).models
    torch.testing.assert_close(fedavg(images).log_softmax(-1), one, **CLOSE)
    for mode in ("mean_probs", "mean_logits", "size", "class"):
        ensemble = fm.Ensemble(copies, EnsembleSettings(mode=mode))
        torch.testing.assert_close(ensemble(images), one, **CLOSE)
        ensemble.mode = ON  # as Co-Boosting combines them at first
        torch.testing.assert_close(ensemble(images), one, **CLOSE)
    known, labels = class_weights(copies), torch.tensor([0, 5, 8])  # nobody holds an 8
    torch.testing.assert_close(class_ensemble(ensemble.logits(images), labels, known), one, **CLOSE)
    for name, value in student_of(copies).vit.state_dict().items():
        torch.testing.assert_close(value, clients[1].weights[name], rtol=1e-6, atol=1e-7)


def test_a_methods_own_settings_say_whether_its_labels_count(clients):
    """By default the student learns the teacher alone, whatever `distill` says, which is FedMITR's."""
    assert DistillSettings().ce_weight > 0
    for method in ("fdafl", "co_boosting", "fedftg", "a method of your own"):
        student = Student(clients, settings_of(ce_weight=0.7, calibrate=0.5), method, 6)
        assert student.settings.ce_weight == 0 and student.calibrate == 0
    own = settings_of().model_copy(update={"dense": DenseSettings(ce_weight=0.3, calibrate=0.4)})
    student = Student(clients, own, "dense", 6)
    assert student.settings.ce_weight == 0.3 and student.calibrate == 0.4


def test_calibration_fits_what_the_student_is_taught_to_the_labels(clients, monkeypatch):
    own = settings_of(batch_size=8).model_copy(update={"dense": DenseSettings(calibrate=0.01)})
    student, taught = Student(clients, own, "dense", 6), []
    student.add(some(8), torch.full((8,), 3))
    monkeypatch.setattr(rounds, "train_student", lambda vit, batches, *_: taught.extend(batches))
    learn(student, 1)
    ((images, target, labels, _),) = taught
    plain = student.ensemble(images)
    gap = target - plain
    torch.testing.assert_close(gap - gap[:, :1], (gap - gap[:, :1])[:1].expand_as(gap), atol=1e-4, rtol=1e-3)
    assert (target[:, 3] > plain[:, 3]).all() and (labels == 3).all()
    torch.testing.assert_close(target.exp().sum(1), torch.ones(8))
