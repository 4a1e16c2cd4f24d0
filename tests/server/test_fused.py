"""fused.py: members fused stage by stage, against one of them, timm's own modules and the ensemble."""

import copy

import pytest
import torch
from fusion_clients import MODES, several
from helpers import loud

import fedmitr as fm
from fedmitr.server.ensemble import client_weights
from fedmitr.server.fused import Fused
from fedmitr.settings.schema import EnsembleSettings, FuseflSettings


@pytest.mark.parametrize("adaptor", ["average", "linear"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_identical_members_are_one_of_them(micro, images, stages, adaptor):
    members = [copy.deepcopy(micro) for _ in range(3)]
    fused = Fused(members, FuseflSettings(stages=stages, adaptor=adaptor))
    torch.testing.assert_close(fused(images), micro(images).log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_linear_adaptor_starts_as_the_average(images, stages):
    made = [Fused(several(3), FuseflSettings(stages=stages, adaptor=a)) for a in ("average", "linear")]
    torch.testing.assert_close(made[0](images), made[1](images), rtol=1e-4, atol=1e-4)
    assert len(made[0].adaptors) == 0 and len(made[1].adaptors) == stages - 1


@pytest.mark.parametrize("adaptor", ["average", "linear"])
def test_two_members_by_hand(images, adaptor):
    """timm's own modules one by one: half the blocks each, the tokens fused, the other halves."""
    members, weights = several(2), torch.full((2, 1), 0.5)
    fused = Fused(members, FuseflSettings(stages=2, adaptor=adaptor), weights, "mean_probs")
    with torch.no_grad():
        halves = [m.blocks[:2](m._pos_embed(m.patch_embed(images))) for m in members]
        tokens = (halves[0] + halves[1]) / 2
        if adaptor == "linear":
            loud(fused.adaptors[0], seed=3)
            tokens = torch.cat(halves, dim=-1) @ fused.adaptors[0].weight.T + fused.adaptors[0].bias
        logits = [m.forward_head(m.norm(m.blocks[2:](tokens))) for m in members]
    wanted = (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2
    torch.testing.assert_close(fused(images).exp(), wanted, rtol=1e-4, atol=1e-5)
    alone = sum(m(images).softmax(-1) for m in members) / 2
    assert not torch.allclose(wanted, alone, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_one_stage_is_the_ensemble(uploads, images, mode):
    fused = Fused([u.vit() for u in uploads], FuseflSettings(stages=1), client_weights(uploads, mode), mode)
    wanted = fm.Ensemble(uploads, EnsembleSettings(mode=mode))(images)
    torch.testing.assert_close(fused(images), wanted, rtol=1e-4, atol=1e-4)
