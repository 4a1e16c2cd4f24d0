"""The only thing that crosses from client to server: weights, n_k and, where a method needs it, c_k."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .errors import BadInput
from .settings import Settings
from .vit import create_vit

WEIGHTS, CARD = "weights.safetensors", "upload.json"
NEED_COUNTS = ("fedftg",)  # the methods that ask every client for its class histogram c_k


class ModelShape(BaseModel):
    """What the server needs to rebuild the client's model."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    num_classes: int = Field(ge=1)
    image_size: int = Field(ge=1)
    in_chans: int = Field(ge=1)

    @classmethod
    def of(cls, name: str, vit: VisionTransformer) -> "ModelShape":
        embed = vit.patch_embed
        return cls(
            name=name,
            num_classes=vit.num_classes,
            image_size=embed.img_size[0],
            in_chans=embed.proj.in_channels,
        )

    def build(self) -> VisionTransformer:
        """A model of this shape, weights not loaded."""
        return create_vit(self.name, self.num_classes, image_size=self.image_size, in_chans=self.in_chans)


class Card(BaseModel):
    """The JSON beside the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    client: int = Field(ge=0)
    size: int = Field(ge=1)
    shape: ModelShape
    class_counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Upload:
    """One client's message: who, how many images n_k, the weights, and c_k only if asked for."""

    client: int
    size: int
    shape: ModelShape
    weights: dict[str, Tensor]
    class_counts: tuple[int, ...] | None = None

    @property
    def card(self) -> Card:
        return Card(client=self.client, size=self.size, shape=self.shape, class_counts=self.class_counts)

    @property
    def bytes(self) -> int:
        """Bytes on the wire: the safetensors file and the JSON card."""
        return len(save(self.weights)) + len(self.card.model_dump_json().encode())

    @property
    def digest(self) -> str:
        """A hash of the whole message; what the server computes is addressed by it."""
        return hashlib.sha256(save(self.weights) + self.card.model_dump_json().encode()).hexdigest()

    def without_counts(self) -> "Upload":
        """The same upload for methods that do not need the class histogram."""
        return replace(self, class_counts=None)

    def vit(self, share: bool = False) -> VisionTransformer:
        """The uploaded model, frozen, in evaluation mode; share: on the upload's own tensors, no copy."""
        vit = self.shape.build()
        vit.load_state_dict(self.weights, assign=share)
        return vit.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write `weights.safetensors` and `upload.json` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.weights, folder / WEIGHTS)
        (folder / CARD).write_text(self.card.model_dump_json())

    @classmethod
    def load(cls, folder: Path) -> "Upload":
        """Read and check an upload; BadInput names the client and what is wrong."""
        try:
            card = Card.model_validate_json((folder / CARD).read_text())
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise BadInput(f"upload in {folder.name!r}: {CARD} is not readable: {reason}") from None
        try:
            weights = load_file(folder / WEIGHTS)
        except Exception as error:
            raise BadInput(
                f"upload of client {card.client}: {WEIGHTS} is corrupt or truncated: {error}"
            ) from None
        return cls(card.client, card.size, card.shape, weights, card.class_counts).checked()

    def checked(self) -> "Upload":
        """Itself, if weights and histogram are what a model of its shape has; else BadInput."""
        who = f"upload of client {self.client}"
        try:
            expected = self.shape.build().state_dict()
        except BadInput as error:
            raise BadInput(f"{who}: {error}") from None
        for name in sorted(expected.keys() ^ self.weights.keys()):
            raise BadInput(f"{who}: weight {name!r} is {'missing' if name in expected else 'unknown'}")
        for name, value in self.weights.items():
            if value.shape != expected[name].shape or value.dtype != expected[name].dtype:
                raise BadInput(
                    f"{who}: weight {name!r} is {value.dtype} {list(value.shape)}, "
                    f"allowed is {expected[name].dtype} {list(expected[name].shape)}"
                )
            if not torch.isfinite(value).all():
                raise BadInput(f"{who}: weight {name!r} holds NaN or Inf")
        counts = self.class_counts
        if counts is not None and (
            len(counts) != self.shape.num_classes or sum(counts) != self.size or min(counts) < 0
        ):
            raise BadInput(
                f"{who}: class_counts={list(counts)} must be {self.shape.num_classes} counts "
                f"that sum to {self.size}"
            )
        return self


def asks_counts(settings: Settings, method: str | None = None) -> bool:
    """Whether clients send their class histogram: ensemble, inversion or the method itself asks for it."""
    asked = settings.ensemble.mode == "class" or settings.inversion.teacher == "owners"
    return asked or method in NEED_COUNTS


def average_weights(uploads: Sequence[Upload]) -> dict[str, Tensor]:
    """One-shot FedAvg: Σ_k (n_k / n) w_k (McMahan et al. 2017, Algorithm 1). All shapes must agree."""
    check_same_shape(uploads)
    total = sum(u.size for u in uploads)
    return {
        name: sum(u.weights[name].double() * (u.size / total) for u in uploads).to(value.dtype)
        for name, value in uploads[0].weights.items()
    }


def check_same_images(uploads: Sequence[Upload]) -> None:
    """BadInput unless there are uploads and their models, of whatever architecture, see the same images."""
    if not uploads:
        raise BadInput("uploads=[] is empty: at least one upload is needed")
    seen = [(u.shape.num_classes, u.shape.image_size, u.shape.in_chans) for u in uploads]
    for upload, own in zip(uploads, seen, strict=True):
        if own != seen[0]:
            raise BadInput(
                f"upload of client {upload.client}: its {own[0]} classes, {own[1]} pixels a side and "
                f"{own[2]} channels differ from client {uploads[0].client}'s {seen[0][0]}, {seen[0][1]} and "
                f"{seen[0][2]}; one ensemble needs the same"
            )


def check_same_shape(uploads: Sequence[Upload]) -> None:
    """BadInput unless there are uploads and all hold one architecture."""
    if not uploads:
        raise BadInput("uploads=[] is empty: at least one upload is needed")
    for upload in uploads[1:]:
        if upload.shape != uploads[0].shape:
            raise BadInput(
                f"upload of client {upload.client}: {upload.shape.name!r} differs from client "
                f"{uploads[0].client}'s {uploads[0].shape.name!r}; averaging needs one architecture"
            )
