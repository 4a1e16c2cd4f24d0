"""The only thing that crosses from client to server: weights, n_k and, where a method needs it, c_k.

What comes from a client is hostile until it is checked. `Upload.load` reads the few bytes of the card and of
the weights file's header first, and compares names, types and shapes with those of the declared model, which
is built without memory (torch's meta device). Only what fits is read.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from safetensors.torch import load, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .core.errors import BadInput
from .vision.vit import create_vit

WEIGHTS, CARD = "weights.safetensors", "upload.json"
CARD_BYTES = 16 * 2**20  # the largest card that is read: a histogram of a million classes fits
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


class ModelShape(BaseModel):
    """What the server needs to rebuild the client's model."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    num_classes: int = Field(ge=1)
    image_size: int = Field(ge=1)
    in_chans: int = Field(ge=1)

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
        """Build a model of this shape, weights not loaded."""
        return create_vit(self.name, self.num_classes, image_size=self.image_size, in_chans=self.in_chans)

    def arrays(self) -> dict[str, Tensor]:
        """List name, type and shape of each weight, as tensors on the meta device, which hold no numbers."""
        with torch.device("meta"):
            return self.build().state_dict()


class Card(BaseModel):
    """What a client says of itself, beside its weights: the JSON of an upload."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    client: int = Field(ge=0)
    size: int = Field(ge=1)
    shape: ModelShape
    class_counts: tuple[int, ...] | None = None


class SealedCard(Card):
    """A card as it is written: with the SHA-256 of the weights file, so that no damaged byte is believed."""

    sha256: str


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
        """What it says beside the weights."""
        return Card(client=self.client, size=self.size, shape=self.shape, class_counts=self.class_counts)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the weights as safetensors; computed once."""
        return hashlib.sha256(save(self.weights)).hexdigest()

    @cached_property
    def digest(self) -> str:
        """A hash of the whole message; what the server computes is addressed by it."""
        return hashlib.sha256((self.sha256 + self.card.model_dump_json()).encode()).hexdigest()

    @cached_property
    def bytes(self) -> int:
        """Bytes of the message: the safetensors file and the card.

        The checksum that guards the file is part of the transport, as a packet's is, and not counted.
        """
        return wire_bytes(self.weights) + len(self.card.model_dump_json().encode())

    def without_counts(self) -> "Upload":
        """The same upload for methods that do not need the class histogram."""
        return replace(self, class_counts=None)

    def vit(self, share: bool = False) -> VisionTransformer:
        """Build the uploaded model, frozen, in evaluation mode; share: on the upload's tensors, no copy."""
        vit = self.shape.build()
        vit.load_state_dict(self.weights, assign=share)
        return vit.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write `weights.safetensors` and `upload.json` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        data = save(self.weights)
        (folder / WEIGHTS).write_bytes(data)
        sealed = SealedCard(**dict(self.card), sha256=hashlib.sha256(data).hexdigest())
        (folder / CARD).write_text(sealed.model_dump_json())

    @classmethod
    def load(cls, folder: Path, expected: ModelShape | None = None) -> "Upload":
        """Read and check an upload; BadInput names the client and what is wrong.

        expected: the shape that its model must have, where that is known.
        """
        card = _read_card(folder)
        who = f"upload of client {card.client}"
        if expected and card.shape != expected:
            raise BadInput(f"{who}: its model is {card.shape}, allowed is {expected}")
        try:
            compare_arrays(who, _read_header(folder / WEIGHTS), _arrays_of(who, card.shape))
            data = (folder / WEIGHTS).read_bytes()
            if hashlib.sha256(data).hexdigest() != card.sha256:
                raise BadInput(f"{who}: {WEIGHTS} does not have the checksum that {CARD} states")
            weights = load(data)
        except BadInput:
            raise
        except Exception as error:  # whatever safetensors says of bytes that are no such file
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise BadInput(f"{who}: {WEIGHTS} is corrupt or truncated: {reason}") from None
        return cls(card.client, card.size, card.shape, weights, card.class_counts).checked()

    def checked(self) -> "Upload":
        """Return itself if weights and histogram are what a model of its shape has; else BadInput."""
        who = f"upload of client {self.client}"
        check_arrays(who, self.weights, _arrays_of(who, self.shape))
        counts, classes = self.class_counts, self.shape.num_classes
        if counts is not None and (len(counts) != classes or sum(counts) != self.size or min(counts) < 0):
            told = f"class_counts={list(counts)}" if len(counts) <= 20 else f"{len(counts)} class_counts"
            raise BadInput(f"{who}: {told} must be {classes} counts that sum to {self.size}")
        return self


def _read_card(folder: Path) -> SealedCard:
    try:
        if (folder / CARD).stat().st_size > CARD_BYTES:
            raise BadInput(f"upload in {folder.name!r}: {CARD} is larger than {CARD_BYTES} bytes")
        return SealedCard.model_validate_json((folder / CARD).read_text())
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise BadInput(f"upload in {folder.name!r}: {CARD} is not readable: {reason}") from None


def _read_header(path: Path) -> dict[str, Tensor]:
    """Name, type and shape of each array in a safetensors file, as meta tensors; no array is read."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {
            name: torch.empty(
                s.get_shape(),
                dtype=getattr(torch, DTYPES.get(s.get_dtype(), s.get_dtype().lower()), torch.uint8),
                device="meta",
            )
            for name, s in slices.items()
        }


def _arrays_of(who: str, shape: ModelShape) -> dict[str, Tensor]:
    try:
        return shape.arrays()
    except BadInput as error:
        raise BadInput(f"{who}: {error}") from None


def wire_bytes(arrays: Mapping[str, Tensor]) -> int:
    """Count the bytes of arrays in a message: the size of their safetensors file."""
    return len(save({name: value.contiguous() for name, value in arrays.items()}))


def compare_arrays(who: str, arrays: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """BadInput, naming the sender and the array, unless names, types and shapes are as expected.

    Tensors of either may be on the meta device.
    """
    for name in sorted(expected.keys() ^ arrays.keys()):
        raise BadInput(f"{who}: weight {name!r} is {'missing' if name in expected else 'unknown'}")
    for name, wanted in expected.items():
        value = arrays[name]
        if not isinstance(value, Tensor):
            raise BadInput(f"{who}: weight {name!r} is a {type(value).__name__}, allowed is a tensor")
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise BadInput(
                f"{who}: weight {name!r} is {value.dtype} {list(value.shape)}, "
                f"allowed is {wanted.dtype} {list(wanted.shape)}"
            )


def check_arrays(who: str, arrays: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """`compare_arrays`, and BadInput for NaN and Inf: the one check of every message."""
    compare_arrays(who, arrays, expected)
    for name, value in arrays.items():
        if not torch.isfinite(value).all():
            raise BadInput(f"{who}: weight {name!r} holds NaN or Inf")


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
