"""Floating-point operations of a pass through a model: counted as torch counts them, and in closed form.

Only matrix products count, a multiply-add as two operations. torch does not know every fused attention
kernel, so attention is counted as plain products: two forward and four backward, and nothing that a kernel
computes twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

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
    """Count the floating-point operations of one call of a function."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


@torch.inference_mode()
def inference_flops(model: nn.Module, image: Tensor) -> int:
    """Count the floating-point operations of any model's prediction for one image (1, ch, H, W)."""
    at = next((p.device for p in model.parameters()), image.device)
    forward = partial(image_logits, model) if isinstance(model, VisionTransformer) else model
    return count_flops(lambda: forward(image.to(at)))


def forward_flops(vit: VisionTransformer, patches: int) -> int:
    """Compute the floating-point operations of one image's forward pass on so many patches, without the head.

    A closed form: the patch embedding, the blocks' linear layers, and attention, which grows with the square
    of the tokens. The last block computes only the tokens that the head reads.
    """
    tokens = patches + vit.num_prefix_tokens
    rows = [tokens] * (len(vit.blocks) - 1) + [read_by_head(vit) or tokens]
    blocks = sum(_block_multiply_adds(b, tokens, n) for b, n in zip(vit.blocks, rows, strict=True))
    return 2 * (patches * vit.patch_embed.proj.weight.numel() + blocks)


def _block_multiply_adds(block: Block, tokens: int, rows: int) -> int:
    """Count the multiply-adds of one transformer block that outputs only its first `rows` tokens.

    Keys and values are computed for all tokens, queries and the MLP for `rows` of them.
    """
    qkv = block.attn.qkv.weight.numel()
    linear = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
    attention = 2 * rows * tokens * block.attn.attn_dim  # Q Kᵀ and A V
    return tokens * 2 * qkv // 3 + rows * (linear - 2 * qkv // 3) + attention


@dataclass(frozen=True)
class Pass:
    """The cost of one image's pass through one model: operations, and bytes kept for the backward pass."""

    flops: int
    kept: int


def one_pass(vit: VisionTransformer, patches: int, wanted: Literal["", "image", "weights"] = "") -> Pass:
    """Count the cost of one image of so many patches in a model on the meta device.

    wanted: the gradient that is taken, with respect to the "image" or the "weights"; "" for a forward pass
    alone. Bytes are those of float32 and of attention as plain matrix products, an upper bound of what fused
    kernels keep.
    """
    vit.requires_grad_(wanted == "weights")
    width = vit.patch_embed.proj.weight[0].numel()
    view = torch.empty(1, patches, width, device="meta", requires_grad=wanted == "image")  # (1, M, ch·p·p)
    positions = torch.arange(patches, device="meta")[None]  # (1, M)
    kept: dict[int, int] = {}  # bytes of every storage, so that tensors that share one count once

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    def run() -> None:
        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.set_grad_enabled(bool(wanted)):
            logits = class_logits(vit, view, positions)
        if wanted:
            logits.sum().backward()

    return Pass(count_flops(run), sum(kept.values()))


def image_flops(ensemble: Ensemble, patches: int) -> int:
    """Count the floating-point operations of the ensemble's loss and its gradient with respect to one image.

    patches: how many of the image's patches are left.
    """
    grid, at = PatchGrid.of(ensemble.members[0]), ensemble.weights.device
    width = grid.channels * grid.patch[0] * grid.patch[1]
    view = torch.randn(1, patches, width, generator=make_rng(0, "bench")).to(at).requires_grad_()
    positions = torch.arange(patches, device=at)[None]

    def run() -> None:
        log_probs = ensemble.forward_patches(view, positions)  # (1, C)
        torch.autograd.grad(log_probs[:, 0].sum(), view)

    return count_flops(run)
