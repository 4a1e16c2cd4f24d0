"""The metadata of an upload: whose it is, of which model, and what is sent beside it."""

from functools import lru_cache

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.errors import BadInput
from ..settings.schema import FeatureTokens, StatisticsSettings
from ..vision.features import feature_width
from ..vision.vit import create_vit
from .privacy import Noise, noise_multiplier

MOST_CLASSES, MOST_PIXELS, MOST_CHANNELS = 100_000, 2**15, 2**12  # of a model that is built


class ModelShape(BaseModel):
    """The architecture, classes and image size of an uploaded model; limits are checked before building."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(max_length=100)
    num_classes: int = Field(strict=True, ge=1, le=MOST_CLASSES)
    image_size: int = Field(strict=True, ge=1, le=MOST_PIXELS)
    in_chans: int = Field(strict=True, ge=1, le=MOST_CHANNELS)

    @classmethod
    def of(cls, name: str, vit: VisionTransformer) -> "ModelShape":
        """Read the shape off a model that `create_vit` knows by this name."""
        embed = vit.patch_embed
        return cls(
            name=name,
            num_classes=vit.num_classes,
            image_size=embed.img_size[0],
            in_chans=embed.proj.in_channels,
        )

    def build(self) -> VisionTransformer:
        """Build a model of this shape with initial weights; BadInput as `create_vit`."""
        return create_vit(self.name, self.num_classes, image_size=self.image_size, in_chans=self.in_chans)

    def arrays(self) -> dict[str, Tensor]:
        """List name, type and shape of each weight, as tensors on the meta device, which hold no numbers."""
        return _meta_model(self).state_dict()


@lru_cache(maxsize=32)  # many clients share few shapes
def _meta_model(shape: ModelShape) -> VisionTransformer:
    """Build a model of a declared shape on the meta device, without memory for weights."""
    with torch.device("meta"):
        create_vit(shape.name)  # refuses other architectures before one of the declared size is built
        return shape.build()


class Features(BaseModel):
    """What the statistics of an upload are sums of: tokens of the shared model, which all clients were sent.

    shape and weights identify that model; weights is `weights_digest` of its settings. views: moved copies
    of each image that count beside it. smallest: classes with fewer images are left out. noise: what is added
    to the sums, of features that are clipped. A card does not mention any of the three where there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    shape: ModelShape
    weights: str = Field(max_length=200)
    tokens: FeatureTokens
    views: int = Field(default=0, strict=True, ge=0, le=100, exclude_if=lambda views: views == 0)
    smallest: int = Field(default=0, strict=True, ge=0, exclude_if=lambda smallest: smallest == 0)
    noise: Noise | None = Field(default=None, exclude_if=lambda noise: noise is None)

    @classmethod
    def under(cls, shape: ModelShape, weights: str, settings: StatisticsSettings) -> "Features":
        """Return what statistics are sums of under these settings, with noise calibrated to their ε and δ.

        Raises BadInput as `noise_multiplier`.
        """
        own = cls(
            shape=shape,
            weights=weights,
            tokens=settings.tokens,
            views=settings.views,
            smallest=settings.smallest,
        )
        if settings.dp_epsilon is None:
            return own
        multiplier = noise_multiplier("statistics.dp_epsilon", settings.dp_epsilon, settings.dp_delta)
        noise = Noise(clip=settings.dp_clip * own.width**0.5, multiplier=multiplier)
        return own.model_copy(update={"noise": noise})

    @property
    def width(self) -> int:
        """The number of features D of one image."""
        return feature_width(_meta_model(self.shape), self.tokens)

    def __str__(self) -> str:
        views = f" with views={self.views}" if self.views else ""
        views += f", smallest={self.smallest}" if self.smallest else ""
        if self.noise:
            views += f", noise of multiplier {self.noise.multiplier:.4g} at norm {self.noise.clip:.4g}"
        return f"tokens={self.tokens!r}{views} of {self.shape.name!r} with weights {self.weights[:12]!r}"


class Card(BaseModel):
    """The metadata of an upload: client number, n_k, model shape and, if sent, c_k; which parts are sent.

    weights: whether weights are sent; without them, shape is that of the shared model. features: what the
    statistics are sums of, None where none are sent. training: the noise of DP-SGD, None for plain training.
    A card of weights alone does not mention any of these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    client: int = Field(strict=True, ge=0, le=2**31)
    size: int = Field(strict=True, ge=1, le=2**53)  # n_k, exact as a float
    shape: ModelShape
    class_counts: tuple[StrictInt, ...] | None = None  # c_k
    weights: bool = Field(default=True, strict=True, exclude_if=lambda sent: sent)
    features: Features | None = Field(default=None, exclude_if=lambda features: features is None)
    training: Noise | None = Field(default=None, exclude_if=lambda training: training is None)

    @property
    def bytes(self) -> int:
        """Bytes of the card in a message."""
        return len(self.model_dump_json().encode())


class SealedCard(Card):
    """A card as it is sent: with `Upload.digest`, which detects damage to card or weights."""

    sha256: str


def check_card(
    who: str, card: Card, expected: ModelShape | None = None, features: Features | None = None
) -> None:
    """Raise BadInput, naming the sender, where a card declares another model or features than expected."""
    if expected and card.shape != expected:
        raise BadInput(f"{who}: its model is {card.shape}, allowed is {expected}")
    if not (card.weights or card.features):
        raise BadInput(f"{who}: it holds neither weights nor statistics")
    own = card.features
    if own and features and own != features:
        raise BadInput(f"{who}: its statistics are of {own}, allowed are those of {features}")
    images = ("num_classes", "image_size", "in_chans")
    if own and any(getattr(own.shape, name) != getattr(card.shape, name) for name in images):
        raise BadInput(f"{who}: its statistics are of {own.shape}, its model is {card.shape}")
