"""What tests share beside fixtures: tiny models with large weights, and uploads made of them."""

import torch

import fedmitr as fm
from fedmitr.upload import ModelShape

CLASSES = 10


def loud(vit, seed: int, scale: float = 0.15):
    """A ViT with weights large enough that CLS, positions and every token tell in the output."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in vit.parameters():
            p += scale * torch.randn(p.shape, generator=rng)
    return vit.eval()


def make_upload(client: int, counts: tuple[int, ...], scale: float = 0.15, side: int = 24) -> fm.Upload:
    """An upload of a random ViT-Micro."""
    vit = loud(fm.create_vit("vit_micro", CLASSES, image_size=side), seed=100 + client, scale=scale)
    weights = {k: v.detach().clone() for k, v in vit.state_dict().items()}
    return fm.Upload(client, sum(counts), ModelShape.of("vit_micro", vit), weights, counts)


def same(a, b) -> bool:
    """Whether two synthetic sets agree in every byte."""
    columns = ("pixels", "labels", "mask", "loss")
    return all(torch.equal(getattr(a, c), getattr(b, c)) for c in columns) and all(
        torch.equal(a.history[n], b.history[n]) for n in a.history
    )
