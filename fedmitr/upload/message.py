"""The upload: what a method needs of each client, sent once: weights, n_k, c_k, sums of features.

What comes from a client is not trusted until it is checked. `Upload.load` first reads a small card and the
header of the weights file, and compares names, types and shapes with those of the declared model, which is
built without memory (torch's meta device). Arrays are read only if these fit.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from pydantic_core import from_json
from safetensors import safe_open
from safetensors.torch import load, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.errors import BadInput
from ..settings.schema import ClientSettings, StatisticsSettings
from .arrays import check_arrays, compare_arrays
from .card import Card, Features, ModelShape, SealedCard, check_card
from .privacy import Noise, epsilon
from .statistics import Statistics, expected_arrays

WEIGHTS, STATISTICS, CARD = "weights.safetensors", "statistics.safetensors", "upload.json"
CARD_BYTES = 2**20  # the largest card that is read: the counts of `MOST_CLASSES` classes fit
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64}  # safetensors' names of the types that a model may have


@dataclass(frozen=True)
class Upload:
    """One client's message: its number, n_k, and what the method needs: weights, c_k, sums of features.

    weights is None where statistics are sent alone. features says what the statistics are sums of; both are
    None where none are sent. training is the noise of DP-SGD, None where the weights are trained without.
    """

    client: int
    size: int
    shape: ModelShape
    weights: dict[str, Tensor] | None
    class_counts: tuple[int, ...] | None = None
    statistics: Statistics | None = None
    features: Features | None = None
    training: Noise | None = None

    @property
    def card(self) -> Card:
        """The metadata of this upload."""
        return Card(
            client=self.client,
            size=self.size,
            shape=self.shape,
            class_counts=self.class_counts,
            weights=self.weights is not None,
            features=self.features,
            training=self.training,
        )

    @property
    def noises(self) -> list[Noise]:
        """The noise of what is sent: of the weights' training, and of the sums, as far as there is any."""
        return [n for n in (self.training, self.features and self.features.noise) if n is not None]

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The arrays that are sent, by the name of their file."""
        parts = {}
        if self.weights is not None:
            parts[WEIGHTS] = self.weights
        if self.statistics is not None:
            parts[STATISTICS] = self.statistics.to_arrays()
        return parts

    @cached_property
    def _files(self) -> list[tuple[str, int]]:
        """SHA-256 and size in bytes of each part as a safetensors file."""
        files = [save(arrays) for arrays in self.parts.values()]
        return [(hashlib.sha256(data).hexdigest(), len(data)) for data in files]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the whole message; what the server computes from it is addressed by it."""
        hashes = "".join(digest for digest, _ in self._files)
        return hashlib.sha256((hashes + self.card.model_dump_json()).encode()).hexdigest()

    @cached_property
    def bytes(self) -> int:
        """The bytes of the message: the safetensors files and the card.

        The checksum is part of the transport, as a packet's is, and not counted.
        """
        return sum(size for _, size in self._files) + self.card.bytes

    def without_counts(self) -> "Upload":
        """Return the same upload without c_k, for methods that do not need it."""
        return replace(self, class_counts=None)

    def without_statistics(self) -> "Upload":
        """Return the same upload without sums of features."""
        return replace(self, statistics=None, features=None)

    def with_statistics(self, statistics: Statistics, features: Features) -> "Upload":
        """Return the same upload with sums of features beside what it has."""
        return replace(self, statistics=statistics, features=features)

    def vit(self, share: bool = False) -> VisionTransformer:
        """Build the uploaded model, frozen, in evaluation mode; share: on the upload's tensors, no copy."""
        check_weights([self])
        vit = self.shape.build()
        vit.load_state_dict(self.weights, assign=share)
        return vit.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write `upload.json` and, as far as they are sent, `weights` and `statistics.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, arrays in self.parts.items():
            (folder / name).write_bytes(save(arrays))
        (folder / CARD).write_text(SealedCard(**dict(self.card), sha256=self.digest).model_dump_json())

    @classmethod
    def load(
        cls, folder: Path, expected: ModelShape | None = None, features: Features | None = None
    ) -> "Upload":
        """Read and check an upload; BadInput, one line, names the client and what is wrong.

        expected: the shape that its model must have, and features: what its statistics must be sums of,
        where these are known.
        """
        card = _read_card(folder)
        who = f"upload of client {card.client}"
        check_card(who, card, expected, features)
        weights = statistics = None
        if card.weights:
            weights = _read_arrays(who, folder / WEIGHTS, _arrays_of(who, card.shape), "weight")
        if card.features:
            wanted = expected_arrays(card.shape.num_classes, declared_width(who, card.features))
            sums = _read_arrays(who, folder / STATISTICS, wanted, "statistics:")
            statistics = Statistics.from_arrays(sums)
        upload = cls(
            card.client,
            card.size,
            card.shape,
            weights,
            card.class_counts,
            statistics,
            card.features,
            card.training,
        )
        if upload.digest != card.sha256:
            names = " and ".join([*upload.parts, CARD])
            raise BadInput(f"{who}: {names} do not have the checksum that the card states")
        return upload.checked()

    def checked(self) -> "Upload":
        """Return the upload itself; BadInput unless a client with such a model can send its parts."""
        who = f"upload of client {self.client}"
        if self.size < 1:
            raise BadInput(f"{who}: size={self.size}: allowed are 1 image and more")
        if self.weights is None and self.statistics is None:
            raise BadInput(f"{who}: it holds neither weights nor statistics")
        if self.weights is not None:
            check_arrays(who, self.weights, _arrays_of(who, self.shape))
        counts, classes = self.class_counts, self.shape.num_classes
        noise = self.features.noise if self.features else None
        if counts is not None and (
            len(counts) != classes or min(counts) < 0 or (sum(counts) != self.size and not noise)
        ):
            told = f"class_counts={list(counts)}" if len(counts) <= 20 else f"{len(counts)} class_counts"
            raise BadInput(f"{who}: {told} must be {classes} counts that sum to {self.size}")
        if (self.statistics is None) != (self.features is None):
            raise BadInput(f"{who}: statistics come with the features that they are sums of, or not at all")
        if self.statistics is not None:
            check_card(who, self.card)
            width = declared_width(who, self.features)
            if noise:
                self.statistics.checked_noisy(who, classes, width, self.size, noise)
            else:
                self.statistics.checked(who, classes, width, self.size)
            told = self.statistics.counts.clamp(min=0) if noise else self.statistics.counts
            if counts is not None and told.tolist() != list(counts):
                raise BadInput(f"{who}: statistics: counts differ from class_counts={list(counts)[:20]}")
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


def _read_arrays(who: str, path: Path, wanted: Mapping[str, Tensor], noun: str) -> dict[str, Tensor]:
    """Read the arrays of one file, once its header fits; BadInput names the client and what is wrong."""
    try:
        compare_arrays(who, _read_header(who, path, noun), wanted, noun)
        return load(_read_file(path))
    except BadInput:
        raise
    except Exception as error:  # whatever safetensors says of bytes that are no such file
        raise BadInput(f"{who}: {path.name} is corrupt or truncated: {_first_line(error)}") from None


def _read_header(who: str, path: Path, noun: str) -> dict[str, Tensor]:
    """Read name, type and shape of each array in a safetensors file, as meta tensors; no array is read."""
    arrays = {}
    _read_file(path, 0)  # OSError for what is no plain file
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            array = file.get_slice(name)
            if (dtype := DTYPES.get(array.get_dtype())) is None:
                raise BadInput(
                    f"{who}: {noun} {name[:100]!r} is {array.get_dtype()}, allowed are {', '.join(DTYPES)}"
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


def declared_width(who: str, features: Features) -> int:
    """Return the width of declared features; BadInput, naming the client, if their model cannot be built."""
    _arrays_of(who, features.shape)
    return features.width


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_same_images(uploads: Sequence[Upload]) -> None:
    """Raise BadInput unless there are uploads and their models, of any architecture, take the same images."""
    if not uploads:
        raise BadInput("uploads=[] is empty: at least one upload is needed")
    check_weights(uploads)
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
    check_weights([u for u in uploads if isinstance(u, Upload)])  # clients have none yet
    for upload in uploads[1:]:
        if upload.shape != uploads[0].shape:
            raise BadInput(
                f"upload of client {upload.client}: {upload.shape.name!r} differs from client "
                f"{uploads[0].client}'s {uploads[0].shape.name!r}; averaging needs one architecture"
            )


def check_weights(uploads: Iterable[Upload]) -> None:
    """Raise BadInput for an upload without weights."""
    for upload in uploads:
        if upload.weights is None:
            raise BadInput(f"upload of client {upload.client} has no weights: the method needs them")


def check_statistics(uploads: Iterable[Upload]) -> None:
    """Raise BadInput for an upload without statistics."""
    for upload in uploads:
        if upload.statistics is None:
            raise BadInput(f"upload of client {upload.client} has no statistics: the method needs them")


def check_noise(
    uploads: Iterable[Upload],
    block: Literal["client", "statistics"],
    settings: ClientSettings | StatisticsSettings,
) -> None:
    """Raise BadInput for an upload that declares noise unasked, or less of it than the settings ask for.

    block: "client" for the noise of training, "statistics" for that of the sums; settings: that block's. What
    is declared is believed: no server can see how much noise there is.
    """
    wanted, asked = settings.dp_epsilon, f"{block}.dp_epsilon={settings.dp_epsilon}"
    for upload in uploads:
        noise = upload.training if block == "client" else upload.features and upload.features.noise
        part = f"upload of client {upload.client}: its {'training' if block == 'client' else 'sums'}"
        if (noise is None) != (wanted is None):
            says, asks = ("no noise", "some") if noise is None else ("noise", "none")
            raise BadInput(f"{part} declares {says}, {asked} asks for {asks}")
        if noise and (found := epsilon([noise], settings.dp_delta)) > wanted * (1 + 1e-6):
            raise BadInput(f"{part} declares noise of ε={found:.4g}, {asked} asks for more noise")
