"""The one message that crosses from a client to the server: what it may hold, and the checks on arrival."""

from .arrays import check_arrays, compare_arrays, wire_bytes
from .card import Card, Features, ModelShape, SealedCard, check_card
from .message import (
    CARD,
    CARD_BYTES,
    STATISTICS,
    WEIGHTS,
    Upload,
    check_noise,
    check_same_images,
    check_same_shape,
    check_statistics,
    check_weights,
    declared_width,
)
from .privacy import Noise
from .statistics import Statistics, add_up, expected_arrays

__all__ = [
    "CARD",
    "CARD_BYTES",
    "STATISTICS",
    "WEIGHTS",
    "Card",
    "Features",
    "ModelShape",
    "Noise",
    "SealedCard",
    "Statistics",
    "Upload",
    "add_up",
    "check_arrays",
    "check_card",
    "check_noise",
    "check_same_images",
    "check_same_shape",
    "check_statistics",
    "check_weights",
    "compare_arrays",
    "declared_width",
    "expected_arrays",
    "wire_bytes",
]
