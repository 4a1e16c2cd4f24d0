"""What tests share beside fixtures: tiny models with large weights, and uploads made of them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from click.testing import CliRunner, Result

import fedmitr as fm
from fedmitr.cli import main
from fedmitr.core import processes
from fedmitr.data import IMAGE_SETS
from fedmitr.experiments.compare import ACCOUNT
from fedmitr.methods import METHODS, described
from fedmitr.server.inversion import invert
from fedmitr.settings import Settings
from fedmitr.settings.schema import TASKS, InversionSettings, ModelSettings
from fedmitr.upload import Features, ModelShape, Statistics
from fedmitr.vision.tokens import read_by_head
from fedmitr.vision.vit import weights_digest

CLASSES = 10
ONCE = 24_000_000  # operations of one model on one image, in `comparison_table`
TARGETS = torch.tensor([3, 0, 9, 3])  # labels of a small inversion


def loud(vit, seed: int, scale: float = 0.15):
    """A ViT with weights large enough that CLS, positions and every token tell in the output."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in vit.parameters():
            p += scale * torch.randn(p.shape, generator=rng)
    return vit.eval()


def make_upload(client: int, counts: tuple[int, ...], scale: float = 0.15, side: int = 24) -> fm.Upload:
    """An upload of a random ViT-Micro."""
    vit = loud(fm.create_vit("vit_micro", CLASSES, image_size=side), seed=100 + client, scale=scale)
    weights = {k: v.detach().clone() for k, v in vit.state_dict().items()}
    return fm.Upload(client, sum(counts), ModelShape.of("vit_micro", vit), weights, counts)


def random_features(counts: Sequence[int], width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, D), each class around a mean of its own that every seed shares, and labels (n,)."""
    means = 2 * torch.randn(len(counts), width, generator=torch.Generator().manual_seed(-1)).double()
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    noise = torch.randn(len(labels), width, generator=torch.Generator().manual_seed(seed)).double()
    return means[labels] + noise, labels


def with_statistics(
    upload: fm.Upload, tokens: str = "cls", model: ModelSettings | None = None, views: int = 0
) -> fm.Upload:
    """The same upload beside sums of random features of as many images of each class.

    model: the shared model whose features they are said to be, by default that of `Settings()`.
    """
    model = model or ModelSettings()
    shape = upload.shape.model_copy(update={"name": model.name})
    features = Features(shape=shape, weights=weights_digest(model), tokens=tokens, views=views)
    drawn, labels = random_features(upload.class_counts, features.width, seed=upload.client)
    drawn = drawn / 4  # not longer than a LayerNorm's output
    return upload.with_statistics(Statistics.of(drawn, labels, len(upload.class_counts)), features)


def statistics_alone(upload: fm.Upload) -> fm.Upload:
    """An upload's statistics without its weights and histogram: what a client sends that does not train."""
    shape = upload.features.shape
    return dataclasses.replace(upload, weights=None, class_counts=None, shape=shape)


def same(a, b) -> bool:
    """Whether two synthetic sets agree in every byte."""
    columns = ("pixels", "labels", "mask", "loss")
    return all(torch.equal(getattr(a, c), getattr(b, c)) for c in columns) and all(
        torch.equal(a.history[n], b.history[n]) for n in a.history
    )


def inversion_settings(**options) -> InversionSettings:
    """Eight iterations with two stops; views as they are, cross-entropy alone, but for these options."""
    base = dict(iterations=8, stop_at=(2, 5), stop_ratio=(0.3, 0.3), lr=0.1, betas=(0.5, 0.99))
    base |= dict(schedule="constant", ce=1.0, tv=0.0, l2=0.0, background="keep", keep_best=True)
    base |= dict(teacher="ensemble", augment=0.0, jitter=0.0, flip=False)
    return InversionSettings(**(base | options))


def inverted(teacher, seed: int = 0, labels=TARGETS, **options) -> fm.SyntheticSet:
    """A small inversion of a teacher under `inversion_settings` with these options."""
    return invert(teacher, labels, inversion_settings(**options), seed)


@contextmanager
def registrations_taken_back() -> Iterator[None]:
    """Take back the data sets and methods that are registered inside, and what workers are told."""
    told, blocks = list(processes._IN_WORKERS), set(Settings.model_fields)
    records = patch.dict(IMAGE_SETS), patch.dict(TASKS), patch.dict(METHODS)
    try:
        with records[0], records[1], records[2], patch.object(processes, "_IN_WORKERS", told):
            yield
    finally:
        for name in set(Settings.model_fields) - blocks:  # a method's block of settings
            del Settings.model_fields[name], Settings.__annotations__[name]
            delattr(Settings, name)
            Settings.model_rebuild(force=True)


def multiply_adds(vit, patches: int) -> tuple[int, int]:
    """Count by hand the multiply-adds of linear layers, and of attention, in one image's forward pass."""
    width, depth = vit.embed_dim, len(vit.blocks)
    hidden = vit.blocks[0].mlp.fc1.out_features
    length = patches + vit.num_prefix_tokens
    rows = read_by_head(vit) or length
    everywhere = length * (4 * width * width + 2 * width * hidden)
    last = length * 2 * width * width + rows * (2 * width * width + 2 * width * hidden)
    linear = (depth - 1) * everywhere + last + vit.head.weight.numel()
    linear += patches * vit.patch_embed.proj.weight.numel()
    return linear, 2 * width * length * ((depth - 1) * length + rows)


SMALL_RUN = {
    "task.test": 0.2,
    "task.validation": 0.7,
    "model.pretrained": "false",
    "client.epochs": 1,
    "inversion.images": 4,
    "inversion.batch_size": 2,
    "inversion.iterations": 3,
    "inversion.stop_at": [1],
    "inversion.stop_ratio": [0.3],
    "distill.steps": 2,
    "distill.batch_size": 4,
}
SMALL_OPTIONS = ["--profile", "smoke", "--clients", "2", "--alpha", "1.0"]
SMALL_OPTIONS += [option for name, value in SMALL_RUN.items() for option in ("--set", f"{name}={value}")]


def call_cli(*words) -> Result:
    """Run `fedmitr` with these words in this process."""
    return CliRunner().invoke(main, [str(w) for w in words])


def read_cli(*words):
    """The JSON object in the last line that `fedmitr` prints with these words."""
    done = call_cli(*words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.strip().splitlines()[-1])


GENERATORS = ("fdafl", "dense", "co_boosting", "fedftg")
SMALL_SETTINGS = {
    "task.test": 0.05,
    "task.validation": 0.85,
    "model.pretrained": False,
    "model.image_size": 12,
    "partition.clients": 2,
    "partition.alpha": 100.0,
    "client.epochs": 1,
    "ensemble.mode": "mean_probs",
    "inversion.teacher": "ensemble",  # needs no histograms
    "inversion.images": 20,
    "inversion.batch_size": 10,
    "inversion.iterations": 5,
    "inversion.stop_at": [1, 2, 3, 4],
    "inversion.stop_ratio": [0.3] * 4,
    "distill.steps": 6,
    "distill.batch_size": 8,
    "distill.views": 2,
}
SMALL_SETTINGS |= {
    f"{method}.{name}": value
    for method in GENERATORS
    for name, value in dict(rounds=2, generator_steps=2, width=4, latent=5).items()
}
SMALL_SETTINGS |= {"fdafl.batch_size": 8, "fedftg.batch_size": 8, "fadi.iterations": 5}
SMALL_SETTINGS |= {"fishermix.per_class": 30, "fishermix.epochs": 2}


def small_settings(**changes) -> fm.Settings:
    """Two clients of about ninety 12×12 images; changes by dotted name, with __ for the dot."""
    return fm.Settings.load(
        "smoke", SMALL_SETTINGS | {name.replace("__", "."): v for name, v in changes.items()}
    )


def comparison_table(methods=METHODS, seeds: int = 5) -> pd.DataFrame:
    """Runs as `compare` returns them, invented: all one-shot methods exchange the same bytes."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(seeds):
        for place, method in enumerate(methods):
            where = {"method": method, "task": "digits", "alpha": 0.1, "clients": 5, "seed": seed}
            account = dict.fromkeys(ACCOUNT, 0) | {"exchanges": 1, "upload_bytes": 6_000_000}
            account |= {"download_bytes": 0 if method == "central" else 6_000_000}
            account |= {"inference_flops": ONCE * (1 if described(method).single_model else 5)}
            times = {"client_seconds": 30.0, "server_seconds": 20.0 * place}
            rows.append(where | {"accuracy": rng.uniform(0.6, 0.9)} | account | times)
    return pd.DataFrame(rows)
