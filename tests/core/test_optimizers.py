"""optimizers.py: what is decayed, and the learning rate over the steps."""

import math

import pytest
import torch

import fedmitr as fm
from fedmitr.core.optimizers import make_optimizer, make_schedule


def test_only_matrices_are_decayed():
    vit = fm.create_vit("vit_micro", 10)
    names = {id(p): n for n, p in vit.named_parameters()}
    groups = make_optimizer(vit, "adamw", 1e-3, 0.3).param_groups
    decayed = {names[id(p)] for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    spared = {names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert {"pos_embed", "cls_token", "head.bias", "norm.weight"} <= spared
    assert {"head.weight", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decayed


def rates(name, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule, found = make_schedule(optimizer, name, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        schedule.step()
    return found


def test_schedules_rise_and_fall_as_they_say():
    assert rates("constant", 5) == [1.0] * 5
    cosine = rates("cosine", 10)
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])
    cycle = rates("one_cycle", 100)
    assert cycle[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert cycle[10:] == sorted(cycle[10:], reverse=True) and 0 < cycle[-1] < 0.001


@pytest.mark.parametrize("name", ["one_cycle", "cosine", "constant"])
def test_schedules_of_one_step_move(name):
    assert rates(name, 1)[0] > 0
