"""The optimiser and the learning-rate schedules of everything that trains."""

import math
from functools import partial

import torch
from torch import nn

MOMENTUM = 0.9  # of SGD


def make_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Make AdamW or SGD ("sgd"); biases, norms, CLS and position embeddings are not decayed (as in DeiT)."""
    skip = {"pos_embed", "cls_token", "dist_token", "reg_token"}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if p.ndim > 1 and n not in skip], "weight_decay": weight_decay},
        {"params": [p for n, p in named if p.ndim <= 1 or n in skip], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, name: str, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make a schedule that multiplies the peak learning rate by `rate_factor`, for `steps` steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_factor, name, steps))


def rate_factor(name: str, steps: int, step: int) -> float:
    """Return the learning rate at step 0, …, steps − 1 as a share of the peak.

    `constant` is 1. `cosine` falls as (1 + cos(π step / steps)) / 2. `one_cycle` rises linearly for a tenth
    of the steps, then falls as that cosine over the rest.
    """
    if name == "constant":
        return 1.0
    rise = max(1, round(0.1 * steps)) if name == "one_cycle" else 0
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
