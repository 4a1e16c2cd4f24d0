"""The upload: weights, n_k and, where a method needs it, c_k; sent once by each client.

What comes from a client is not trusted until it is checked. `Upload.load` first reads a small card and the
header of the weights file, and compares names, types and shapes with those of the declared model, which is
built without memory (torch's meta device). Arrays are read only if these fit.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError
from pydantic_core import from_json
from safetensors import safe_open
from safetensors.torch import load, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .core.errors import BadInput
from .vision.vit import create_vit

WEIGHTS, CARD = "weights.safetensors", "upload.json"
CARD_BYTES = 2**20  # the largest card that is read: the counts of `MOST_CLASSES` classes fit
MOST_CLASSES, MOST_PIXELS, MOST_CHANNELS = 100_000, 2**15, 2**12  # of a model that is built
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64}  # safetensors' names of the types that a model may have


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
        return dict(_meta_arrays(self))


@lru_cache(maxsize=32)  # many clients share few shapes
def _meta_arrays(shape: ModelShape) -> dict[str, Tensor]:
    with torch.device("meta"):
        create_vit(shape.name)  # refuses other architectures before one of the declared size is built
        return shape.build().state_dict()


class Card(BaseModel):
    """The metadata of an upload: client number, n_k, model shape and, if sent, c_k."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    client: int = Field(strict=True, ge=0, le=2**31)
    size: int = Field(strict=True, ge=1, le=2**53)  # n_k, exact as a float
    shape: ModelShape
    class_counts: tuple[StrictInt, ...] | None = None  # c_k

    @property
    def bytes(self) -> int:
        """Bytes of the card in a message."""
        return len(self.model_dump_json().encode())


class SealedCard(Card):
    """A card as it is sent: with `Upload.digest`, which detects damage to card or weights."""

    sha256: str


@dataclass(frozen=True)
class Upload:
    """One client's message: its number, n_k, weights and, if the method needs it, c_k."""

    client: int
    size: int
    shape: ModelShape
    weights: dict[str, Tensor]
    class_counts: tuple[int, ...] | None = None

    @property
    def card(self) -> Card:
        """The metadata of this upload."""
        return Card(client=self.client, size=self.size, shape=self.shape, class_counts=self.class_counts)

    @cached_property
    def _weights_file(self) -> tuple[str, int]:
        """SHA-256 and size in bytes of the weights as a safetensors file."""
        data = save(self.weights)
        return hashlib.sha256(data).hexdigest(), len(data)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the whole message; what the server computes from it is addressed by it."""
        return hashlib.sha256((self._weights_file[0] + self.card.model_dump_json()).encode()).hexdigest()

    @cached_property
    def bytes(self) -> int:
        """The bytes of the message: the safetensors file and the card.

        The checksum is part of the transport, as a packet's is, and not counted.
        """
        return self._weights_file[1] + self.card.bytes

    def without_counts(self) -> "Upload":
        """Return the same upload without c_k, for methods that do not need it."""
        return replace(self, class_counts=None)

    def vit(self, share: bool = False) -> VisionTransformer:
        """Build the uploaded model, frozen, in evaluation mode; share: on the upload's tensors, no copy."""
        vit = self.shape.build()
        vit.load_state_dict(self.weights, assign=share)
        return vit.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write `weights.safetensors` and `upload.json` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(save(self.weights))
        (folder / CARD).write_text(SealedCard(**dict(self.card), sha256=self.digest).model_dump_json())

    @classmethod
    def load(cls, folder: Path, expected: ModelShape | None = None) -> "Upload":
        """Read and check an upload; BadInput, one line, names the client and what is wrong.

        expected: the shape that its model must have, where that is known.
        """
        card = _read_card(folder)
        who = f"upload of client {card.client}"
        if expected and card.shape != expected:
            raise BadInput(f"{who}: its model is {card.shape}, allowed is {expected}")
        wanted = _arrays_of(who, card.shape)
        try:
            compare_arrays(who, _read_header(who, folder / WEIGHTS), wanted)
            weights = load(_read_file(folder / WEIGHTS))
        except BadInput:
            raise
        except Exception as error:  # whatever safetensors says of bytes that are no such file
            raise BadInput(f"{who}: {WEIGHTS} is corrupt or truncated: {_first_line(error)}") from None
        upload = cls(card.client, card.size, card.shape, weights, card.class_counts)
        if upload.digest != card.sha256:
            raise BadInput(f"{who}: {WEIGHTS} and {CARD} do not have the checksum that the card states")
        return upload.checked()

    def checked(self) -> "Upload":
        """Return the upload itself; BadInput unless weights and counts are what a model of its shape has."""
        who = f"upload of client {self.client}"
        check_arrays(who, self.weights, _arrays_of(who, self.shape))
        counts, classes = self.class_counts, self.shape.num_classes
        if counts is not None and (len(counts) != classes or sum(counts) != self.size or min(counts) < 0):
            told = f"class_counts={list(counts)}" if len(counts) <= 20 else f"{len(counts)} class_counts"
            raise BadInput(f"{who}: {told} must be {classes} counts that sum to {self.size}")
        return self


def _read_card(folder: Path) -> SealedCard:
    """Read an upload's card; BadInput names the client, or the folder where the card does not say."""
    who, path = f"upload in {folder.name!r}", folder / CARD
    try:
        data = _read_file(path, CARD_BYTES + 1)
        if len(data) > CARD_BYTES:
            raise ValueError(f"it is larger than {CARD_BYTES} bytes")
        fields = from_json(data)
        if isinstance(fields, dict) and isinstance(fields.get("client"), int):
            who = f"upload of client {str(fields['client'])[:20]}"
        return SealedCard.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise BadInput(f"{who}: {CARD} is not readable: {where!r}: {first['msg']}") from None
    except (OSError, ValueError) as error:  # no such file, no JSON
        raise BadInput(f"{who}: {CARD} is not readable: {_first_line(error)}") from None


def _read_file(path: Path, most: int = -1) -> bytes:
    """Read a plain file, at most so many bytes; OSError for a device or a pipe, which may have no end."""
    if not path.is_file():
        raise OSError("there is no such file")
    with path.open("rb") as file:
        return file.read(most)


def _read_header(who: str, path: Path) -> dict[str, Tensor]:
    """Read name, type and shape of each array in a safetensors file, as meta tensors; no array is read."""
    arrays = {}
    _read_file(path, 0)  # OSError for what is no plain file
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            array = file.get_slice(name)
            if (dtype := DTYPES.get(array.get_dtype())) is None:
                raise BadInput(
                    f"{who}: weight {name[:100]!r} is {array.get_dtype()}, allowed are {', '.join(DTYPES)}"
                )
            arrays[name] = torch.empty(array.get_shape(), dtype=dtype, device="meta")
    return arrays


def _arrays_of(who: str, shape: ModelShape) -> dict[str, Tensor]:
    """List the arrays of a declared model; BadInput, naming the client, if it cannot be built."""
    try:
        return shape.arrays()
    except BadInput as error:
        raise BadInput(f"{who}: {error}") from None
    except Exception as error:  # whatever timm says of a size that an architecture cannot have
        raise BadInput(f"{who}: its model {shape} cannot be built: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def wire_bytes(arrays: Mapping[str, Tensor]) -> int:
    """Count the bytes of arrays in a message: the size of their safetensors file."""
    return len(save({name: value.contiguous() for name, value in arrays.items()}))


def compare_arrays(who: str, arrays: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise BadInput, naming the sender and the array, unless names, types and shapes are as expected.

    Tensors of either may be on the meta device.
    """
    for name in sorted(expected.keys() ^ arrays.keys()):
        raise BadInput(f"{who}: weight {name[:100]!r} is {'missing' if name in expected else 'unknown'}")
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
    """Check a message's arrays as `compare_arrays` does, and raise BadInput for NaN and Inf."""
    compare_arrays(who, arrays, expected)
    for name, value in arrays.items():
        if not torch.isfinite(value).all():
            raise BadInput(f"{who}: weight {name!r} holds NaN or Inf")


def check_same_images(uploads: Sequence[Upload]) -> None:
    """Raise BadInput unless there are uploads and their models, of any architecture, take the same images."""
    if not uploads:
        raise BadInput("uploads=[] is empty: at least one upload is needed")
    taken = [(u.shape.num_classes, u.shape.image_size, u.shape.in_chans) for u in uploads]
    first = taken[0]
    for upload, own in zip(uploads, taken, strict=True):
        if own != first:
            raise BadInput(
                f"upload of client {upload.client}: its {own[0]} classes, {own[1]} pixels a side and "
                f"{own[2]} channels differ from client {uploads[0].client}'s {first[0]}, {first[1]} and "
                f"{first[2]}; one ensemble needs the same"
            )


def check_same_shape(uploads: Sequence[Upload]) -> None:
    """Raise BadInput unless there are uploads and all hold one architecture."""
    if not uploads:
        raise BadInput("uploads=[] is empty: at least one upload is needed")
    for upload in uploads[1:]:
        if upload.shape != uploads[0].shape:
            raise BadInput(
                f"upload of client {upload.client}: {upload.shape.name!r} differs from client "
                f"{uploads[0].client}'s {uploads[0].shape.name!r}; averaging needs one architecture"
            )
