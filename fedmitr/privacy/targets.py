"""What is attacked, and the scores that each run gives to the audited records.

A target is something that a party sees: an upload, sums of features, synthetic images, a model. Scores are
φ (n, Q) of n records and Q queries each, as `membership` takes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..client.statistics import view_maps
from ..core.errors import BadInput
from ..core.machine import device
from ..core.store import fingerprint, read_tensors, write_tensors
from ..data.tasks import Split
from ..methods import find
from ..settings import Settings
from ..upload import Features
from ..vision.augment import warp
from ..vision.tokens import images_at_once
from .shadows import ShadowRun
from .sums import believed, log_leverage, trace_score, view_features

Part = Literal["start", "upload", "class sums", "Gram matrix", "images", "model"]
QUERIES = 2  # moved copies of an image that a model is asked about, beside the image itself
FEW = {"inversion.images": 100, "inversion.batch_size": 100, "distill.steps": 100}  # at most
OVERFITTED = {"client.epochs": 40, "client.augment": 0.0, "client.weight_decay": 0.0}


@dataclass(frozen=True)
class Target:
    """One thing to attack.

    label: as tables and figures name it. seen_by: who sees it. part: what of it is attacked. method: what
    makes it, under its own settings with `overrides`; reduced: with `FEW` images and steps at most. half: on
    the first half of the runs.
    """

    label: str
    seen_by: str
    part: Part
    method: str = "fedavg"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    reduced: bool = False
    half: bool = False

    def settings(self, given: Settings) -> Settings:
        """Return the settings that it is made under, from those of its method."""
        if not self.reduced:
            return given
        values = {"inversion": given.inversion, "distill": given.distill}
        least = {n: min(v, getattr(values[n.split(".")[0]], n.split(".")[1])) for n, v in FEW.items()}
        return given.changed(least)


SERVER, ANYONE = "server", "whoever has the model"
SHARED = "server, and with whom it shares them"
TARGETS: dict[str, Target] = {
    "untrained": Target("the start, not trained", "control", "start"),
    "overfitted": Target("an overfitted upload", "control", "upload", overrides=OVERFITTED, half=True),
    "upload": Target("upload", SERVER, "upload"),
    "class_sums": Target("sums by class", SERVER, "class sums", "ridge"),
    "gram": Target("Gram matrix", SERVER, "Gram matrix", "ridge"),
    "class_sums_plus": Target("sums by class, ridge+", SERVER, "class sums", "ridge_plus"),
    "gram_plus": Target("Gram matrix, ridge+", SERVER, "Gram matrix", "ridge_plus"),
    "ensemble": Target("ensemble", ANYONE, "model", "ensemble", {"ensemble.precision": "fp32"}),
    "fedavg": Target("FedAvg", ANYONE, "model", "fedavg"),
    "ridge": Target("ridge", ANYONE, "model", "ridge"),
    "ridge_plus": Target("ridge+", ANYONE, "model", "ridge_plus"),
    "images": Target("FedMITR's images", SHARED, "images", "fedmitr", reduced=True, half=True),
    "fedmitr": Target("FedMITR", ANYONE, "model", "fedmitr", reduced=True, half=True),
    "images_plus": Target("FedMITR+'s images", SHARED, "images", "fedmitr_plus", reduced=True, half=True),
    "fedmitr_plus": Target("FedMITR+", ANYONE, "model", "fedmitr_plus", reduced=True, half=True),
}


def find_target(name: str) -> Target:
    """Return a target by its name; BadInput for an unknown one."""
    if name not in TARGETS:
        raise BadInput(f"target={name!r} is unknown: allowed are {', '.join(TARGETS)}")
    return TARGETS[name]


def observe(run: ShadowRun, target: Target, others: Split) -> dict[str, Tensor]:
    """Score the audited records of a run: `records` (n, Q) and, for networks, `population` (m, Q).

    others: images that no run was trained on, with their labels. Of a model a score is `margins`; of class
    sums `trace_score`, with beliefs from `others`; of a Gram matrix −`log_leverage`; of synthetic images
    `closeness`. Scores of ridge regression are no probabilities, so RMIA, which compares probabilities with
    those of a population, has nothing to go by there.
    """
    records = audited(run)
    if target.part in ("class sums", "Gram matrix"):
        return {"records": _sum_scores(run, target, records, others)[:, None]}
    if target.part == "images":
        pixels = run.outcome(target.method).synthetic.pixels.cpu()
        return {"records": closeness(run, pixels, records.images[:])}
    if target.part == "start":
        model: nn.Module = run.initial
    elif target.part == "upload":
        model = run.train(run.records.client).vit().to(device())
    else:
        model = run.outcome(target.method).models[0]
    asked = {"records": records}
    if target.part != "model" or find(target.method).family != "statistics":
        asked["population"] = others
    return {name: margins(model, split.images[:], split.labels) for name, split in asked.items()}


def audited(run: ShadowRun) -> Split:
    """Return the audited images with the labels that the client has them under."""
    return run.task.train.subset(run.records.rows)


@torch.inference_mode()
def margins(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Compute φ = log p_y − log(1 − p_y) (n, 1 + `QUERIES`) of each image and its moved copies, float64.

    It is z_y − log Σ_{j≠y} exp z_j for logits and log-probabilities alike, finite however sure the model is.
    For a head of least squares, whose scores are no probabilities, it is a margin all the same.
    """
    model, columns = model.eval(), []
    at = next((p.device for p in model.parameters()), device())
    maps = view_maps(QUERIES)
    for batch, own in zip(*(t.split(images_at_once(model)) for t in (images, labels)), strict=True):
        batch = batch.to(at)
        shown = [batch, *(warp(batch, m.expand(len(batch), -1, -1)) for m in maps)]
        logits = torch.stack([model(view).double().cpu() for view in shown], dim=1)  # (B, 1 + V, C)
        own = own[:, None, None].expand(-1, len(shown), 1)
        rest = logits.scatter(2, own, -torch.inf).logsumexp(2)
        columns.append(logits.gather(2, own)[..., 0] - rest)
    return torch.cat(columns)


def closeness(run: ShadowRun, made: Tensor, images: Tensor) -> Tensor:
    """Compute −log of the distance (n, 2) from each image to the nearest made one: in pixels, in features.

    Images that were made from a client that held x may lie nearer to x (GAN-Leaks, Chen et al., CCS 2020).
    """
    feature = [_features(run.initial, one) for one in (images, made)]
    spaces = [(images.flatten(1).double(), made.flatten(1).double()), feature]
    nearest = [torch.cdist(a, b).min(dim=1).values for a, b in spaces]
    return -torch.stack(nearest, dim=1).clamp(min=1e-12).log()


def _features(vit: nn.Module, images: Tensor) -> Tensor:
    empty = torch.zeros(len(images), dtype=torch.long)
    return view_features(vit, Split(images, empty), "both")[:, 0]


def _sum_scores(run: ShadowRun, target: Target, records: Split, others: Split) -> Tensor:
    """Score the records (n,) by the sums that the audited client sends for the target's method."""
    sent = run.upload_for(find(target.method), run.records.client)
    known = _known_features(run, sent.features, records, others)
    if target.part == "Gram matrix":
        return -log_leverage(sent.statistics.gram, known["records"])
    own, other = known["records"].mean(1), known["others"].mean(1)
    beliefs = believed(other, others.labels, run.initial.num_classes)
    return trace_score(sent.statistics, own, records.labels, *beliefs)


def _known_features(run: ShadowRun, features: Features, records: Split, others: Split) -> dict[str, Tensor]:
    """Return the features of records and others (·, 1 + V, D), which all runs share, from the store."""
    told = [run.settings.seed, run.settings.task.model_dump(), run.task.digest, features.model_dump_json()]
    told += [run.records.rows.tolist(), len(others)]
    parts = {"records": records, "others": others}
    return run.store.get(
        "audit-features",
        fingerprint("audit features", told),
        read=lambda folder: read_tensors(folder / "features.safetensors"),
        make=lambda: {
            name: view_features(run.initial, split, features.tokens, features.views)
            for name, split in parts.items()
        },
        write=lambda made, folder: write_tensors(made, folder / "features.safetensors"),
    )
