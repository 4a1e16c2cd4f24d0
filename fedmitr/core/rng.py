"""Random streams: one for each named use, so that no two stages share one."""

import hashlib

import torch


def derive_seed(seed: int, *names: object) -> int:
    """A seed of its own for each named use, so that no two stages share a random stream."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def make_rng(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for one named use; draws on the CPU are the same on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
