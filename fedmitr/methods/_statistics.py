"""What the methods on sums of features share: the shared backbone, its linear head, a second exchange."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.errors import BadInput
from ..core.machine import device
from ..core.progress import timed
from ..server.statistics import Head, ridge, total_statistics
from ..settings import Settings
from ..settings.schema import FeatureTokens
from ..upload import ModelShape, Statistics, Upload, wire_bytes
from ..vision.features import FeatureClassifier, feature_width, largest_feature
from ..vision.vit import weights_digest
from ._method import Outcome, Search
from ._start import initial_model

# What tuning may try for the features of every published method that solves for a head. Regions and moved
# copies are ours: ridge_plus.py has them.
SUMS: Search = {"statistics.tokens": ("cls", "patches", "both")}
Model = tuple[ModelShape, dict[str, Tensor]]  # a model in a message: its shape and its weights


class Client(Protocol):
    """The interface of a client of two exchanges: its upload, then sums of features of models it is sent."""

    upload: Upload
    shared: dict[str, Tensor]  # weights of the model that it was sent first

    def statistics(self, models: Sequence[Model], tokens: FeatureTokens, views: int = 0) -> Statistics:
        """Return the sums of the models' features, side by side, over the client's images and their views."""
        ...


def classify(uploads: Sequence[Upload], settings: Settings, solve: Callable[[Statistics], Head]) -> Outcome:
    """Return the shared model with the linear head that `solve` finds from the sums of all clients."""
    seconds: dict[str, float] = {}
    with timed(seconds, "solving"):
        model = feature_classifier(uploads, settings, solve)
    return Outcome([model], seconds)


def feature_classifier(
    uploads: Sequence[Upload], settings: Settings, solve: Callable[[Statistics], Head]
) -> FeatureClassifier:
    """Build the shared model with the head that `solve` finds; BadInput for sums of another model."""
    statistics, features = total_statistics(uploads), uploads[0].features
    vit, own = initial_model(uploads, settings), weights_digest(settings.model)
    shape = ModelShape.of(settings.model.name, vit)
    if (features.shape, features.weights) != (shape, own):
        raise BadInput(
            f"upload of client {uploads[0].client}: its statistics are of {features}, "
            f"the shared model is {shape.name!r} with weights {own[:12]!r}"
        )
    for upload in uploads:
        if features.noise:  # `Statistics.checked_noisy` has compared them with the norm that noise is for
            continue
        check_length(f"upload of client {upload.client}", upload.statistics, [vit], features.tokens)
    return FeatureClassifier([vit], features.tokens, *solve(statistics)).to(device())


def check_length(
    who: str, statistics: Statistics, vits: Sequence[VisionTransformer], tokens: FeatureTokens
) -> None:
    """Raise BadInput, naming the sender, for sums of longer features than these ViTs can have, side by side.

    Else a few made-up images could outweigh all others.
    """
    longest = sum(largest_feature(vit, tokens) for vit in vits)  # |f|²
    found = statistics.gram.diagonal().sum() / statistics.size
    if found > longest * (1 + 1e-6):
        raise BadInput(
            f"{who}: statistics: gram is of features with a mean |f|² of {found:.4g}, "
            f"the model's are at most {longest:.4g}"
        )


def ridge_head(settings: Settings) -> Callable[[Statistics], Head]:
    """Return ridge regression at the run's penalty, as a function of statistics."""
    return partial(ridge, penalty=settings.statistics.ridge)


def ridge_classifier(uploads: Sequence[Upload], settings: Settings) -> FeatureClassifier:
    """Build the shared model with the head of ridge regression."""
    return feature_classifier(uploads, settings, ridge_head(settings))


def solve_again(clients: Sequence[Client], models: Sequence[Model], settings: Settings) -> Outcome:
    """Send models to all clients, and solve ridge regression on the sums of their features that come back.

    Messages up: each client's upload, then its sums. Down: the shared model, then `models`, to each client.
    """
    own, vits = settings.statistics, [build(*model) for model in models]
    classes, width = vits[0].num_classes, sum(feature_width(vit, own.tokens) for vit in vits)
    up = down = 0
    seconds: dict[str, float] = {}
    total: Statistics | None = None
    for client in clients:
        sums = client.statistics(models, own.tokens, own.views)
        who = f"second message of client {client.upload.client}"
        sums.check_sums(who, classes, width, client.upload.size)
        check_length(who, sums, vits, own.tokens)
        total = sums if total is None else total + sums
        up += client.upload.bytes + wire_bytes(sums.to_arrays())
        down += wire_bytes(client.shared) + sum(wire_bytes(weights) for _, weights in models)
    with timed(seconds, "solving"):
        total.check_scatter("second messages of all clients")
        head = ridge_head(settings)(total)
    classifier = FeatureClassifier(vits, own.tokens, *head).to(device())
    return Outcome([classifier], seconds, uplink_bytes=up, downlink_bytes=down)


def build(shape: ModelShape, weights: dict[str, Tensor]) -> VisionTransformer:
    """Build a model of a message, frozen, in evaluation mode."""
    vit = shape.build()
    vit.load_state_dict(weights)
    return vit.eval().requires_grad_(False)
