"""methods/: what each paper's formula says, against loops, closed forms and cases by hand."""

import dataclasses
import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import loud
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from timm.models.vision_transformer import VisionTransformer
from torch.distributions import Categorical, kl_divergence

import fedmitr as fm
from fedmitr.ensemble import class_weights
from fedmitr.methods import METHODS
from fedmitr.methods.co_boosting import hard_loss, perturb, reweigh, weight_step
from fedmitr.methods.fdafl import excite
from fedmitr.methods.fedftg import class_ensemble, likeness, sample_labels
from fedmitr.methods.generator import Generator, divergence, learned_batch, noise
from fedmitr.methods.rounds import Student, budget, portions
from fedmitr.runtime import generator
from fedmitr.settings import (
    CoBoostingSettings,
    DenseSettings,
    DistillSettings,
    EnsembleSettings,
    FadiSettings,
    FdaflSettings,
    FedftgSettings,
    GeneratorSettings,
    InversionSettings,
    Settings,
)
from fedmitr.store import Store
from fedmitr.upload import average_weights

MODES = ("mean_probs", "mean_logits", "size", "class")
NARROW = dict(width=4, latent=5)
BLOCKS = {
    "fdafl": FdaflSettings,
    "dense": DenseSettings,
    "co_boosting": CoBoostingSettings,
    "fedftg": FedftgSettings,
}
WITH_GENERATOR = tuple(BLOCKS)


def module_of(method):
    """The package's own name for it is the function."""
    return importlib.import_module(f"fedmitr.methods.{method}")


def small(method="dense", images=6, steps=3, **own):
    """A run of two rounds: six images, three student steps."""
    own = {"rounds": 2, "generator_steps": 2, **NARROW, **own}
    return Settings(
        inversion=InversionSettings(images=images, batch_size=3, iterations=2, stop_at=(), stop_ratio=()),
        distill=DistillSettings(steps=steps, batch_size=4, views=1, augment=0.0),
        **{method: BLOCKS[method](**own)},
    )


def recorded(monkeypatch, module, name):
    """Every result of a module's function, in order."""
    made, real = [], getattr(module, name)

    def record(*args, **how):
        made.append(real(*args, **how))
        return made[-1]

    monkeypatch.setattr(module, name, record)
    return made


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed)).double()


# What several share.


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
    equal, own = small(images=6, steps=3), DenseSettings(images=11, student_steps=13)
    assert budget(equal, own) == (6, 3)
    assert budget(equal.model_copy(update={"budget": "own"}), own) == (11, 13)


# The generator.


def vit_of(side, channels=1, patch=4):
    vit = VisionTransformer(
        img_size=side, patch_size=patch, in_chans=channels, num_classes=10, embed_dim=12, depth=1, num_heads=2
    )
    means, stds = [0.2, 0.5, 0.7], [0.1, 0.25, 0.4]
    vit.pretrained_cfg = {"mean": means[:channels], "std": stds[:channels]}
    return vit


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(
    "side, channels, patch",
    [(24, 1, 4), (32, 3, 4), (8, 1, 4), (4, 1, 4), (36, 1, 4), (25, 2, 5), ((24, 32), 3, 4), ((8, 20), 1, 4)],
    ids=str,
)
def test_generated_images_fit_the_model_and_are_of_possible_brightness(side, channels, patch, conditional):
    vit = vit_of(side, channels, patch)
    maker = Generator(vit, GeneratorSettings(**NARROW), generator(0), conditional)
    images = maker(20 * randn(3, 5).float(), torch.tensor([0, 9, 4]) if conditional else None)
    assert images.shape == (3, channels, *(side if isinstance(side, tuple) else (side, side)))
    mean, std = (torch.tensor(vit.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    brightness = images * std + mean
    assert -1e-6 < brightness.min() < 0.4 and 0.6 < brightness.max() < 1 + 1e-6
    assert vit(images).shape == (3, 10)


def test_a_seed_fixes_the_generator_and_torchs_own_random_state_is_left_alone(micro):
    settings, state = GeneratorSettings(**NARROW), torch.get_rng_state()
    one, again, other = (Generator(micro, settings, generator(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert unchanged(again, one.state_dict()) and not unchanged(other, one.state_dict())
    rng = generator(1)
    first, second = (Generator(micro, settings, rng).start.weight for _ in range(2))
    assert not torch.equal(first, second)


def test_the_class_tells_in_what_a_conditional_generator_makes(micro):
    maker = Generator(micro, GeneratorSettings(**NARROW), generator(0), conditional=True).eval()
    z = randn(1, 5).float().expand(2, -1)
    assert torch.allclose(*maker(z, torch.tensor([3, 3])), atol=1e-5)
    assert not torch.allclose(*maker(z, torch.tensor([3, 4])), atol=1e-3)


def test_noise_is_standard_normal():
    z = noise(400, GeneratorSettings(latent=50), generator(0))
    assert z.shape == (400, 50) and z.mean().abs() < 0.03 and (z.std() - 1).abs() < 0.03


def test_a_learned_batch_is_the_best_iterate(micro):
    seen, steps, labels = [], [], torch.tensor([1, 2])
    bumps = [5.0, 4.0, 0.0, 4.0, 2.0]  # added to the loss: the third iterate is the best

    def loss_of(images, given):
        assert torch.equal(given, labels)
        seen.append(images.detach().clone())
        return images.square().mean() + 100 * bumps[len(seen) - 1]

    settings = GeneratorSettings(**NARROW, generator_steps=5)
    best = learned_batch(micro, labels, loss_of, settings, generator(0), steps.append)
    assert steps == [1] * 5 and len(seen) == 5
    assert torch.equal(best, seen[2]) and not torch.equal(best, seen[4]) and not best.requires_grad


def test_a_learned_batch_fits_generator_and_noise(micro, monkeypatch):
    shared, started = module_of("generator"), []

    def make_adam(parameters, settings):
        started.extend((p, p.detach().clone()) for p in parameters)
        return torch.optim.Adam([p for p, _ in started], settings.lr)

    monkeypatch.setattr(shared, "make_adam", make_adam)
    losses = []

    def loss_of(images, labels):
        losses.append(F.cross_entropy(micro(images), labels))
        return losses[-1]

    settings = GeneratorSettings(**NARROW, generator_steps=8, lr=1e-2)
    learned_batch(micro, torch.tensor([1, 2, 7]), loss_of, settings, generator(0), lambda step: None)
    assert losses[-1] < losses[0]
    assert (3, 5) in [tuple(p.shape) for p, _ in started]
    assert all(not torch.equal(p, before) for p, before in started)


# The student and its rounds.


@pytest.fixture
def student(uploads):
    return Student(uploads[:2], small(), "dense", steps=4)


def some(count, seed=3):
    return torch.randn(count, 1, 24, 24, generator=generator(seed))


def test_the_pool_grows_by_every_view_of_what_is_added(uploads):
    settings = small()
    settings = settings.model_copy(update={"distill": settings.distill.model_copy(update={"views": 3})})
    student = Student(uploads[:2], settings, "dense", steps=4)
    for added, size in ((2, 6), (5, 21), (1, 24)):
        student.add(some(added), torch.zeros(added, dtype=torch.int64))
        images, labels, logits = student.pool()
        assert len(images) == len(labels) == len(logits) == size and logits.shape == (size, 2, 10)
    assert len(student.images) == 8 and student.images.mask.all()


def test_the_pool_holds_each_view_its_label_and_every_clients_logits_of_it(student, uploads):
    images, labels = some(5), torch.tensor([4, 0, 1, 3, 2])
    student.add(images, labels)
    views, of_views, logits = student.pool()
    order = [int((views[i] == images).flatten(1).all(1).nonzero()) for i in range(5)]
    assert sorted(order) == [*range(5)] and torch.equal(of_views, labels[order])
    for k, upload in enumerate(uploads[:2]):
        torch.testing.assert_close(logits[:, k], upload.vit()(views), rtol=1e-4, atol=1e-4)


def test_views_are_changed_before_clients_and_student_see_them(uploads):
    student = Student(uploads[:2], small(), "dense", steps=4, change=lambda seen: seen + 2)
    student.add(some(1), torch.tensor([3]))
    views, _, logits = student.pool()
    assert torch.equal(views, some(1) + 2) and torch.equal(student.images.pixels, some(1))
    torch.testing.assert_close(logits[:, 0], uploads[0].vit()(views), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("views", [0, 1])
def test_the_student_learns_from_the_images_of_all_rounds(uploads, views):
    settings = small()
    settings = settings.model_copy(update={"distill": settings.distill.model_copy(update={"views": views})})
    student, seen, steps = Student(uploads[:2], settings, "dense", steps=6), [], []

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


def test_the_learning_rate_follows_one_cycle_over_all_rounds(uploads):
    settings = small(steps=10)
    student = Student(uploads[:2], settings, "dense", steps=10)
    student.add(some(2), torch.tensor([0, 1]))
    rates = []
    for share in portions(10, 4):
        rates.append(student.optimizer.param_groups[0]["lr"] / settings.distill.lr)
        student.learn(share, lambda logits, _: student.ensemble.combine(logits))
    done = (0, 2, 5, 7)
    assert rates == pytest.approx([1, *(0.5 + 0.5 * math.cos(math.pi * (n - 1) / 9) for n in done[1:])])


def test_the_frozen_student_gets_no_gradient_and_learns_afterwards(student):
    rival = student.frozen
    assert rival is student.vit and not rival.training
    pixels = some(4).requires_grad_(True)
    loss = module_of("dense").generator_loss(
        student.ensemble, rival, DenseSettings(), pixels, torch.tensor([0, 1, 2, 3])
    )
    loss.backward()
    assert pixels.grad.abs().sum() > 0
    assert all(p.grad is None for p in [*rival.parameters(), *student.ensemble.parameters()])
    student.add(some(4), torch.arange(4))
    before = copy_of(student.vit)
    student.learn(1, lambda logits, _: student.ensemble.combine(logits))
    assert all(p.requires_grad and p.grad is not None for p in student.vit.parameters())
    assert not any(torch.equal(p, before[n]) for n, p in student.vit.named_parameters() if p.ndim > 1)


def spy_on_students(monkeypatch, method):
    """All students that a method makes."""
    made = []

    class Spy(Student):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            self.before = copy_of(self.ensemble), copy_of(self.vit)
            made.append(self)

    monkeypatch.setattr(module_of(method), "Student", Spy)
    return made


def test_methods_leave_the_clients_models_and_the_uploads_alone(uploads, tmp_path, monkeypatch):
    digests = [u.digest for u in uploads]
    for method in (*WITH_GENERATOR, "fadi"):
        made = spy_on_students(monkeypatch, method)
        settings = small(method) if method in BLOCKS else small()
        outcome = METHODS[method](uploads, settings, Store(tmp_path))
        (student,) = made
        members, start = student.before
        assert all(
            torch.equal(value, members[name])
            for name, value in student.ensemble.state_dict().items()
            if method != "co_boosting" or name != "weights"
        )
        assert outcome.models == [student.vit] and not unchanged(student.vit, start)
        assert len(outcome.synthetic) == 6 and outcome.student_steps == 3
    assert [u.digest for u in uploads] == digests


def test_the_student_starts_at_the_average_or_at_the_shared_model(uploads):
    settings, average = small(), average_weights(uploads)
    student = Student(uploads, settings, "dense", steps=1)
    assert all(torch.equal(value, average[name]) for name, value in student.vit.state_dict().items())
    distill = settings.distill.model_copy(update={"start": "initial"})
    settings = settings.model_copy(
        update={"distill": distill, "model": settings.model.model_copy(update={"pretrained": False})}
    )
    fresh = fm.create_vit("vit_micro", 10)
    assert unchanged(Student(uploads, settings, "dense", steps=1).vit, fresh.state_dict())


def test_with_identical_uploads_every_aggregate_is_one_of_them(uploads, images, tmp_path):
    copies = [dataclasses.replace(uploads[2], client=k) for k in range(3)]
    one, settings = uploads[2].vit()(images).log_softmax(-1), small()
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        METHODS["fedavg"](copies, settings, Store(tmp_path)).models[0](images).log_softmax(-1), one, **close
    )
    for mode in MODES:
        ensemble = fm.Ensemble(copies, EnsembleSettings(mode=mode))
        torch.testing.assert_close(ensemble(images), one, **close)
        ensemble.mode = module_of("co_boosting").ON
        torch.testing.assert_close(ensemble(images), one, **close)
    known, labels = class_weights(copies), torch.tensor([0, 5, 9])  # nobody holds a 9
    torch.testing.assert_close(class_ensemble(ensemble.logits(images), labels, known), one, **close)
    student = Student(copies, settings, "dense", steps=1)
    for name, value in student.vit.state_dict().items():
        torch.testing.assert_close(value, uploads[2].weights[name], rtol=1e-6, atol=1e-7)


# Whole runs of the methods with a generator.


@pytest.mark.parametrize("method", WITH_GENERATOR)
def test_dense_and_co_boosting_start_a_generator_every_round_the_others_keep_theirs(
    method, uploads, tmp_path, monkeypatch
):
    anew = method in ("dense", "co_boosting")
    where = module_of("generator" if anew else method)
    made = recorded(monkeypatch, where, "Generator")
    METHODS[method](uploads[:2], small(method, rounds=3), Store(tmp_path))
    assert len(made) == (3 if anew else 1)
    starts = {m.start.weight.detach().numpy().tobytes() for m in made}
    assert len(starts) == len(made)
    assert all((m.classes == 10) == (method == "fedftg") for m in made)


@pytest.mark.parametrize("method", WITH_GENERATOR)
def test_rounds_share_images_and_steps(method, uploads, tmp_path, monkeypatch):
    rounds, learn = [], Student.learn

    def record(self, steps, teacher, progress=None):
        rounds.append((len(self.pool()[0]), steps))
        learn(self, steps, teacher, progress)

    monkeypatch.setattr(Student, "learn", record)
    settings = small(method, images=7, steps=5, rounds=3)
    outcome = METHODS[method](uploads[:2], settings, Store(tmp_path))
    sizes, steps = zip(*rounds, strict=True)
    assert sizes == (2, 4, 7) and steps == (1, 2, 2) and len(outcome.synthetic) == 7
    rounds.clear()  # fewer images than rounds: a round each
    METHODS[method](uploads[:2], small(method, images=2, steps=5, rounds=3), Store(tmp_path))
    assert rounds == [(1, 2), (2, 3)]


@pytest.mark.parametrize("method", WITH_GENERATOR)
def test_the_generators_loss_falls(method, uploads, tmp_path, monkeypatch):
    losses = recorded(monkeypatch, module_of(method), "generator_loss")
    options = dict(rounds=1, generator_steps=14, lr=1e-2, width=8)
    options |= dict(batch_size=8) if method in ("fdafl", "fedftg") else {}
    METHODS[method](uploads[:2], small(method, steps=1, **options), Store(tmp_path))
    values = torch.stack(losses).detach()
    assert len(values) == 14 and values[-4:].mean() < values[:4].mean() - 0.1


@pytest.mark.parametrize("method", ["dense", "co_boosting"])
def test_classes_are_asked_for_equally_often(method, uploads, tmp_path):
    made = METHODS[method](uploads[:2], small(method, images=20), Store(tmp_path)).synthetic
    assert torch.bincount(made.labels).tolist() == [2] * 10


@pytest.mark.parametrize("method", [*WITH_GENERATOR, "fadi"])
def test_without_stored_views_a_run_works(method, uploads, tmp_path):
    settings = small(method) if method in BLOCKS else small()
    settings = settings.model_copy(
        update={"distill": settings.distill.model_copy(update={"views": 0, "augment": 0.5})}
    )
    outcome = METHODS[method](uploads[:2], settings, Store(tmp_path))
    assert (
        all(torch.isfinite(p).all() for p in outcome.models[0].parameters()) and len(outcome.synthetic) == 6
    )


# FedFTG.


def of_counts(*counts):
    return [SimpleNamespace(client=k, class_counts=c) for k, c in enumerate(counts)]


def test_fedftg_weighs_a_client_by_its_share_of_the_class():
    found = class_weights(of_counts((3, 0, 1, 0), (1, 2, 3, 0)))
    wanted = [[0.75, 0, 0.25, 0.5], [0.25, 1, 0.75, 0.5]]  # nobody has the last class: all alike
    assert found.tolist() == wanted


def test_fedftgs_teacher_of_an_image_made_for_y_by_hand():
    p = torch.tensor([[[0.5, 0.25, 0.25]] * 3, [[0.2, 0.2, 0.6]] * 3])
    known = class_weights(of_counts((3, 0, 1), (1, 2, 3)))
    found = class_ensemble(p.log() + 7, torch.tensor([0, 1, 2]), known).exp()
    wanted = [[0.425, 0.2375, 0.3375], [0.2, 0.2, 0.6], [0.275, 0.2125, 0.5125]]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_fedftgs_generator_loss_against_a_loop_over_clients_and_samples():
    counts, labels = [(3, 0, 1, 2), (1, 4, 0, 0), (0, 4, 9, 2)], [0, 3, 1, 1, 2]
    logits, of_student = randn(3, 5, 4), randn(5, 4, seed=1)
    p, q = softmax(logits.numpy(), axis=-1), softmax(of_student.numpy(), axis=-1)
    apart = wrong = 0.0
    for b, y in enumerate(labels):
        for k in range(3):
            share = counts[k][y] / sum(c[y] for c in counts)
            apart += share * sum(p[k, b, c] * math.log(p[k, b, c] / q[b, c]) for c in range(4)) / 5
            wrong -= share * math.log(p[k, b, y]) / 5
    known = class_weights(of_counts(*counts)).double()
    for weight in (0.0, 0.7):
        settings = FedftgSettings(classification=weight)
        found = module_of("fedftg").generator_loss(logits, of_student, torch.tensor(labels), known, settings)
        assert found.item() == pytest.approx(weight * wrong - apart)


def test_likeness_against_loops():
    z, images = randn(5, 3), randn(5, 2, 3, 4, seed=1)
    total = 0.0
    for i in range(5):
        for j in range(5):
            of_noise = ((z[i] - z[j]) ** 2).sum().item() / 3
            total += of_noise * (images[i] - images[j]).abs().sum().item() / 24
    assert likeness(z, images).item() == pytest.approx(math.exp(-total / 25))


def test_likeness_is_one_for_equal_images_and_less_the_more_they_differ():
    z, images = randn(5, 3), randn(5, 1, 2, 2, seed=1)
    found = [likeness(z, scale * images).item() for scale in (0, 0.5, 1, 2)]
    assert found[0] == 1 and found == sorted(found, reverse=True) and len(set(found)) == 4


@given(st.lists(st.integers(0, 9), min_size=2, max_size=10).filter(any), st.integers(0, 99))
def test_a_class_that_nobody_holds_is_never_drawn(totals, seed):
    drawn = sample_labels(torch.tensor(totals, dtype=torch.float32), 50, generator(seed))
    assert len(drawn) == 50 and all(totals[y] > 0 for y in drawn.tolist())


def test_labels_are_drawn_in_proportion_to_what_all_hold():
    drawn = sample_labels(torch.tensor([6.0, 0, 1, 3]), 4000, generator(0))
    share = torch.bincount(drawn, minlength=4) / 4000
    assert (share - torch.tensor([0.6, 0, 0.1, 0.3])).abs().max() < 0.03


def test_fedftgs_generator_drives_student_and_clients_apart(uploads, tmp_path, monkeypatch):
    losses = recorded(monkeypatch, module_of("fedftg"), "generator_loss")
    settings = small(
        "fedftg", rounds=1, generator_steps=14, lr=1e-2, width=8, batch_size=8, classification=0, diversity=0
    )
    METHODS["fedftg"](uploads, settings, Store(tmp_path))
    apart = -torch.stack(losses).detach()  # what is left is the discrepancy
    assert (apart > 0).all() and apart[-4:].mean() > 1.1 * apart[:4].mean()


def test_fedftgs_student_learns_the_class_wise_teacher(uploads, tmp_path, monkeypatch):
    teachers = []
    monkeypatch.setattr(Student, "learn", lambda self, steps, teacher, bar: teachers.append(teacher))
    METHODS["fedftg"](uploads, small("fedftg"), Store(tmp_path))
    logits, labels = randn(3, 4, 10), [0, 1, 5, 9]
    found = teachers[0](logits, torch.tensor(labels))
    counts = np.array([u.class_counts for u in uploads], dtype=float)
    counts[:, 9] = 1
    p = softmax(logits.numpy(), axis=-1)
    for b, y in enumerate(labels):
        wanted = sum(counts[k, y] / counts[:, y].sum() * p[k, b] for k in range(3))
        np.testing.assert_allclose(found[b].exp(), wanted, rtol=1e-5)


def test_fedftg_makes_images_of_the_classes_that_the_clients_hold(uploads, tmp_path):
    made = METHODS["fedftg"](uploads, small("fedftg", images=40, steps=1), Store(tmp_path)).synthetic
    assert 9 not in made.labels.tolist() and len(set(made.labels.tolist())) > 5


def test_fedftg_without_class_counts_is_one_line_before_any_work(uploads, tmp_path, monkeypatch, one_line):
    monkeypatch.setattr(module_of("fedftg"), "Generator", None)
    settings = small("fedftg").model_copy(update={"ensemble": EnsembleSettings(mode="mean_probs")})
    with pytest.raises(fm.BadInput) as error:
        METHODS["fedftg"]([uploads[0], uploads[1].without_counts()], settings, Store(tmp_path))
    one_line(error.value, "class_counts", "client 1")


# DENSE.


def dense_loss(teacher, student, labels, **options):
    settings = DenseSettings(**options)
    loss = module_of("dense").generator_loss(
        lambda _: teacher, lambda _: student, settings, None, torch.tensor(labels)
    )
    return loss.item()


def test_denses_generator_loss_by_hand():
    """Three images; student and ensemble name the same class on the first alone."""
    teacher = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    student = np.array([[0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.4, 0.3, 0.3]])
    labels, heat = [0, 1, 2], 3.0
    wanted = -(math.log(0.7) + math.log(0.3) + math.log(0.8)) / 3
    for b in (1, 2):
        p, q = teacher[b] ** (1 / heat), student[b] ** (1 / heat)
        p, q = p / p.sum(), q / q.sum()
        wanted -= 0.4 * heat**2 * (p * np.log(p / q)).sum() / 3
    teacher, student = torch.tensor(teacher).log(), torch.tensor(student).log()
    assert dense_loss(teacher, student + 2, labels, disagreement=0.4) == pytest.approx(wanted)


@given(scale=st.floats(0.1, 5), which=st.integers(0, 3))
def test_only_images_on_which_student_and_ensemble_differ_are_driven_apart(scale, which):
    teacher, labels = randn(4, 5).log_softmax(-1), [0, 1, 2, 3]
    student = torch.where(torch.tensor([True, True, False, False])[:, None], teacher, -teacher)
    before = dense_loss(teacher, student, labels)
    moved = student.clone()
    moved[which, moved[which].argmax()] += scale  # more certain of the same class
    changed = abs(dense_loss(teacher, moved, labels) - before) > 1e-9
    assert changed == (which >= 2)


def test_where_all_agree_dense_is_cross_entropy_alone():
    teacher = randn(4, 5).log_softmax(-1)
    found = dense_loss(teacher, 3 * teacher, [0, 1, 2, 3], disagreement=5.0)
    assert found == pytest.approx(-teacher.diagonal().mean().item())


# Co-Boosting.


@given(
    clients=st.integers(1, 5),
    by_class=st.booleans(),
    rate=st.floats(0, 2),
    seed=st.integers(0, 999),
)
def test_weights_stay_in_zero_to_one_and_move_by_the_rate_at_most(clients, by_class, rate, seed):
    rng = generator(seed)
    weights = torch.rand(clients, 6 if by_class else 1, generator=rng)
    logits = 5 * torch.randn(clients, 7, 6, generator=rng)
    labels = torch.randint(6, (7,), generator=rng)
    found = weight_step(weights, logits, labels, rate)
    assert found.shape == weights.shape and not found.requires_grad
    assert (found >= 0).all() and (found <= 1).all() and ((found - weights).abs() <= rate + 1e-6).all()


@pytest.mark.parametrize("columns", [1, 4])
def test_a_weight_goes_to_where_the_ensembles_loss_is_less(columns):
    rng = generator(3)
    weights = 0.3 + 0.4 * torch.rand(3, columns, generator=rng).double()
    logits, labels = randn(3, 8, 4), torch.randint(4, (8,), generator=rng)

    def loss(w):
        return F.cross_entropy((w[:, None] * logits).sum(0), labels).item()

    found = weight_step(weights, logits, labels, 0.1)
    for k in range(3):
        for c in range(columns):
            nudge = torch.zeros_like(weights)
            nudge[k, c] = 1e-4
            rises = loss(weights + nudge) > loss(weights - nudge)
            assert found[k, c].item() == pytest.approx(weights[k, c].item() + (-0.1 if rises else 0.1))


def test_a_client_that_is_right_gains_all_the_weight_and_one_that_is_wrong_none():
    labels = torch.tensor([0, 1, 2, 0])
    logits = torch.stack([3 * F.one_hot(labels, 3), 3 * F.one_hot((labels + 1) % 3, 3)]).double()
    weights, losses = torch.full((2, 1), 0.5).double(), []
    for _ in range(30):
        losses.append(F.cross_entropy((weights[:, None] * logits).sum(0), labels).item())
        weights = weight_step(weights, logits, labels, 0.02)
    assert weights.flatten().tolist() == [1, 0]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.2 < 0.9 < losses[0]


def test_the_pool_reweighs_once_a_batch():
    labels = torch.arange(10) % 3
    right, wrong = 3.0 * F.one_hot(labels, 3), 3.0 * F.one_hot((labels + 1) % 3, 3)
    student = SimpleNamespace(pool=lambda: (None, labels, torch.stack([right, wrong], dim=1)))
    found = reweigh(torch.full((2, 1), 0.5), student, 0.02, 4, generator(0))
    torch.testing.assert_close(found, torch.tensor([[0.56], [0.44]]))


def test_the_weight_step_decays_and_the_student_learns_from_the_new_weights(uploads, tmp_path, monkeypatch):
    module, rates, taught = module_of("co_boosting"), [], []

    def reweigh(weights, student, rate, batch_size, rng):
        rates.append(rate)
        return torch.full_like(weights, 0.1 * len(rates))

    def learn(self, steps, teacher, progress):
        logits = randn(3, 2, 10)
        total = 0.1 * len(rates) * logits.sum(0)
        torch.testing.assert_close(teacher(logits, None), total.log_softmax(-1))
        taught.append(steps)

    monkeypatch.setattr(module, "reweigh", reweigh)
    monkeypatch.setattr(Student, "learn", learn)
    settings = small("co_boosting", rounds=3, weight_step=0.2, weight_decay=0.5)
    METHODS["co_boosting"](uploads, settings, Store(tmp_path))
    assert rates == pytest.approx([0.2, 0.1, 0.05]) and taught == [1, 1, 1]


def test_without_hardness_the_hard_loss_is_cross_entropy():
    log_probs, labels = randn(6, 4).log_softmax(-1), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(hard_loss(log_probs, labels, 0.0), F.nll_loss(log_probs, labels))


def test_easy_samples_count_little_in_value_and_gradient():
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).double()
    logits, labels = p.log().requires_grad_(True), torch.tensor([0, 0])  # one easy, one hard
    for hardness in (1.0, 2.0):
        factors = (0.1**hardness, 0.8**hardness)
        loss = hard_loss(logits.log_softmax(-1), labels, hardness)
        assert loss.item() == pytest.approx(-(factors[0] * math.log(0.9) + factors[1] * math.log(0.2)) / 2)
        (gradient,) = torch.autograd.grad(loss, logits)
        # of cross-entropy p − y, times the factor: nothing flows through it
        wanted = torch.tensor([[-0.1 * factors[0], 0.1 * factors[0]], [-0.8 * factors[1], 0.8 * factors[1]]])
        torch.testing.assert_close(gradient, wanted.double() / 2)


def test_co_boostings_generator_loss_is_hard_loss_less_the_divergence_of_all_images():
    teacher, student = randn(4, 5).log_softmax(-1), randn(4, 5, seed=1)
    labels = torch.tensor([4, 0, 1, 1])
    settings = CoBoostingSettings(disagreement=0.3, hardness=2.0, temperature=2.0)
    found = module_of("co_boosting").generator_loss(
        lambda _: teacher, lambda _: student, settings, None, labels
    )
    wanted = 0.0
    for b in range(4):
        p, q = (softmax(x[b].numpy() / 2) for x in (teacher, student))
        right = math.exp(teacher[b, labels[b]])
        wanted += (1 - right) ** 2 * -math.log(right) / 4 - 0.3 * 4 * (p * np.log(p / q)).sum() / 4
    assert found.item() == pytest.approx(wanted)


def test_every_pixel_moves_by_epsilon_of_full_brightness_where_the_closed_form_points():
    """A linear ensemble of four classes on images of two channels."""
    images, matrix, scale = randn(6, 2, 3, 3), randn(18, 4, seed=1), torch.tensor([0.25, 0.5]).view(2, 1, 1)
    moved = perturb(
        lambda x: x.flatten(1) @ matrix, images, CoBoostingSettings(perturbation=0.1), scale, generator(5)
    )
    towards = (2 * torch.rand(6, 4, generator=generator(5)) - 1).double().numpy()
    p = softmax((images.flatten(1) @ matrix).numpy() / 4, axis=1)
    slope = (p * (towards - (p * towards).sum(1, keepdims=True))) @ matrix.numpy().T
    steps = (moved - images).numpy()
    np.testing.assert_allclose(steps[:, 0], 0.4 * np.sign(slope).reshape(6, 2, 3, 3)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(steps[:, 1], 0.2 * np.sign(slope).reshape(6, 2, 3, 3)[:, 1], rtol=1e-6)


def test_no_perturbation_moves_nothing(ensemble, images):
    none = CoBoostingSettings(perturbation=0)
    assert torch.equal(perturb(ensemble, images, none, torch.full((1, 1, 1), 0.25), generator(0)), images)


def test_a_perturbation_tells_more_than_random_signs_of_its_size(uploads):
    teacher, images = fm.Ensemble(uploads, EnsembleSettings(mode="mean_logits")), some(24)
    scale, settings = torch.full((1, 1, 1), 0.25), CoBoostingSettings()
    moved = perturb(teacher, images, settings, scale, generator(0))
    step = settings.perturbation / 0.25
    torch.testing.assert_close((moved - images).abs(), torch.full_like(images, step), rtol=0, atol=1e-5)
    signs = 2.0 * torch.randint(2, images.shape, generator=generator(1)) - 1

    def change(seen):
        return (teacher(seen).exp() - teacher(images).exp()).abs().sum(1).mean().item()

    with torch.no_grad():
        assert change(moved) > 1.5 * change(images + step * signs)


# F-DAFL.


def test_fdafls_generator_loss_by_hand():
    p, features = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([[[1.0, -3.0]], [[0.0, 4.0]]])
    settings = FdaflSettings(activation=0.1, entropy=5.0)
    found = module_of("fdafl").generator_loss(p.log(), features, settings)
    entropy = -(0.55 * math.log(0.55) + 0.45 * math.log(0.45))
    wanted = -(math.log(0.8) + math.log(0.7)) / 2 - 0.1 * (1 + 3 + 0 + 4) / 4 - 5 * entropy
    assert found.item() == pytest.approx(wanted, rel=1e-5)


@given(seed=st.integers(0, 999))
def test_the_entropy_term_is_least_for_balanced_predictions(seed):
    """Of one-hot predictions, for which the first term is none."""
    settings = FdaflSettings(activation=0.0, entropy=1.0)
    labels = torch.randint(4, (12,), generator=generator(seed))

    def loss(y):
        log_probs = F.one_hot(y, 4).double().log()
        return module_of("fdafl").generator_loss(log_probs, torch.zeros(1, 12, 1), settings).item()

    least = loss(torch.arange(12) % 4)
    assert least == pytest.approx(-math.log(4)) and loss(labels) >= least - 1e-9
    assert loss(torch.zeros(12, dtype=torch.int64)) == pytest.approx(0)


@pytest.mark.parametrize("mode", MODES)
def test_what_excites_is_the_ensembles_forward_and_what_its_heads_see(uploads, images, mode):
    teacher = fm.Ensemble(uploads, EnsembleSettings(mode=mode))
    log_probs, features = excite(teacher, images)
    torch.testing.assert_close(log_probs, teacher(images), rtol=1e-4, atol=1e-5)
    for upload, found in zip(uploads, features, strict=True):
        vit = upload.vit()
        wanted = vit.forward_head(vit.forward_features(images), pre_logits=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_fdafl_asks_for_no_class_and_names_what_the_ensemble_sees(uploads, tmp_path):
    made = METHODS["fdafl"](uploads, small("fdafl"), Store(tmp_path)).synthetic
    with torch.no_grad():
        assert torch.equal(made.labels, fm.Ensemble(uploads)(made.pixels).argmax(1))


# F-ADI.


def test_fadi_alternates_dense_inversion_against_the_student_with_distillation(
    uploads, tmp_path, monkeypatch
):
    module, events, rivals = module_of("fadi"), [], []

    def invert(ensemble, labels, settings, seed, *, rival, competition, recorded, progress):
        assert settings.stop_at == () and settings.stop_ratio == () and competition == 0.7
        assert not rival.training and not any(p.requires_grad for p in rival.parameters())
        rivals.append(rival.head.weight.clone())
        events.append(len(labels))
        return fm.SyntheticSet(some(len(labels)), labels, torch.ones(len(labels), 36).bool(), labels * 0.0)

    learn = Student.learn

    def record(self, steps, teacher, progress):
        events.append(f"{steps} steps on {len(self.images)}")
        learn(self, steps, teacher, progress)

    monkeypatch.setattr(module, "invert", invert)
    monkeypatch.setattr(Student, "learn", record)
    settings = small(images=8, steps=5).model_copy(update={"fadi": FadiSettings(rounds=2, competition=0.7)})
    METHODS["fadi"](uploads[:2], settings, Store(tmp_path))
    assert events == [3, 3, "2 steps on 6", 2, "3 steps on 8"]
    assert torch.equal(rivals[0], rivals[1]) and not torch.equal(rivals[1], rivals[2])


def test_fadi_makes_the_same_classes_as_fedmitr(uploads, tmp_path):
    settings = small(images=8)
    sets = [METHODS[m](uploads[:2], settings, Store(tmp_path)).synthetic for m in ("fadi", "fedmitr")]
    assert torch.equal(sets[0].labels, sets[1].labels) and sets[0].mask.all()
    assert not torch.equal(sets[0].pixels, sets[1].pixels)


# What a run leaves in the store.


@pytest.mark.parametrize("method", [*WITH_GENERATOR, "fadi"])
def test_the_same_run_gives_the_same_bytes_and_comes_back_from_the_store(
    method, uploads, tmp_path, monkeypatch
):
    settings = small(method) if method in BLOCKS else small()

    def run(where, settings=settings):
        outcome = METHODS[method](uploads[:2], settings, Store(tmp_path / where))
        return copy_of(outcome.models[0]), outcome.synthetic.pixels, outcome

    first, other = run("one"), run("two")
    changed = run("one", settings.model_copy(update={"seed": 1}))
    monkeypatch.setattr(module_of(method), "Student", None)
    again = run("one")
    for run_again in (other, again):
        assert all(torch.equal(v, first[0][n]) for n, v in run_again[0].items())
        assert torch.equal(run_again[1], first[1])
    assert not torch.equal(changed[1], first[1]) and not again[2].models[0].training
    assert again[2].student_steps == first[2].student_steps == 3
    assert again[2].seconds == {stage: round(value, 3) for stage, value in first[2].seconds.items()}


@pytest.mark.parametrize("method", WITH_GENERATOR)
def test_other_settings_of_the_method_are_another_run(method, uploads, tmp_path, monkeypatch):
    METHODS[method](uploads[:2], small(method), Store(tmp_path))

    def worked(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(module_of(method), "Student", worked)
    METHODS[method](uploads[:2], small(method), Store(tmp_path))
    others = [small(method, lr=0.5), small(method, images=7), small(method, steps=4)]
    others.append(small(method).model_copy(update={"budget": "own"}))
    others.append(small(method).model_copy(update={"ensemble": EnsembleSettings(mode="size")}))
    for settings in others:
        with pytest.raises(InterruptedError):
            METHODS[method](uploads[:2], settings, Store(tmp_path))
    with pytest.raises(InterruptedError):
        METHODS[method](uploads[1:], small(method), Store(tmp_path))


def test_loud_students_and_clients_stay_finite(uploads, tmp_path):
    """Weights so large that predictions are certain: no NaN in any loss."""
    certain = []
    for u in uploads[:2]:
        vit = loud(u.vit(), seed=u.client, scale=2.0)
        certain.append(dataclasses.replace(u, weights=copy_of(vit)))
    for method in (*WITH_GENERATOR, "fadi"):
        settings = small(method) if method in BLOCKS else small()
        outcome = METHODS[method](certain, settings, Store(tmp_path))
        assert all(torch.isfinite(p).all() for p in outcome.models[0].parameters()), method
        assert torch.isfinite(outcome.synthetic.pixels).all(), method
