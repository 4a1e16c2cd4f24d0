"""Small runs of the methods that distil: two rounds, six images, three student steps."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from fedmitr.core.rng import make_rng
from fedmitr.methods import METHODS
from fedmitr.methods._generator import GeneratorSettings
from fedmitr.methods._student import StudentSettings
from fedmitr.settings import Settings


def _with(block: type) -> tuple[str, ...]:
    return tuple(n for n, m in METHODS.items() if m.settings and issubclass(m.settings, block))


DISTILLED, GENERATORS = _with(StudentSettings), _with(GeneratorSettings)


def small(changes: Mapping[str, Any] | None = None, images: int = 6, steps: int = 3) -> Settings:
    """Settings of a small run, with other values of some dotted names."""
    base = {
        "inversion.images": images,
        "inversion.batch_size": 3,
        "inversion.iterations": 2,
        "inversion.stop_at": (),
        "inversion.stop_ratio": (),
        "distill.steps": steps,
        "distill.batch_size": 4,
        "distill.views": 1,
        "distill.augment": 0.0,
        "fadi.iterations": 2,
        "fdafl.batch_size": 4,
        "fedftg.batch_size": 4,
    }
    for name in GENERATORS:
        base |= own(name, rounds=2, generator_steps=2, width=4, latent=5)
    return Settings().changed(base | dict(changes or {}))


def own(method: str, **options: Any) -> dict[str, Any]:
    """Dotted names of a method's own block."""
    return {f"{method}.{name}": value for name, value in options.items()}


def module_of(method: str) -> ModuleType:
    """The file of a method."""
    return importlib.import_module(f"fedmitr.methods.{method}")


def loop_of(method: str) -> ModuleType:
    """The module that makes a method's student."""
    return module_of("_generator" if method in GENERATORS else method)


def copy_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: torch.nn.Module, before: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=make_rng(seed)).double()


TINY = {
    "inversion.images": 6,
    "inversion.batch_size": 3,
    "inversion.iterations": 3,
    "inversion.stop_at": [1],
    "inversion.stop_ratio": [0.5],
    "distill.steps": 2,
    "distill.views": 1,
    "distill.batch_size": 4,
}


def tiny(**changes: Any) -> Settings:
    """Settings of a tiny run of FedMITR; tiny(distill__group=2) changes distill.group."""
    return Settings.load("smoke", TINY | {name.replace("__", "."): value for name, value in changes.items()})
