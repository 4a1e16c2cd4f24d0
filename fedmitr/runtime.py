"""What every stage needs from the machine: a device, seeds that do not collide, progress, version facts."""

import hashlib
import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from tqdm.auto import tqdm

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


def derive_seed(seed: int, *names: object) -> int:
    """A seed of its own for each named use, so that no two stages share a random stream."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for one named use; draws on the CPU are the same on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


def static() -> bool:
    """True where outputs are stored, not watched ($FEDMITR_STATIC=1): no progress bars, no sliders."""
    return bool(os.environ.get("FEDMITR_STATIC"))


def progress(total: int, title: str, unit: str, delay: float = 0) -> tqdm:
    """A progress bar on stderr, or in the notebook; what is done within `delay` seconds shows none."""
    quiet = {"disable": True} if static() else {}  # else tqdm's own $TQDM_DISABLE decides
    return tqdm(total=total, desc=title, unit=unit, delay=delay, **quiet)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time that a block takes to seconds[stage]."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


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
