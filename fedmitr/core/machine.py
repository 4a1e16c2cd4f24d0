"""Facts about this machine: its device, its precision, the versions installed."""

import importlib.metadata
import platform

import torch

PACKAGES = ("fedmitr", "torch", "torchvision", "timm", "numpy", "scikit-learn", "pydantic", "safetensors")
OPTIONAL = ("dask", "ray", "flwr", "opacus")


def device() -> torch.device:
    """Return the first CUDA device where there is one, else the CPU."""
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
    """Return a context in which matrix products are in bfloat16 if `uses_bf16(precision)`."""
    return torch.autocast(device().type, torch.bfloat16, enabled=uses_bf16(precision))


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return the installed versions by package name, with Python's; None where a package is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe() -> dict[str, object]:
    """Return facts about this machine: versions, optional packages too, system, device, threads, bfloat16."""
    here = device()
    if here.type == "cuda":
        name = torch.cuda.get_device_name(here)
    else:
        name = platform.processor() or platform.machine()
    facts: dict[str, object] = dict(versions(PACKAGES + OPTIONAL))
    return facts | {
        "system": platform.platform(),
        "device": f"{here} ({name})",
        "threads": torch.get_num_threads(),
        "bf16": native_bf16(),
    }
