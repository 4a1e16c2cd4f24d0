"""Random streams: one for each named use, so that no two stages share one."""

import hashlib

import torch


def derive_seed(seed: int, *names: object) -> int:
    """Return a seed for one named use: 48 bits of the SHA-256 of seed and names."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def make_rng(seed: int, *names: object) -> torch.Generator:
    """Make the random generator of one named use, on the CPU: its draws do not depend on the device."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
