"""Small runs of all methods: what each is given; two rounds, six images, three student steps."""

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from helpers import statistics_alone, with_statistics

from fedmitr.client.statistics import StatisticsClient
from fedmitr.core.rng import make_rng
from fedmitr.core.store import Store
from fedmitr.data.tasks import Split
from fedmitr.methods import METHODS, Outcome
from fedmitr.methods._generator import GeneratorSettings
from fedmitr.methods._student import StudentSettings
from fedmitr.settings import Settings
from fedmitr.upload import Upload
from fedmitr.vision.stages import stage_names


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
        "fishermix.per_class": 20,
        "fishermix.epochs": 2,
    }
    for name in GENERATORS:
        base |= own(name, rounds=2, generator_steps=2, width=4, latent=5)
    return Settings().changed(base | dict(changes or {}))


def own(method: str, **options: Any) -> dict[str, Any]:
    """Dotted names of a method's own block."""
    return {f"{method}.{name}": value for name, value in options.items()}


class Trained:
    """A client of FuseFL that has trained all stages already: its upload's weights."""

    def __init__(self, upload: Upload) -> None:
        self.client, self.size, self.class_counts = upload.client, upload.size, upload.class_counts
        self.shape, self.vit = upload.shape, upload.vit()

    def train_stage(self, stage, received):
        state = self.vit.state_dict()
        return {name: state[name] for name in stage_names(self.vit, 2, stage)}


def images_of(upload: Upload) -> Split:
    """Random images of a client, as many of each class as its upload says."""
    counts, side = torch.tensor(upload.class_counts), upload.shape.image_size
    pixels = torch.randn(upload.size, upload.shape.in_chans, side, side, generator=make_rng(upload.client))
    return Split(pixels, torch.arange(len(counts)).repeat_interleave(counts))


def given(
    method: str, uploads: Sequence[Upload], settings: Settings | None = None, counted: bool = True
) -> list[Any]:
    """What a method is given, made of uploads with histograms, which `counted` = False takes away.

    They carry statistics where the method needs some, and no weights where it needs none.
    """
    record, settings, sent = METHODS[method], settings or small(), uploads
    if record.needs_statistics_under(settings):
        own = record.adapted(settings).statistics
        sent = [with_statistics(u, own.tokens, settings.model, own.views) for u in sent]
    if not counted:
        sent = [u.without_counts() for u in sent]
    if not record.needs_weights:
        sent = [statistics_alone(u) for u in sent]
    if record.given == "clients":
        shards, shared = map(images_of, uploads), uploads[0].vit()
        return [StatisticsClient(u, shared, shard) for u, shard in zip(sent, shards, strict=True)]
    if record.given == "stages":
        return list(map(Trained, sent))
    return list(sent[:1] if record.given == "central" else sent)


def run(
    method: str, uploads: Sequence[Upload], settings: Settings, store: Store, counted: bool = True
) -> Outcome:
    """A method's outcome on what it is given of these uploads."""
    more = [torch.cat([images_of(u).images for u in uploads])] if METHODS[method].given == "images" else []
    return METHODS[method](given(method, uploads, settings, counted), settings, store, *more)


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
