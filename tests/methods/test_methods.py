"""methods/: what each paper's formula says, against loops, closed forms and cases by hand."""

import dataclasses
import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import loud, make_upload
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

import fedmitr as fm
from fedmitr.core.rng import make_rng
from fedmitr.core.store import Store
from fedmitr.methods import METHODS
from fedmitr.methods._student import Student
from fedmitr.methods.co_boosting import CoBoostingSettings, hard_loss, perturb, reweigh, weight_step
from fedmitr.methods.dense import DenseSettings
from fedmitr.methods.fdafl import FdaflSettings, excite
from fedmitr.methods.fedftg import FedftgSettings, class_ensemble, likeness, sample_labels
from fedmitr.server.ensemble import class_weights
from fedmitr.settings import Settings
from fedmitr.settings.schema import EnsembleSettings

MODES = ("mean_probs", "mean_logits", "size", "class")
GENERATORS = ("fdafl", "dense", "co_boosting", "fedftg")
DISTILLED = (*GENERATORS, "fadi")


def loss_of(method):
    """The generator's loss of a method; the package's own name for the module is the method."""
    return module_of(method).generator_loss


def module_of(method):
    return importlib.import_module(f"fedmitr.methods.{method}")


def small(images=6, steps=3, **changes):
    """Runs of two rounds: six images, three student steps; changes by dotted name, with __ for the dot."""
    tree = {
        "inversion": dict(images=images, batch_size=3, iterations=2, stop_at=(), stop_ratio=()),
        "distill": dict(steps=steps, batch_size=4, views=1, augment=0.0),
        "fadi": dict(iterations=2),
    }
    tree |= {name: dict(rounds=2, generator_steps=2, width=4, latent=5) for name in GENERATORS}
    for name in ("fdafl", "fedftg"):
        tree[name]["batch_size"] = 4
    for name, value in changes.items():
        block, _, leaf = name.partition("__")
        tree[block] = tree.get(block, {}) | {leaf: value} if leaf else value
    return Settings.model_validate(tree)


def own(method, **options):
    """Changes of the method's own block."""
    return {f"{method}__{name}": value for name, value in options.items()}


@pytest.fixture(scope="module")
def clients():
    """Three clients with models of 12×12 images; nobody holds a 9."""
    counts = [(9, 8, 7, 0, 0, 0, 0, 0, 0, 0), (0, 2, 0, 4, 6, 8, 0, 0, 0, 0), (1, 0, 0, 0, 0, 3, 5, 2, 1, 0)]
    return [make_upload(k, c, side=12) for k, c in enumerate(counts)]


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


def randn(*shape, seed=0):
    return torch.randn(shape, generator=make_rng(seed)).double()


# FedFTG.


def of_counts(*counts):
    return [SimpleNamespace(client=k, class_counts=c) for k, c in enumerate(counts)]


def test_fedftg_weighs_a_client_by_its_share_of_the_class():
    found = class_weights(of_counts((3, 0, 1, 0), (1, 2, 3, 0)))
    assert found.tolist() == [[0.75, 0, 0.25, 0.5], [0.25, 1, 0.75, 0.5]]  # the last is nobody's: all alike


def test_fedftgs_teacher_of_an_image_made_for_y_by_hand():
    p = torch.tensor([[[0.5, 0.25, 0.25]] * 3, [[0.2, 0.2, 0.6]] * 3])
    known = class_weights(of_counts((3, 0, 1), (1, 2, 3)))
    found = class_ensemble(p.log() + 7, torch.tensor([0, 1, 2]), known).exp()
    wanted = [[0.425, 0.2375, 0.3375], [0.2, 0.2, 0.6], [0.275, 0.2125, 0.5125]]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_to_learn_that_teacher_is_to_come_near_every_client_by_its_weight():
    """KL(Σ α p ‖ q) and the paper's Σ α KL(p ‖ q) differ by what does not depend on the student."""
    logits, labels = randn(3, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    known = class_weights(of_counts((3, 0, 1, 2), (1, 4, 0, 0), (0, 4, 9, 2))).double()
    student = randn(5, 4, seed=1).requires_grad_(True)
    ours = F.kl_div(
        student.log_softmax(-1), class_ensemble(logits, labels, known), reduction="batchmean", log_target=True
    )
    theirs = -loss_of("fedftg")(logits, student, labels, known, FedftgSettings(classification=0))
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_fedftgs_generator_loss_against_a_loop_over_clients_and_samples(weight):
    counts, labels = [(3, 0, 1, 2), (1, 4, 0, 0), (0, 4, 9, 2)], [0, 3, 1, 1, 2]
    logits, of_student = randn(3, 5, 4), randn(5, 4, seed=1)
    p, q = softmax(logits.numpy(), axis=-1), softmax(of_student.numpy(), axis=-1)
    apart = wrong = 0.0
    for b, y in enumerate(labels):
        for k in range(3):
            share = counts[k][y] / sum(c[y] for c in counts)
            apart += share * sum(p[k, b, c] * math.log(p[k, b, c] / q[b, c]) for c in range(4)) / 5
            wrong -= share * math.log(p[k, b, y]) / 5
    settings, known = FedftgSettings(classification=weight), class_weights(of_counts(*counts)).double()
    found = loss_of("fedftg")(logits, of_student, torch.tensor(labels), known, settings)
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
    drawn = sample_labels(torch.tensor(totals, dtype=torch.float32), 50, make_rng(seed))
    assert len(drawn) == 50 and all(totals[y] > 0 for y in drawn.tolist())


def test_labels_are_drawn_in_proportion_to_what_all_hold():
    drawn = sample_labels(torch.tensor([6.0, 0, 1, 3]), 4000, make_rng(0))
    share = torch.bincount(drawn, minlength=4) / 4000
    assert (share - torch.tensor([0.6, 0, 0.1, 0.3])).abs().max() < 0.03


def test_fedftgs_generator_drives_student_and_clients_apart(clients, tmp_path, monkeypatch):
    losses = recorded(monkeypatch, module_of("fedftg"), "generator_loss")
    options = dict(rounds=1, generator_steps=14, lr=1e-2, width=8, classification=0, diversity=0)
    METHODS["fedftg"](clients, small(**own("fedftg", **options)), Store(tmp_path))
    apart = -torch.stack(losses).detach()  # what is left is the discrepancy
    assert len(apart) == 14 and (apart > 0).all() and apart[-4:].mean() > 1.1 * apart[:4].mean()


def test_fedftgs_diversity_loss_makes_images_differ(clients, tmp_path, monkeypatch):
    found = []
    for weight in (0, 100):
        alike = recorded(monkeypatch, module_of("fedftg"), "likeness")
        options = dict(rounds=1, generator_steps=14, lr=1e-2, width=8, diversity=weight)
        METHODS["fedftg"](clients[:2], small(**own("fedftg", **options)), Store(tmp_path))
        found.append(torch.stack(alike[-4:]).mean().item())
        monkeypatch.undo()
    assert found[1] < found[0]


def test_fedftgs_student_learns_the_class_wise_teacher(clients, tmp_path, monkeypatch):
    teachers = []
    monkeypatch.setattr(Student, "learn", lambda self, steps, teacher, bar: teachers.append(teacher))
    METHODS["fedftg"](clients, small(), Store(tmp_path))
    logits, labels = randn(3, 4, 10), [0, 1, 5, 9]
    found = teachers[0](logits, torch.tensor(labels)).exp()
    counts = np.array([u.class_counts for u in clients], dtype=float)
    counts[:, 9] = 1
    p = softmax(logits.numpy(), axis=-1)
    for b, y in enumerate(labels):
        wanted = sum(counts[k, y] / counts[:, y].sum() * p[k, b] for k in range(3))
        np.testing.assert_allclose(found[b], wanted, rtol=1e-5)


def test_fedftg_makes_images_of_the_classes_that_the_clients_hold(clients, tmp_path):
    made = METHODS["fedftg"](clients, small(images=40, steps=1), Store(tmp_path)).synthetic
    assert 9 not in made.labels.tolist() and len(set(made.labels.tolist())) > 5


def test_fedftg_without_class_counts_is_one_line_before_any_work(clients, tmp_path, monkeypatch, one_line):
    monkeypatch.setattr(module_of("fedftg"), "Generator", None)
    with pytest.raises(fm.BadInput) as error:
        METHODS["fedftg"](
            [clients[0], clients[1].without_counts()], small(ensemble__mode="mean_probs"), Store(tmp_path)
        )
    one_line(error.value, "class_counts", "client 1")


# DENSE.


def dense_loss(teacher, student, labels, **options):
    settings = DenseSettings(**options)
    return loss_of("dense")(lambda _: teacher, lambda _: student, settings, None, torch.tensor(labels)).item()


def test_denses_generator_loss_by_hand():
    """Three images; student and ensemble name the same class on the first alone."""
    teacher = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    student = np.array([[0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.4, 0.3, 0.3]])
    wanted = -(math.log(0.7) + math.log(0.3) + math.log(0.8)) / 3
    for b in (1, 2):
        p, q = teacher[b] ** (1 / 3), student[b] ** (1 / 3)  # T = 3
        p, q = p / p.sum(), q / q.sum()
        wanted -= 0.4 * 9 * (p * np.log(p / q)).sum() / 3
    teacher, student = torch.tensor(teacher).log(), torch.tensor(student).log()
    assert dense_loss(teacher, student + 2, [0, 1, 2], disagreement=0.4) == pytest.approx(wanted)


@given(scale=st.floats(0.1, 5), which=st.integers(0, 3))
def test_only_images_on_which_student_and_ensemble_differ_are_driven_apart(scale, which):
    teacher, labels = randn(4, 5).log_softmax(-1), [0, 1, 2, 3]
    student = torch.where(torch.tensor([True, True, False, False])[:, None], teacher, -teacher)
    moved = student.clone()
    moved[which, moved[which].argmax()] += scale  # more certain of the same class
    change = dense_loss(teacher, moved, labels) - dense_loss(teacher, student, labels)
    assert (abs(change) > 1e-9) == (which >= 2)


def test_where_all_agree_dense_is_cross_entropy_alone():
    teacher = randn(4, 5).log_softmax(-1)
    found = dense_loss(teacher, 3 * teacher, [0, 1, 2, 3], disagreement=5.0)
    assert found == pytest.approx(-teacher.diagonal().mean().item())


# Co-Boosting.


@given(count=st.integers(1, 5), by_class=st.booleans(), rate=st.floats(0, 2), seed=st.integers(0, 999))
def test_weights_stay_in_zero_to_one_and_move_by_the_rate_at_most(count, by_class, rate, seed):
    rng = make_rng(seed)
    weights = torch.rand(count, 6 if by_class else 1, generator=rng)
    logits, labels = 5 * torch.randn(count, 7, 6, generator=rng), torch.randint(6, (7,), generator=rng)
    found = weight_step(weights, logits, labels, rate)
    assert found.shape == weights.shape and not found.requires_grad
    assert (found >= 0).all() and (found <= 1).all() and ((found - weights).abs() <= rate + 1e-6).all()


@pytest.mark.parametrize("columns", [1, 4])
def test_a_weight_goes_to_where_the_ensembles_loss_is_less(columns):
    rng = make_rng(3)
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
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(math.log(2 + math.exp(-1.5)))
    assert losses[-1] == pytest.approx(math.log(1 + 2 * math.exp(-3)))


def test_the_pool_reweighs_once_a_batch():
    labels = torch.arange(10) % 3
    right, wrong = 3.0 * F.one_hot(labels, 3), 3.0 * F.one_hot((labels + 1) % 3, 3)
    student = SimpleNamespace(pool=lambda: (None, labels, torch.stack([right, wrong], dim=1)))
    found = reweigh(torch.full((2, 1), 0.5), student, 0.02, 4, make_rng(0))
    torch.testing.assert_close(found, torch.tensor([[0.56], [0.44]]))  # batches of 4, 4 and 2


def test_the_weight_step_decays_and_the_student_learns_from_the_new_weights(clients, tmp_path, monkeypatch):
    rates, shares = [], []

    def reweigh(weights, student, rate, batch_size, rng):
        rates.append(rate)
        return torch.full_like(weights, 0.1 * len(rates))

    def learn(self, steps, teacher, progress):
        logits = randn(3, 2, 10)
        total = 0.1 * len(rates) * logits.sum(0)
        torch.testing.assert_close(teacher(logits, None), total.log_softmax(-1), rtol=1e-5, atol=1e-6)
        shares.append(steps)

    monkeypatch.setattr(module_of("co_boosting"), "reweigh", reweigh)
    monkeypatch.setattr(Student, "learn", learn)
    options = dict(rounds=3, weight_step=0.2, weight_decay=0.5)
    METHODS["co_boosting"](clients, small(**own("co_boosting", **options)), Store(tmp_path))
    assert rates == pytest.approx([0.2, 0.1, 0.05]) and shares == [1, 1, 1]


def test_without_hardness_the_hard_loss_is_cross_entropy():
    log_probs, labels = randn(6, 4).log_softmax(-1), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(hard_loss(log_probs, labels, 0.0), F.nll_loss(log_probs, labels))


@pytest.mark.parametrize("hardness", [1.0, 2.0])
def test_easy_samples_count_little_in_value_and_gradient(hardness):
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).double()
    logits, labels = p.log().requires_grad_(True), torch.tensor([0, 0])  # one easy, one hard
    easy, hard = 0.1**hardness, 0.8**hardness
    loss = hard_loss(logits.log_softmax(-1), labels, hardness)
    assert loss.item() == pytest.approx(-(easy * math.log(0.9) + hard * math.log(0.2)) / 2)
    loss.backward()  # that of cross-entropy, p − y, times the factor: nothing flows through it
    wanted = torch.tensor([[-0.1 * easy, 0.1 * easy], [-0.8 * hard, 0.8 * hard]]).double() / 2
    torch.testing.assert_close(logits.grad, wanted)


def test_co_boostings_generator_loss_is_hard_loss_less_the_divergence_of_all_images():
    teacher, student = randn(4, 5).log_softmax(-1), randn(4, 5, seed=1)
    labels, settings = (
        torch.tensor([4, 0, 1, 1]),
        CoBoostingSettings(disagreement=0.3, hardness=2.0, temperature=2.0),
    )
    found = loss_of("co_boosting")(lambda _: teacher, lambda _: student, settings, None, labels)
    wanted = 0.0
    for b in range(4):
        p, q = (softmax(x[b].numpy() / 2) for x in (teacher, student))
        right = math.exp(teacher[b, labels[b]])
        wanted += (1 - right) ** 2 * -math.log(right) / 4 - 0.3 * 4 * (p * np.log(p / q)).sum() / 4
    assert found.item() == pytest.approx(wanted)


class Linear(torch.nn.Module):
    """An ensemble of one linear model of four classes, on images of two channels."""

    def __init__(self):
        super().__init__()
        self.stats = tuple(torch.tensor(s).view(-1, 1, 1) for s in ([0.5, 0.1], [0.25, 0.5]))
        self.matrix = randn(18, 4, seed=1)

    def forward(self, images):
        return images.flatten(1) @ self.matrix


def test_every_pixel_moves_by_epsilon_of_full_brightness_where_the_closed_form_points():
    images, teacher = randn(6, 2, 3, 3), Linear()
    moved = perturb(teacher, images, CoBoostingSettings(perturbation=0.1), make_rng(5))
    towards = (2 * torch.rand(6, 4, generator=make_rng(5)) - 1).double().numpy()
    p = softmax(teacher(images).numpy() / 4, axis=1)
    slope = (p * (towards - (p * towards).sum(1, keepdims=True))) @ teacher.matrix.numpy().T
    sign = np.sign(slope).reshape(6, 2, 3, 3)
    np.testing.assert_allclose(moved[:, 0], images[:, 0] + 0.4 * sign[:, 0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(moved[:, 1], images[:, 1] + 0.2 * sign[:, 1], rtol=1e-6, atol=1e-7)


def test_no_perturbation_moves_nothing(ensemble, images):
    assert torch.equal(perturb(ensemble, images, CoBoostingSettings(perturbation=0), make_rng(0)), images)


def test_a_perturbation_tells_more_than_random_signs_of_its_size(uploads):
    teacher = fm.Ensemble(uploads, EnsembleSettings(mode="mean_logits"))
    images = torch.randn(24, 1, 24, 24, generator=make_rng(3))
    moved = perturb(teacher, images, CoBoostingSettings(), make_rng(0))
    step = 8 / 255 / 0.25
    torch.testing.assert_close((moved - images).abs(), torch.full_like(images, step), rtol=0, atol=1e-5)
    signs = 2.0 * torch.randint(2, images.shape, generator=make_rng(1)) - 1

    def change(seen):
        return (teacher(seen).exp() - teacher(images).exp()).abs().sum(1).mean().item()

    with torch.no_grad():
        assert change(moved) > 1.5 * change(images + step * signs)


def test_co_boostings_views_are_moved_others_are_not(clients, tmp_path, monkeypatch):
    pools = {}
    monkeypatch.setattr(
        Student,
        "learn",
        lambda self, steps, teacher, bar: pools.update({method: (self.pool()[0], self.images.pixels)}),
    )
    for method in ("co_boosting", "dense"):
        METHODS[method](clients[:2], small(images=1, **own(method, rounds=1)), Store(tmp_path))
    moved, still = ((views - pixels).abs() for views, pixels in pools.values())
    torch.testing.assert_close(moved, torch.full_like(moved, 8 / 255 / 0.25), rtol=0, atol=1e-5)
    assert still.max() == 0


# F-DAFL.


def test_fdafls_generator_loss_by_hand():
    p, features = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([[[1.0, -3.0]], [[0.0, 4.0]]])
    found = loss_of("fdafl")(p.log(), features, FdaflSettings(activation=0.1, entropy=5.0))
    entropy = -(0.55 * math.log(0.55) + 0.45 * math.log(0.45))
    wanted = -(math.log(0.8) + math.log(0.7)) / 2 - 0.1 * (1 + 3 + 0 + 4) / 4 - 5 * entropy
    assert found.item() == pytest.approx(wanted, rel=1e-5)


@given(seed=st.integers(0, 999))
def test_the_entropy_term_is_least_for_balanced_predictions(seed):
    """Of certain predictions, for which the one-hot term is none."""
    settings = FdaflSettings(activation=0.0, entropy=1.0)

    def loss(labels):
        return loss_of("fdafl")(F.one_hot(labels, 4).double().log(), torch.zeros(1), settings).item()

    least = loss(torch.arange(12) % 4)
    assert least == pytest.approx(-math.log(4))
    assert loss(torch.randint(4, (12,), generator=make_rng(seed))) >= least - 1e-9
    assert loss(torch.zeros(12, dtype=torch.int64)) == pytest.approx(0)


def test_a_class_that_the_ensemble_never_sees_leaves_finite_gradients():
    logits = torch.tensor([[0.0, -200.0], [0.0, -150.0]], requires_grad=True)  # below what exp can hold
    loss_of("fdafl")(logits.log_softmax(-1), torch.zeros(1), FdaflSettings()).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("mode", MODES)
def test_what_excites_is_the_ensembles_forward_and_what_its_heads_see(uploads, images, mode):
    teacher = fm.Ensemble(uploads, EnsembleSettings(mode=mode))
    log_probs, features = excite(teacher, images)
    torch.testing.assert_close(log_probs, teacher(images), rtol=1e-4, atol=1e-5)
    for upload, found in zip(uploads, features.view(3, 3, -1), strict=True):
        vit = upload.vit()
        wanted = vit.forward_head(vit.forward_features(images), pre_logits=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_fdafl_asks_for_no_class_and_names_what_the_ensemble_sees(clients, tmp_path):
    made = METHODS["fdafl"](clients, small(), Store(tmp_path)).synthetic
    with torch.no_grad():
        assert torch.equal(made.labels, fm.Ensemble(clients)(made.pixels).argmax(1))


# F-ADI.


STOP = dict(inversion__stop_at=(1,), inversion__stop_ratio=(0.5,))  # for FedMITR alone


def test_fadi_alternates_dense_inversion_against_the_student_with_distillation(
    clients, tmp_path, monkeypatch
):
    events, rivals, learn = [], [], Student.learn

    def invert(ensemble, labels, settings, seed, *, rival, competition, recorded, progress):
        assert (settings.stop_at, settings.stop_ratio, settings.iterations) == ((), (), 9)
        assert competition == 0.7 and not rival.training
        assert not any(p.requires_grad for p in rival.parameters())
        rivals.append(rival.head.weight.clone())
        events.append(len(labels))
        mask = torch.ones(len(labels), 9, dtype=torch.bool)
        return fm.SyntheticSet(torch.randn(len(labels), 1, 12, 12), labels, mask, labels * 0.0)

    def record(self, steps, teacher, progress):
        events.append(f"{steps} steps on {len(self.images)}")
        learn(self, steps, teacher, progress)

    monkeypatch.setattr(module_of("fadi"), "invert", invert)
    monkeypatch.setattr(Student, "learn", record)
    changes = own("fadi", rounds=2, competition=0.7, iterations=9) | STOP
    settings = small(images=8, steps=5, **changes)
    METHODS["fadi"](clients[:2], settings, Store(tmp_path))
    assert events == [3, 3, "2 steps on 6", 2, "3 steps on 8"]
    assert torch.equal(rivals[0], rivals[1]) and not torch.equal(rivals[1], rivals[2])


def test_fadi_asks_for_the_same_classes_as_fedmitr(clients, tmp_path):
    run, store = small(images=8, **STOP), Store(tmp_path)
    dense, sparse = (METHODS[m](clients[:2], run, store).synthetic for m in ("fadi", "fedmitr"))
    assert torch.equal(dense.labels, sparse.labels) and dense.mask.all() and not sparse.mask.all()


# Whole runs.


@pytest.mark.parametrize("method", GENERATORS)
def test_dense_and_co_boosting_start_a_generator_every_round_the_others_keep_theirs(
    method, clients, tmp_path, monkeypatch
):
    anew = method in ("dense", "co_boosting")
    made = recorded(monkeypatch, module_of("generator" if anew else method), "Generator")
    METHODS[method](clients[:2], small(**own(method, rounds=3)), Store(tmp_path))
    assert len(made) == (3 if anew else 1)
    assert len({m.start.weight.detach().numpy().tobytes() for m in made}) == len(made)
    assert all((m.classes == 10) == (method == "fedftg") for m in made)


@pytest.mark.parametrize("method", GENERATORS)
def test_rounds_share_images_and_steps(method, clients, tmp_path, monkeypatch):
    rounds = []
    monkeypatch.setattr(
        Student, "learn", lambda self, steps, teacher, bar: rounds.append((len(self.pool()[0]), steps))
    )
    METHODS[method](clients[:2], small(7, 5, **own(method, rounds=3)), Store(tmp_path))
    METHODS[method](clients[:2], small(2, 5, **own(method, rounds=3)), Store(tmp_path))
    assert rounds == [(2, 1), (4, 2), (7, 2), (1, 2), (2, 3)]  # two images: two rounds


@pytest.mark.parametrize("method", GENERATORS)
def test_the_generators_loss_falls(method, clients, tmp_path, monkeypatch):
    losses = recorded(monkeypatch, module_of(method), "generator_loss")
    options = dict(rounds=1, generator_steps=14, lr=1e-2, width=8)
    METHODS[method](clients[:2], small(steps=1, **own(method, **options)), Store(tmp_path))
    values = torch.stack(losses).detach()
    assert len(values) == 14 and values[-4:].mean() < values[:4].mean() - 0.05


@pytest.mark.parametrize("method", ["dense", "co_boosting"])
def test_classes_are_asked_for_equally_often(method, clients, tmp_path):
    made = METHODS[method](clients[:2], small(images=24, steps=1), Store(tmp_path)).synthetic
    assert torch.bincount(made.labels).tolist() == [4] * 6  # the other classes are nobody's


@pytest.mark.parametrize("method", DISTILLED)
def test_only_the_student_learns(method, clients, tmp_path, monkeypatch):
    digests, made = [u.digest for u in clients], []

    class Spy(Student):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            self.before = copy_of(self.ensemble.members), copy_of(self.vit)
            made.append(self)

    monkeypatch.setattr(module_of(method), "Student", Spy)
    settings = small(distill__views=0, distill__augment=0.5)  # new views at every step
    outcome = METHODS[method](clients, settings, Store(tmp_path))
    (student,) = made
    members, start = student.before
    assert all(torch.equal(v, members[n]) for n, v in student.ensemble.members.state_dict().items())
    assert outcome.models == [student.vit] and [u.digest for u in clients] == digests
    learnt = outcome.models[0].state_dict()
    assert not torch.equal(learnt["head.weight"], start["head.weight"])
    assert all(torch.isfinite(v).all() for v in learnt.values())
    assert len(outcome.synthetic) == 6 and outcome.student_steps == 3


@pytest.mark.parametrize("method", DISTILLED)
def test_the_same_run_gives_the_same_bytes_and_comes_back_from_the_store(
    method, clients, tmp_path, monkeypatch
):
    def run(where, **changes):
        return METHODS[method](clients[:2], small(**changes), Store(tmp_path / where))

    first, other, changed = run("one"), run("two"), run("one", seed=1)
    monkeypatch.setattr(module_of(method), "Student", None)
    again = run("one")
    for alike in (other, again):
        state = alike.models[0].state_dict()
        assert all(torch.equal(v, state[n]) for n, v in first.models[0].state_dict().items())
        assert torch.equal(alike.synthetic.pixels, first.synthetic.pixels)
    assert not torch.equal(changed.synthetic.pixels, first.synthetic.pixels)
    assert not again.models[0].training and again.student_steps == first.student_steps == 3
    assert again.seconds == {stage: round(value, 3) for stage, value in first.seconds.items()}


@pytest.mark.parametrize("method", DISTILLED)
def test_other_settings_are_another_run(method, clients, tmp_path, monkeypatch):
    METHODS[method](clients[:2], small(), Store(tmp_path))

    def work(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(module_of(method), "Student", work)
    METHODS[method](clients[:2], small(), Store(tmp_path))
    METHODS[method](clients[:2], small(distill__lr=0.1, distill__ce_weight=0.5), Store(tmp_path))  # FedMITR's
    changes = [dict(images=7), dict(steps=4), dict(budget="own"), dict(ensemble__mode="size")]
    changes += [own(method, rounds=1), own(method, student_lr=0.1), dict(distill__weight_decay=0.1)]
    changes += [dict(model__pretrained=False)]
    for change in changes:
        with pytest.raises(InterruptedError):
            METHODS[method](clients[:2], small(**change), Store(tmp_path))
    with pytest.raises(InterruptedError):
        METHODS[method](clients[1:], small(), Store(tmp_path))


@pytest.mark.parametrize("method", DISTILLED)
def test_clients_that_are_certain_of_everything_leave_a_finite_student(method, clients, tmp_path):
    certain = []
    for upload in clients[:2]:
        weights = copy_of(loud(upload.vit(), seed=upload.client, scale=1.0))
        certain.append(dataclasses.replace(upload, weights=weights))
    outcome = METHODS[method](certain, small(), Store(tmp_path))
    assert all(torch.isfinite(p).all() for p in outcome.models[0].parameters())
    assert torch.isfinite(outcome.synthetic.pixels).all()
