"""flops.py against an independent count, the counter of torch, and each other."""

import pytest
import torch
from helpers import multiply_adds
from torch.utils.flop_counter import FlopCounterMode

import fedmitr as fm
from fedmitr.evaluation.bench import random_uploads
from fedmitr.evaluation.flops import forward_flops, image_flops, inference_flops, one_pass
from fedmitr.settings.schema import EnsembleSettings
from fedmitr.vision.tokens import kept_patches, patch_features


@pytest.mark.parametrize("model, size", [("vit_micro", 24), ("vit_micro", 68), ("deit_tiny_patch16_224", 64)])
def test_operations_are_those_of_an_independent_count(model, size):
    """A linear layer costs its forward again for the gradient of its input, a product twice."""
    uploads = random_uploads(model, size, 2)
    ensemble = fm.Ensemble(uploads, EnsembleSettings(mode="mean_logits"))
    vit = ensemble.members[0]
    for patches in (vit.patch_embed.num_patches, 5):  # 289 of them are too long for our own attention
        linear, attention = multiply_adds(vit, patches)
        assert forward_flops(vit, patches) == 2 * (linear + attention - vit.head.weight.numel())
        assert image_flops(ensemble, patches) == 2 * 2 * (2 * linear + 3 * attention)


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


@pytest.fixture(scope="module")
def vit():
    return fm.create_vit("vit_micro", 10).to("meta")


@pytest.mark.parametrize("name", ["vit_micro", "deit_tiny_patch16_224"])
def test_a_forward_pass_costs_what_the_closed_form_says(name):
    real = fm.create_vit(name, 10)
    for patches in (5, real.patch_embed.num_patches):
        forward = one_pass(real.to("meta"), patches)
        assert forward.flops == pytest.approx(forward_flops(real, patches), rel=1e-3) and forward.kept == 0


def test_the_gradient_of_an_image_costs_what_it_costs_on_the_cpu(vit):
    ensemble = fm.Ensemble(random_uploads("vit_micro", None, 1), EnsembleSettings(mode="mean_logits"))
    for patches in (6, 36):
        assert one_pass(vit, patches, "image").flops == pytest.approx(
            image_flops(ensemble, patches), rel=1e-3
        )


def test_gradients_keep_activations_and_those_of_weights_more(vit):
    image, weights = (one_pass(vit, 36, wanted) for wanted in ("image", "weights"))
    tokens = 4 * 37 * 96  # bytes of all tokens once
    assert 4 * tokens < image.kept < weights.kept
    assert one_pass(vit, 18, "image").kept < image.kept
