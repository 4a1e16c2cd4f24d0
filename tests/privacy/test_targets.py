"""targets.py: the scores that runs give to records."""

import pytest
import torch

import fedmitr as fm
from fedmitr import BadInput
from fedmitr.client.statistics import view_maps
from fedmitr.privacy.targets import FEW, QUERIES, TARGETS, find_target, margins
from fedmitr.vision.augment import warp


def test_a_margin_is_the_logit_of_the_labels_probability(micro, images):
    labels = torch.tensor([3, 0, 7])
    found = margins(micro, images, labels)
    assert found.shape == (3, 1 + QUERIES) and found.dtype == torch.double
    for column, view in enumerate([images, *(warp(images, m.expand(3, -1, -1)) for m in view_maps(QUERIES))]):
        p = micro(view).double().softmax(1)[torch.arange(3), labels]
        assert torch.allclose(found[:, column], (p / (1 - p)).log(), atol=1e-5)


def test_it_stays_finite_for_a_model_that_is_sure():
    class Sure(torch.nn.Module):
        patch_embed = None

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return torch.tensor([[500.0, 0.0]]).expand(len(images), 2)

    import fedmitr.privacy.targets as module

    kept, module.images_at_once = module.images_at_once, lambda model: 2
    try:
        found = margins(Sure(), torch.zeros(3, 1, 4, 4), torch.tensor([0, 1, 0]))
    finally:
        module.images_at_once = kept
    assert found[:, 0].tolist() == [500, -500, 500]


def test_reduced_targets_make_no_more_than_a_few_images():
    laptop, smoke = fm.Settings.load("laptop"), fm.Settings.load("smoke")
    few = find_target("fedmitr").settings(laptop)
    assert few.inversion.images == FEW["inversion.images"] and few.distill.steps == FEW["distill.steps"]
    assert find_target("fedmitr").settings(smoke).inversion.images == smoke.inversion.images
    assert find_target("ridge").settings(laptop) == laptop


def test_an_unknown_target_is_refused_and_every_known_one_has_a_method(one_line):
    with pytest.raises(BadInput) as error:
        find_target("weights")
    one_line(error.value, "target='weights'", "upload")
    assert all(fm.Settings.load("smoke", t.overrides, t.method) for t in TARGETS.values())
    assert len({t.label for t in TARGETS.values()}) == len(TARGETS)
