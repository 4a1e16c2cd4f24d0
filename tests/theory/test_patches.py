"""patches.py: the inversion's gradient by patch, against autograd on whole images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TARGETS, inversion_settings

from fedmitr.core.rng import make_rng
from fedmitr.server.inversion import invert
from fedmitr.theory.patches import GROUPS, PatchGradients, on_grid
from fedmitr.vision.patches import patchify


@pytest.fixture(scope="module", params=[0.0, 0.02], ids=["no regulariser", "total variation"])
def watched(request, ensemble):
    watch = PatchGradients()
    made = invert(ensemble, TARGETS, inversion_settings(tv=request.param), 0, watch=watch)
    return watch, made


def test_the_first_gradient_is_autograds_of_the_teachers_loss_alone(watched, ensemble):
    images = torch.randn((len(TARGETS), 1, 24, 24), generator=make_rng(0, "inversion")).requires_grad_()
    loss = F.nll_loss(ensemble(images), TARGETS, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)
    by_hand = patchify(gradient, (4, 4)).norm(dim=2)
    assert torch.allclose(watched[0].norms[0], by_hand, rtol=1e-3, atol=1e-6)
    assert watched[0].agreement[0].isnan().all()  # there is no iteration before


def test_stopped_patches_have_no_gradient_and_survivors_always_one(watched):
    watch, made = watched
    left = [int((~norm[0].isnan()).sum()) for norm in watch.norms]
    assert left == [36, 36, 25, 25, 25, 18, 18, 18]
    assert (~watch.norms[-1].isnan()).equal(made.mask)
    for same in watch.agreement[1:]:
        assert (
            not same[made.mask].isnan().any() and same[made.mask].ge(0).all() and same[made.mask].le(1).all()
        )


def test_curves_are_means_over_the_groups(watched):
    watch, made = watched
    rows = watch.curves(made.mask)
    assert [(r["iteration"], r["patches"]) for r in rows] == [(i, g) for i in range(8) for g in GROUPS]
    survive, stop = rows[2 * 3], rows[2 * 3 + 1]
    assert np.isclose(survive["norm"], watch.norms[3][made.mask].mean().item())
    assert np.isclose(stop["norm"], np.nanmean(watch.norms[3][~made.mask].numpy()))
    assert survive["count"] == 4 * 18 and stop["count"] == 4 * 7
    assert rows[-1]["count"] == 0 and np.isnan(rows[-1]["norm"])


def test_watching_changes_nothing(watched, ensemble):
    settings = inversion_settings(tv=0.0)
    plain, seen = invert(ensemble, TARGETS, settings, 0), PatchGradients()
    again = invert(ensemble, TARGETS, settings, 0, watch=seen)
    assert plain.pixels.equal(again.pixels) and plain.mask.equal(again.mask)


def test_signs_agree_where_they_stay(watched):
    watch = PatchGradients()

    class Live:
        image, keep = torch.zeros(1, 8), torch.tensor([[0, 1]])
        patches = torch.zeros(1, 2, 4)

        class grid:
            patches = 3

        @staticmethod
        def gradient(_):
            return torch.zeros(1, 8)

    for values in ([1, 1, 1, 1, 1, 1, 1, 1], [1, 2, -1, -1, 3, 1, 1, 1]):
        watch(Live, type("Loss", (), {"gradient": torch.tensor([values], dtype=torch.float)}))
    assert watch.agreement[1][0, :2].tolist() == [0.5, 1.0] and watch.agreement[1][0, 2].isnan()


def test_values_lie_where_their_patches_do():
    grid = on_grid(torch.ones(2, 1, 3), torch.tensor([[1], [0]]), 2)
    assert grid[0, 1].eq(1).all() and grid[1, 0].eq(1).all()
    assert grid[0, 0].isnan().all() and grid[1, 1].isnan().all()
