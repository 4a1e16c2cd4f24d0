"""Floating-point operations: counted as torch counts them, and in closed form.

Matrix products only, a multiply-add as two. torch does not know every fused attention kernel, so attention is
counted as plain products: two forward and four backward, and nothing that a kernel computes twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..core.rng import make_rng
from ..server.ensemble import Ensemble
from ..vision.patches import PatchGrid
from ..vision.tokens import class_logits, image_logits, read_by_head


def count_flops(function: Callable[[], object]) -> int:
    """Count the floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@torch.inference_mode()
def inference_flops(model: nn.Module, image: Tensor) -> int:
    """Floating-point operations of any model on one image (1, ch, H, W), as torch counts them."""
    at = next((p.device for p in model.parameters()), image.device)
    forward = partial(image_logits, model) if isinstance(model, VisionTransformer) else model
    return count_flops(lambda: forward(image.to(at)))


def forward_flops(vit: VisionTransformer, patches: int) -> int:
    """Floating-point operations of one image's forward pass on that many patches, up to the classifier.

    Matrix products only, a multiply-add as two: embedding, the blocks' linear layers, and attention,
    which grows with the square of the tokens. In the last block only what the classifier reads counts.
    """
    tokens = patches + vit.num_prefix_tokens
    rows = [tokens] * (len(vit.blocks) - 1) + [read_by_head(vit) or tokens]
    blocks = sum(block_multiplications(b, tokens, n) for b, n in zip(vit.blocks, rows, strict=True))
    return 2 * (patches * vit.patch_embed.proj.weight.numel() + blocks)


def block_multiplications(block: Block, tokens: int, rows: int) -> int:
    """Of one block, for its first `rows` tokens: keys and values need all, the rest these rows alone."""
    qkv = block.attn.qkv.weight.numel()
    linear = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
    attention = 2 * rows * tokens * block.attn.attn_dim
    return tokens * 2 * qkv // 3 + rows * (linear - 2 * qkv // 3) + attention


@dataclass(frozen=True)
class Pass:
    """One image through one model: floating-point operations, and bytes kept for the backward pass."""

    flops: int
    kept: int


def one_pass(vit: VisionTransformer, patches: int, wanted: str = "") -> Pass:
    """The cost of one image of that many patches through a model on the meta device.

    wanted: the gradient that follows, of the "image", of the "weights", or "" for the answer alone. In
    float32, attention as plain matrix products: an upper bound of the memory of fused kernels.
    """
    vit.requires_grad_(wanted == "weights")
    width = vit.patch_embed.proj.weight[0].numel()
    view = torch.empty(1, patches, width, device="meta", requires_grad=wanted == "image")
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    place = torch.arange(patches, device="meta")[None]

    def run() -> None:
        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.set_grad_enabled(bool(wanted)):
            logits = class_logits(vit, view, place)
        if wanted:
            logits.sum().backward()

    return Pass(count_flops(run), sum(kept.values()))


def image_flops(ensemble: Ensemble, patches: int) -> int:
    """Floating-point operations of the ensemble's loss and its gradient, for one image on that many patches.

    Matrix products only, as torch counts them. It does not know every fused attention kernel, so attention
    runs as plain products here: two forward and four backward, and nothing that a kernel computes twice.
    """
    shape = PatchGrid.of(ensemble.members[0])
    at = ensemble.weights.device
    width = shape.channels * shape.patch[0] * shape.patch[1]
    view = torch.randn(1, patches, width, generator=make_rng(0, "bench")).to(at).requires_grad_()
    place = torch.arange(patches, device=at)[None]
    return count_flops(lambda: torch.autograd.grad(ensemble.forward_patches(view, place)[:, 0].sum(), view))
