"""An upload as a message of Flower: its records, and the checks when it arrives (docs/flower.md)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError

from .core.errors import BadInput
from .upload import (
    STATISTICS,
    WEIGHTS,
    Features,
    ModelShape,
    SealedCard,
    Statistics,
    Upload,
    check_card,
    compare_arrays,
    declared_width,
    expected_arrays,
)

DEEPEST = 4  # dots in the name of a field; a card's own have two
PART_OF = {WEIGHTS: "weights", STATISTICS: "statistics"}  # file of an upload -> record of a message


def pack(upload: Upload) -> RecordDict:
    """Write an upload as Flower's records: the card, and weights or statistics or both.

    The card carries the SHA-256 of all, `Upload.digest`; nested fields are named as `shape.NAME`.
    """
    card = upload.card.model_dump(exclude_none=True) | {"sha256": upload.digest}
    parts = {PART_OF[name]: ArrayRecord(arrays) for name, arrays in upload.parts.items()}
    return RecordDict({"card": ConfigRecord(flat(card))} | parts)


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested fields under dotted names, tuples as lists, as Flower's records take them."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": own for inner, own in flat(value).items()}
        else:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree that `flat` was given; of a name that is a field and a group, the group."""
    tree: dict[str, Any] = {}
    for name, value in sorted(fields.items()):
        at, *inner = name.split(".", 1)
        if not inner:
            tree[at] = value
        elif not isinstance(tree.get(at), dict):
            tree[at] = {inner[0]: value}
        else:
            tree[at][inner[0]] = value
    return {name: nested(value) if isinstance(value, dict) else value for name, value in tree.items()}


def unpack(
    content: RecordDict,
    node: int,
    shape_of: Callable[[int], ModelShape],
    features: Features | None = None,
) -> Upload:
    """Read and check the upload in a message; BadInput, one line, names the client, or else the node.

    shape_of(client): the shape that the client's model must have. features: what its statistics must be sums
    of; None where none are expected.
    """
    who = f"upload of node {node}"
    card = content.get("card")
    if not isinstance(card, ConfigRecord):
        raise BadInput(f"{who}: holds {', '.join(sorted(content)) or 'nothing'}, and no card")
    if isinstance(card.get("client"), int):
        who = f"upload of client {card['client']}"
    if any(name.count(".") > DEEPEST for name in card):
        raise BadInput(f"{who}: card: a field is nested deeper than {DEEPEST} groups")
    try:
        read = SealedCard.model_validate(nested(card))
    except ValidationError as failure:
        error = failure.errors()[0]
        raise BadInput(f"{who}: card: {'.'.join(map(str, error['loc']))}: {error['msg']}") from None
    check_card(who, read, shape_of(read.client), features)  # before a model is built that is not expected
    declared = {"card", *["weights"] * read.weights, *["statistics"] * (read.features is not None)}
    if set(content) != declared:
        raise BadInput(
            f"{who}: holds {', '.join(sorted(content))}, its card declares {', '.join(sorted(declared))}"
        )
    parts = {name: read_arrays(who, name, content[name]) for name in declared - {"card"}}
    statistics = None
    if read.features:
        wanted = expected_arrays(read.shape.num_classes, declared_width(who, read.features))
        compare_arrays(who, parts["statistics"], wanted, "statistics:")
        statistics = Statistics.from_arrays(parts["statistics"])
    upload = Upload(
        read.client,
        read.size,
        read.shape,
        parts.get("weights"),
        read.class_counts,
        statistics,
        read.features,
        read.training,
    ).checked()
    if upload.digest != read.sha256:
        raise BadInput(f"{who}: its arrays and card do not have the checksum that the card states")
    return upload


def read_arrays(who: str, name: str, record: Any) -> dict[str, torch.Tensor]:
    """Read the arrays of one part of a message; BadInput for what are no arrays."""
    if not isinstance(record, ArrayRecord):
        raise BadInput(f"{who}: {name} is a {type(record).__name__}, not arrays")
    try:
        return {n: torch.from_numpy(array.numpy()).contiguous() for n, array in record.items()}
    except Exception as error:  # whatever numpy says about bytes that are no array
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInput(f"{who}: {name} are not readable: {reason}") from None
