"""Named arrays in a message: their bytes, and the checks that they are those expected."""

from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from ..core.errors import BadInput


def wire_bytes(arrays: Mapping[str, Tensor]) -> int:
    """Count the bytes of arrays in a message: the size of their safetensors file."""
    return len(save({name: value.contiguous() for name, value in arrays.items()}))


def compare_arrays(
    who: str, arrays: Mapping[str, Tensor], expected: Mapping[str, Tensor], noun: str = "weight"
) -> None:
    """Raise BadInput, naming the sender and the array, unless names, types and shapes are as expected.

    Tensors of either may be on the meta device. noun: what an array is called.
    """
    for name in sorted(expected.keys() ^ arrays.keys()):
        raise BadInput(f"{who}: {noun} {name[:100]!r} is {'missing' if name in expected else 'unknown'}")
    for name, wanted in expected.items():
        value = arrays[name]
        if not isinstance(value, Tensor):
            raise BadInput(f"{who}: {noun} {name!r} is a {type(value).__name__}, allowed is a tensor")
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise BadInput(
                f"{who}: {noun} {name!r} is {value.dtype} {list(value.shape)}, "
                f"allowed is {wanted.dtype} {list(wanted.shape)}"
            )


def check_arrays(who: str, arrays: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check a message's arrays as `compare_arrays` does, and raise BadInput for NaN and Inf."""
    compare_arrays(who, arrays, expected)
    for name, value in arrays.items():
        if not torch.isfinite(value).all():
            raise BadInput(f"{who}: weight {name!r} holds NaN or Inf")
