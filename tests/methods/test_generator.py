"""_generator.py: the network, its images, and the rounds that four methods share."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr, softmax
from timm.models.vision_transformer import VisionTransformer
from tiny_runs import GENERATORS, module_of, own, randn, small, unchanged
from torch.distributions import Categorical, kl_divergence

import fedmitr.methods._generator as module
from fedmitr.core.rng import make_rng
from fedmitr.core.store import Store
from fedmitr.methods import METHODS
from fedmitr.methods._generator import Generator, GeneratorSettings, budget, divergence, learned_batch, noise
from fedmitr.methods._student import Student
from fedmitr.methods.dense import DenseSettings
from fedmitr.settings import Settings
from fedmitr.settings.schema import DistillSettings, InversionSettings

NARROW = dict(width=4, latent=5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_is_torchs_and_scipys_kl_from_teacher_to_student(temperature):
    teacher, student = randn(4, 6), randn(4, 6, seed=1)
    found = divergence(teacher, student.log_softmax(-1), temperature)
    wanted = temperature**2 * kl_divergence(
        Categorical(logits=teacher / temperature), Categorical(logits=student / temperature)
    )
    torch.testing.assert_close(found, wanted)
    p, q = (softmax(x.numpy() / temperature, axis=1) for x in (teacher, student))
    np.testing.assert_allclose(found, temperature**2 * rel_entr(p, q).sum(1))
    torch.testing.assert_close(divergence(student, student + 3), torch.zeros(4).double(), atol=1e-12, rtol=0)


def test_the_budget_is_everyones_or_the_methods_own():
    equal = Settings(inversion=InversionSettings(images=6), distill=DistillSettings(steps=3))
    own = DenseSettings(images=11, student_steps=13)
    assert budget(equal, own) == (6, 3)
    assert budget(equal.changed({"budget": "own"}), own) == (11, 13)


# The generator.


def vit_of(side, channels, patch):
    sizes = dict(img_size=side, patch_size=patch, in_chans=channels)
    vit = VisionTransformer(**sizes, num_classes=10, embed_dim=12, depth=1, num_heads=2)
    vit.pretrained_cfg = {"mean": (0.2, 0.5, 0.7)[:channels], "std": (0.1, 0.25, 0.4)[:channels]}
    return vit


@pytest.mark.parametrize("form, conditional", [("dense", False), ("dafl", False), ("dafl", True)])
@pytest.mark.parametrize(
    "side, channels, patch",
    [(24, 1, 4), (32, 3, 4), (8, 1, 4), (4, 1, 4), (36, 1, 4), (25, 2, 5), ((24, 32), 3, 4), ((8, 20), 1, 4)],
    ids=str,
)
def test_generated_images_fit_the_model(side, channels, patch, form, conditional):
    vit = vit_of(side, channels, patch)
    generator = Generator(vit, GeneratorSettings(**NARROW), make_rng(0), form, conditional)
    images = generator(20 * randn(3, 5).float(), torch.tensor([0, 9, 4]) if conditional else None)
    assert images.shape == (3, channels, *(side if isinstance(side, tuple) else (side, side)))
    assert vit(images).shape == (3, 10)
    if form == "dense":  # brightness, normalised as for the model
        mean, std = (torch.tensor(vit.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
        brightness = images * std + mean
        assert brightness.min() > -1e-6 and brightness.max() < 1 + 1e-6
    else:  # standardised, channel by channel
        pixels = images.transpose(0, 1).flatten(1)
        torch.testing.assert_close(pixels.mean(1), torch.zeros(channels), atol=1e-5, rtol=0)
        torch.testing.assert_close(pixels.std(1, correction=0), torch.ones(channels), atol=0.1, rtol=0)


def layers_of(form):
    vit = vit_of(32, 3, 4)
    generator = Generator(vit, GeneratorSettings(width=16, latent=50), make_rng(0), form)
    return [m for m in generator.modules() if getattr(m, "weight", None) is not None]


def test_weights_start_as_in_the_code_of_dense_and_co_boosting():
    """Those of linear layers and convolutions from N(0, 0.02²), scales from N(1, 0.02²), biases zero."""
    layers = layers_of("dense")
    assert {type(m).__name__ for m in layers} == {"Linear", "Conv2d", "BatchNorm2d"}
    for layer in layers:
        centre = 1.0 if isinstance(layer, torch.nn.BatchNorm2d) else 0.0
        count = layer.weight.numel()
        assert layer.weight.mean().item() == pytest.approx(centre, abs=4 * 0.02 / count**0.5)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=4 / (2 * count) ** 0.5)
        assert layer.bias is None or not layer.bias.any()


def test_weights_start_as_in_the_code_of_dafl_and_fedftg():
    """Torch's defaults: uniform below 1/√inputs; scales are 1."""
    for layer in layers_of("dafl"):
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert (layer.weight == 1).all()
        else:
            bound = layer.weight[0].numel() ** -0.5
            assert 0.95 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_label_count_alike_in_a_conditional_generator(micro, seed):
    """Each has half of the coarse map's channels, so that after batch normalisation both vary as much."""
    generator = Generator(micro, GeneratorSettings(width=8), make_rng(seed), "dafl", conditional=True)
    coarse = []
    generator.body[0].register_forward_hook(lambda layer, given, made: coarse.append(made))
    z, labels = randn(200, 100, seed=seed).float(), torch.arange(200) % 10
    generator(z, labels), generator(z.flip(0), labels)
    same_label, other_noise = (coarse[0] - coarse[1]).square().mean((0, 2, 3)).split(8)[::-1]
    assert same_label.max() < 1e-6 and (other_noise - 2).abs().max() < 0.5  # twice the variance, which is 1
    torch.testing.assert_close(coarse[0].var((0, 2, 3)), torch.ones(16), atol=0.05, rtol=0)


def test_a_seed_fixes_the_generator_and_torchs_own_random_state_is_left_alone(micro):
    settings, state = GeneratorSettings(**NARROW), torch.get_rng_state()
    one, again, other = (Generator(micro, settings, make_rng(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert unchanged(again, one.state_dict()) and not unchanged(other, one.state_dict())
    rng = make_rng(1)
    first, second = (Generator(micro, settings, rng).start.weight for _ in range(2))
    assert not torch.equal(first, second)


def test_a_conditional_generator_makes_other_images_for_another_class(micro):
    generator = Generator(micro, GeneratorSettings(**NARROW), make_rng(0), "dafl", conditional=True).eval()
    z = randn(1, 5).float().expand(2, -1)
    assert torch.allclose(*generator(z, torch.tensor([3, 3])), atol=1e-5)
    assert not torch.allclose(*generator(z, torch.tensor([3, 4])), atol=1e-3)


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


@pytest.mark.parametrize("method", GENERATORS)
def test_dense_and_co_boosting_start_a_generator_every_round_the_others_keep_theirs(
    method, clients, tmp_path, recorded
):
    anew = method in ("dense", "co_boosting")
    made = recorded(module if anew else module_of(method), "Generator")
    METHODS[method](clients[:2], small(own(method, rounds=3)), Store(tmp_path))
    assert len(made) == (3 if anew else 1)
    assert len({m.start.weight.detach().numpy().tobytes() for m in made}) == len(made)
    assert all((m.classes == 10) == (method == "fedftg") for m in made)


@pytest.mark.parametrize("method", GENERATORS)
def test_rounds_share_images_and_steps(method, clients, tmp_path, monkeypatch):
    rounds = []
    monkeypatch.setattr(
        Student, "learn", lambda self, steps, teacher, bar: rounds.append((len(self.pool()[0]), steps))
    )
    METHODS[method](clients[:2], small(own(method, rounds=3), 7, 5), Store(tmp_path))
    METHODS[method](clients[:2], small(own(method, rounds=3), 2, 5), Store(tmp_path))
    # 2, 4 and 7 images, then all 7 again: 2/20, 4/20 and 14/20 of the steps; two images: two rounds
    assert rounds == [(2, 0), (4, 1), (7, 4), (1, 1), (2, 4)]


@pytest.mark.parametrize("method", GENERATORS)
def test_the_generators_loss_falls(method, clients, tmp_path, recorded):
    losses = recorded(module_of(method), "generator_loss")
    options = dict(rounds=1, generator_steps=20, lr=1e-2, width=8)
    if method == "fdafl":  # a batch's class entropy is at its most from the start
        options |= dict(entropy=0.0, batch_size=16)
    METHODS[method](clients[:2], small(own(method, **options), steps=1), Store(tmp_path))
    values = torch.stack(losses).detach().view(20, -1).mean(1)  # FedFTG: one for each client
    assert values[-5:].mean() < values[:5].mean() - 0.05


@pytest.mark.parametrize("method", ["dense", "co_boosting"])
def test_images_are_made_for_all_classes_equally_often(method, clients, tmp_path):
    made = METHODS[method](clients[:2], small(images=24, steps=1), Store(tmp_path)).synthetic
    assert torch.bincount(made.labels).tolist() == [4] * 6  # the other classes are nobody's
