"""Gradients of single samples, all in one pass by `torch.func`.

DP-SGD clips them (`client.private`), and the theory measures their variance (`theory.gradients`). They work
for every weight, a ViT's class token and position embedding too, which hooks on layers miss.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Loss = Callable[..., Tensor]  # (model, *columns of a batch) -> the mean of the samples' losses, a scalar


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def loss_at(model: nn.Module, loss: Loss) -> Callable[..., Tensor]:
    """Return the loss as a function of the trained weights, by name, and of the columns of a batch."""
    evaluated = _Evaluated(model, loss)

    def of(weights: dict[str, Tensor], *rows: Tensor) -> Tensor:
        return functional_call(evaluated, {f"model.{name}": w for name, w in weights.items()}, rows)

    return of


def sample_losses(model: nn.Module, loss: Loss, rows: tuple[Tensor, ...]) -> Tensor:
    """Return the loss (B,) of each sample; rows: columns of B samples each."""
    weights, of = {name: w.detach() for name, w in trained(model).items()}, loss_at(model, loss)
    with torch.no_grad():
        return _over_samples(of, rows)(weights, *rows)


def sample_gradients(model: nn.Module, loss: Loss, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the gradient of the loss of each sample alone: for a weight of shape S, (B, *S).

    rows: columns of B samples each. All B gradients are held at once, each as large as the model.
    """
    weights, of = {name: w.detach() for name, w in trained(model).items()}, loss_at(model, loss)
    return _over_samples(of, rows, grad)(weights, *rows)


def _over_samples(of: Callable, rows: tuple[Tensor, ...], transform: Callable = lambda f: f) -> Callable:
    """Return a function of a batch of one sample, transformed, as a function that maps over all samples."""

    def of_one(weights: dict[str, Tensor], *row: Tensor) -> Tensor:
        return of(weights, *(column[None] for column in row))

    # randomness: dropout differs between samples, as it does in plain training
    return vmap(transform(of_one), in_dims=(None, *(0 for _ in rows)), randomness="different")


class _Evaluated(nn.Module):
    """The loss as a module, whose weights `torch.func` can replace."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *rows: Tensor) -> Tensor:
        return self.loss(self.model, *rows)
