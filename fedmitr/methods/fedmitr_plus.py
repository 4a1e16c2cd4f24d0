"""FedMITR+: FedMITR with our additions, each a switch of its own; with all of them off it is FedMITR.

- Statistics: clients also send sums of features of the shared model. The teacher becomes log A(x) + β·r(x);
  r are the scores of ridge regression, the same as if all images lay in one place (ridge.py). They put all
  classes on one scale, which clients that trained apart do not.
- Regions: these sums are of CLS and the mean of each quarter of the image, after each of the last two blocks.
- Views: they are averaged over each image and moved copies of it.
- Closed form: the student starts as the shared model with β times ridge's head, and ends halfway back to it
  (start_share).
- Whole images: the student learns the teacher's labels of whole images alone. Labels of patch tokens, the
  ensemble's, move it away from where it started.
- Owners: each image is inverted from one client that holds its class, and not from the ensemble, most of
  whose members never saw that class.
- Class weights: a client counts for a class as much as it holds of it.
- Affine views: images are scaled, turned and shifted as they are optimised, and not shifted alone.

Off by default, for students that start from the clients' average:

- Textures: what surrounds the surviving patches is new in each view.
- Offsets: one number a class is added to the teacher's log-probabilities, fitted to the images' labels.
- Label cross-entropy: the label that an image was made for enters the student's loss.
- Half-soft survivors: a surviving patch's label is half the image's label and half the ensemble's own.

What each is worth: notebook 06. Without the sums, regions, views and closed form have
no effect.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..core.store import Store
from ..settings import Settings, SettingsBlock
from ..settings.schema import NotNegative, Positive, Share, setting
from ..upload import Upload
from ._method import Method, Outcome, Range
from ._student import student_start
from .fedmitr import SEARCH, fedmitr, fedmitr_work
from .ridge import SEARCH as RIDGE


class FedmitrPlusSettings(SettingsBlock):
    """FedMITR+: the additions to FedMITR."""

    statistics: bool = setting(True, "clients send sums of features; ridge scores join the teacher")
    regions: bool = setting(True, "the features are those of regions (statistics.tokens=regions)")
    views: int = setting(
        8, "moved copies of each image that count in the sums; 0: as statistics.views says", ge=0, le=100
    )
    closed_form: bool = setting(True, "start the student at the closed form (distill.start=statistics)")
    student_lr: Positive = setting(1e-4, "peak learning rate of a student that starts at the closed form")
    start_share: Share = setting(
        0.5,
        "share of the closed form's weights in the finished student that started there; 0: none",
        "WiSE-FT",
    )
    whole_images: bool = setting(True, "patch tokens have no labels (relabel.mode=none)")
    owners: bool = setting(True, "invert for each image one client that holds its class, not the ensemble")
    class_weights: bool = setting(True, "weight clients by their class counts c_k (ensemble.mode=class)")
    affine: Share = setting(0.7, "strength of affine views in inversion; 0: jitter alone")
    textures: bool = setting(False, "show new texture in place of stopped patches in each view")
    offsets: NotNegative = setting(0.0, "penalty λ of the class offsets fitted to the labels; 0: none")
    label_ce: NotNegative = setting(0.0, "weight of the cross-entropy of CLS to the images' labels")
    half_soft: Share = setting(0.0, "share of the soft label in the label of a surviving patch")


# Switch -> the setting that it changes, and what to; None: to the switch's own value.
CHANGES = {
    "statistics": ("ensemble.anchor", True),
    "regions": ("statistics.tokens", "regions"),
    "views": ("statistics.views", None),
    "whole_images": ("relabel.mode", "none"),
    "owners": ("inversion.teacher", "owners"),
    "class_weights": ("ensemble.mode", "class"),
    "affine": ("inversion.augment", None),
    "textures": ("distill.background", "texture"),
    "offsets": ("distill.calibrate", None),
    "label_ce": ("distill.ce_weight", None),
    "half_soft": ("relabel.foreground_soft", None),
}


def with_additions(settings: Settings) -> Settings:
    """Return the settings under which FedMITR's functions run: those of the run, and what is switched on."""
    own, on = settings.fedmitr_plus, dict[str, Any]()
    for switch, (name, value) in CHANGES.items():
        if chosen := getattr(own, switch):
            on[name] = chosen if value is None else value
    if own.statistics and own.closed_form:
        on |= {"distill.start": "statistics", "distill.lr": own.student_lr}
        on["relabel.head"] = "shared"  # a linear layer on features of the image has no other for patches
    return settings.changed(on)


def fedmitr_plus(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn uploads into one global model, as `fedmitr` does under `with_additions`."""
    return towards_start(fedmitr(uploads, settings, store), uploads, settings)


@torch.no_grad()
def towards_start(outcome: Outcome, uploads: Sequence[Upload], settings: Settings) -> Outcome:
    """Average the weights of a student that started at the closed form with those of its start.

        w = s·w_start + (1 − s)·w_trained,   s = `start_share`

    Between two such models accuracy is often above that of either (WiSE-FT, Wortsman et al., CVPR 2022).
    Here it wins back what training lost (docs/lab-notebook.md, block 15).
    Changes the outcome's model in place.
    """
    share = settings.fedmitr_plus.start_share
    if share and settings.distill.start == "statistics":
        start = student_start(uploads, settings).state_dict()
        for name, value in outcome.models[0].state_dict().items():
            value.lerp_(start[name], share)
    return outcome


SUMS = {  # what tuning may try for the sums and the head that solves them, here and in ridge_plus.py
    "fedmitr_plus.regions": (False, True),
    "fedmitr_plus.views": (0, 2, 4, 8),
    "statistics.ridge": RIDGE["statistics.ridge"],
}

METHOD = Method(
    name="fedmitr_plus",
    run=fedmitr_plus,
    label="FedMITR+",
    citation="ours, on FedMITR",
    settings=FedmitrPlusSettings,
    search={
        **SUMS,
        "statistics.weight": Range(1.0, 30.0, log=True),
        **{name: SEARCH[name] for name in ("inversion.tv", "inversion.lr", "distill.temperature")},
        "fedmitr_plus.student_lr": Range(1e-5, 1e-3, log=True),
        "fedmitr_plus.start_share": (0.0, 0.25, 0.5, 0.75),
        "fedmitr_plus.owners": (False, True),
        "fedmitr_plus.class_weights": (False, True),
        "fedmitr_plus.affine": (0.0, 0.35, 0.7, 1.0),
    },
    adapt=with_additions,
    work=fedmitr_work,
)
