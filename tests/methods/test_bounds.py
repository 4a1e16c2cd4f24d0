"""References beside FedMITR+: its teacher, its offsets, and its student on textures or on real images."""

import importlib

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from tiny_runs import given, images_of, run, small

import fedmitr as fm
from fedmitr.core.rng import make_rng
from fedmitr.core.store import Store
from fedmitr.methods import METHODS
from fedmitr.methods._student import student_start, whole_images
from fedmitr.methods.fedmitr_plus import with_additions
from fedmitr.server.ensemble import class_weights
from fedmitr.server.statistics import ridge, total_statistics
from fedmitr.server.views import random_textures

pipeline = importlib.import_module("fedmitr.methods.fedmitr")  # the package's name for it is the method
SUBSTITUTES = ("textures", "real_images")
STILL = {"fedmitr_plus.textures": False, "distill.augment": 0.0}  # every view is the image itself
PLAIN = {f"fedmitr_plus.{name}": False for name in ("owners", "class_weights", "statistics", "textures")}


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(3))


def class_mode(uploads, images):
    """Log-probabilities of clients' logits weighted by their shares of each class, in numpy."""
    logits = np.stack([u.vit()(images).double().numpy() for u in uploads])  # (K, B, C)
    weights = class_weights(uploads).double().numpy()[:, None]  # (K, 1, C)
    return log_softmax((weights * logits).sum(0), axis=1)


def equal(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_real_images_alone_is_given_images_and_none_but_it_and_textures_learns_on_others():
    assert [name for name, record in METHODS.items() if record.given == "images"] == ["real_images"]
    assert METHODS["real_images"].is_reference and "real" in METHODS["real_images"].label


# The teacher.


@pytest.mark.parametrize("beta", [0.0, 3.0])
@pytest.mark.parametrize("tokens", ["cls", "both"])
def test_ensemble_with_statistics_is_the_sum_of_both_scores(beta, tokens, clients, pixels, tmp_path):
    own = {"fedmitr_plus.regions": False, "fedmitr_plus.views": 0}
    sums = {"statistics.weight": beta, "statistics.tokens": tokens, "statistics.ridge": 0.5}
    settings = small(own | sums)
    (model,) = run("ensemble_statistics", clients, settings, Store(tmp_path)).models
    informed = given("ensemble_statistics", clients, settings)
    weight, bias = (part.numpy() for part in ridge(total_statistics(informed), 0.5))
    shared = fm.create_vit("vit_micro", 10, pretrained=True, image_size=12).eval()
    with torch.no_grad():
        out = shared.forward_features(pixels).double().numpy()
    features = out[:, 0] if tokens == "cls" else np.concatenate([out[:, 0], out[:, 1:].mean(1)], 1)
    wanted = log_softmax(class_mode(clients, pixels) + beta * (features @ weight.T + bias), axis=1)
    held = [y for y in range(10) if y != 9]  # a class of nobody is out of reach
    with torch.no_grad():
        found = model(pixels).double().numpy()
    np.testing.assert_allclose(found[:, held], wanted[:, held], rtol=1e-3, atol=1e-3)
    assert beta == 0 or (found[:, 9] < -1e6).all()


# The offsets.


@pytest.mark.parametrize("penalty", [0.02, 0.5])
def test_offsets_of_the_calibrated_ensemble_are_scipys_minimum_on_fedmitr_plus_images(
    penalty, clients, pixels, tmp_path
):
    settings, store = small(STILL | {"calibrated_ensemble.penalty": penalty}), Store(tmp_path)
    outcome = run("calibrated_ensemble", clients, settings, store)
    images, labels = outcome.synthetic.pixels, outcome.synthetic.labels.numpy()
    z = class_mode(clients, images)

    def loss(offset):
        picked = log_softmax(z + offset, axis=1)[np.arange(len(labels)), labels]
        return -picked.mean() + penalty * (offset**2).sum()

    wanted = minimize(loss, np.zeros(10), tol=1e-10).x
    np.testing.assert_allclose(outcome.models[0].offset, wanted, atol=2e-3)
    assert abs(wanted).max() > 0.1 or penalty > 0.1
    plus = run("fedmitr_plus", clients, settings, store)
    assert torch.equal(plus.synthetic.pixels, outcome.synthetic.pixels)
    assert set(outcome.seconds) == {"inversion", "calibration"} and outcome.student_steps == 0


# The student on other images.


def by_hand(images, clients, settings, method):
    """FedMITR+'s student on these images, by the teacher's predictions alone."""
    own = with_additions(settings).changed(
        {"distill.ce_weight": 0, "distill.calibrate": 0, "relabel.mode": "none"}
    )
    informed = given(method, clients, settings)
    student = student_start(informed, own)
    labels = torch.arange(len(images)) % 10  # they are not read
    synthetic = whole_images(student, images, labels)
    return fm.distill(
        student, pipeline.build_teacher(informed, own), synthetic, own.distill, own.relabel, own.seed
    )


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("method", SUBSTITUTES)
def test_the_student_learns_the_teachers_predictions_on_them_and_no_label(
    method, statistics, clients, tmp_path
):
    settings = small({"fedmitr_plus.statistics": statistics, "fedmitr_plus.start_share": 0})
    outcome = run(method, clients, settings, Store(tmp_path))
    assert equal(outcome.models[0], by_hand(outcome.synthetic.pixels, clients, settings, method))
    assert outcome.student_steps == settings.distill.steps and outcome.synthetic.mask.all()
    assert len(outcome.synthetic) == settings.inversion.images


def test_real_images_are_drawn_from_those_of_all_clients(clients, tmp_path):
    everything = torch.cat([images_of(u).images for u in clients])
    place = {image.numpy().tobytes(): k for k, image in enumerate(everything)}
    drawn = {}
    for seed in (0, 0, 1):
        outcome = run("real_images", clients, small({"seed": seed}), Store(tmp_path))
        picked = [place[image.numpy().tobytes()] for image in outcome.synthetic.pixels]
        assert len(set(picked)) == len(picked) == 6
        assert drawn.setdefault(seed, picked) == picked
    assert drawn[0] != drawn[1]


def test_where_there_are_fewer_real_images_all_are_taken(clients, tmp_path):
    outcome = run("real_images", clients, small(images=100), Store(tmp_path))
    assert len(outcome.synthetic) == sum(u.size for u in clients) < 100


def test_textures_know_nothing_of_the_clients(clients, tmp_path):
    """The seed, the number and the shape of images alone."""
    first = run("textures", clients, small(), Store(tmp_path)).synthetic.pixels
    again = run("textures", clients[:2], small({"statistics.weight": 1.0}), Store(tmp_path)).synthetic.pixels
    other = run("textures", clients, small({"seed": 1}), Store(tmp_path)).synthetic.pixels
    assert torch.equal(first, again) and not torch.equal(first, other)
    vit = fm.create_vit("vit_micro", 10, image_size=12)
    like = torch.empty(6, 1, 12, 12)
    assert torch.equal(first, random_textures(vit, like, make_rng(0, "textures")))


@pytest.mark.parametrize("method", [*SUBSTITUTES, "calibrated_ensemble", "ensemble_statistics"])
def test_they_work_under_fedmitr_plus_switches(method, clients):
    settings = small(PLAIN)
    record = METHODS[method]
    assert record.adapted(settings) == with_additions(settings) == METHODS["fedmitr_plus"].adapted(settings)
    needs = record.needs_statistics_under(settings)
    assert needs == (method == "ensemble_statistics") and not record.needs_counts_under(settings)


@pytest.mark.parametrize("method", SUBSTITUTES)
def test_their_teacher_is_seeded_and_their_models_come_back(method, clients, tmp_path):
    one, two = (run(method, clients, small(), Store(tmp_path / str(k))).models[0] for k in range(2))
    assert equal(one, two) and not one.training
