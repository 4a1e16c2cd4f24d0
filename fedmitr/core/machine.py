"""Facts about this machine: its device, its precision, the versions installed."""

import importlib.metadata
import platform
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

PACKAGES = ("fedmitr", "torch", "torchvision", "timm", "numpy", "scikit-learn", "pydantic", "safetensors")
OPTIONAL = ("dask", "ray", "flwr")
Made = TypeVar("Made")


def device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware, faster than float32 ones."""
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def uses_bf16(precision: str) -> bool:
    """Whether `precision` means bfloat16 here: "bf16", or "auto" on a machine made for it."""
    return precision == "bf16" or (precision == "auto" and native_bf16())


def autocast(precision: str) -> torch.autocast:
    """Matrix products in bfloat16 where `uses_bf16` says so."""
    return torch.autocast(device().type, torch.bfloat16, enabled=uses_bf16(precision))


def compiled(function: Callable[..., Made]) -> Callable[..., Made]:
    """The function through torch.compile; where that fails, the function itself, with a warning."""
    fast = torch.compile(function, dynamic=False)
    failed = False

    def run(*args: object, **named: object) -> Made:
        nonlocal failed
        if not failed:
            try:
                return fast(*args, **named)
            except Exception as error:  # no compiler, no backend for this machine, an unsupported operation
                failed = True
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]
                warnings.warn(f"torch.compile failed, going on without it: {reason}", stacklevel=2)
        return function(*args, **named)

    return run


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Installed versions by package name; None where a package is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe() -> dict[str, object]:
    """Facts about this machine: versions, device, threads, optional parts."""
    at = device()
    name = torch.cuda.get_device_name(at) if at.type == "cuda" else platform.processor() or platform.machine()
    facts: dict[str, object] = dict(versions(PACKAGES + OPTIONAL))
    return facts | {
        "system": platform.platform(),
        "device": f"{at} ({name})",
        "threads": torch.get_num_threads(),
        "bf16": native_bf16(),
    }
