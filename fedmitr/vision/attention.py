"""A timm block run with less: only the rows that are read, and on CPUs attention as matrix products.

Measured in docs/performance.md: up to `SHORT` tokens explicit products with a hand-written gradient beat
torch's fused CPU kernel, a little in float32 and by a factor in bfloat16. Elsewhere timm's own forward runs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

SHORT = 256  # tokens up to which attention weights (B, heads, L, L) are small enough to keep


def run_blocks(blocks: Sequence[Block], tokens: Tensor, rows: int | None = None) -> Tensor:
    """timm blocks on tokens (B, L, d); rows: the last computes only the first so many: (B, rows, d).

    Exact: the rows that are left out enter nothing that is returned.
    """
    for block in blocks[:-1]:
        tokens = _run(block, tokens)
    return _run(blocks[-1], tokens, rows) if len(blocks) else tokens


def _run(block: Block, tokens: Tensor, rows: int | None = None) -> Tensor:
    if rows is None or rows == tokens.shape[1]:
        if not _explicit(block.attn, tokens):
            return block(tokens)
        mixed, stay = _mix_all(block.attn, block.norm1(tokens)), tokens
    else:
        mixed, stay = _mix_rows(block.attn, block.norm1(tokens), rows), tokens[:, :rows]
    tokens = stay + block.drop_path1(block.ls1(mixed))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def attention_weights(attention: Attention, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """How the first `rows` tokens look at all of (B, L, d).

    Returns attention weights (B, heads, rows, L) and the values (B, heads, L, D).
    """
    batch, length, _ = tokens.shape
    sizes = [attention.attn_dim, 2 * attention.attn_dim]
    of_query, of_rest = attention.qkv.weight.split(sizes)
    bias = (None, None) if attention.qkv.bias is None else attention.qkv.bias.split(sizes)
    shape = (attention.num_heads, attention.head_dim)
    query = F.linear(tokens[:, :rows], of_query, bias[0]).view(batch, rows, *shape).transpose(1, 2)
    rest = F.linear(tokens, of_rest, bias[1]).view(batch, length, 2, *shape)
    key, value = rest.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    return (attention.scale * query @ key.transpose(-2, -1)).softmax(dim=-1), value


def _mix_rows(attention: Attention, tokens: Tensor, rows: int) -> Tensor:
    weights, value = attention_weights(attention, tokens, rows)
    mixed = attention.attn_drop(weights.to(value)) @ value
    return _project(attention, mixed.transpose(1, 2).flatten(2), tokens[:, :rows])


def _mix_all(attention: Attention, tokens: Tensor) -> Tensor:
    batch, length, _ = tokens.shape
    qkv = attention.qkv(tokens).view(batch, length, 3, attention.num_heads, attention.head_dim)
    return _project(attention, _Products.apply(qkv, attention.scale), tokens)


def _project(attention: Attention, mixed: Tensor, tokens: Tensor) -> Tensor:
    """What follows the mixing of values in timm's Attention: (B, R, heads·D) -> (B, R, d)."""
    mixed = attention.norm(mixed)
    if attention.gate is not None:
        mixed = mixed * attention.gate(tokens).sigmoid()
    return attention.proj_drop(attention.proj(mixed))


def _explicit(attention: Attention, tokens: Tensor) -> bool:
    """Whether `_Products` can take the place of the fused kernel, and pays."""
    plain = isinstance(attention.q_norm, torch.nn.Identity)
    dropped = attention.training and attention.attn_drop.p > 0
    return plain and not dropped and tokens.device.type == "cpu" and tokens.shape[1] <= SHORT


class _Products(torch.autograd.Function):
    """softmax(s·QKᵀ)V of packed (B, L, 3, heads, D) as (B, L, heads·D), and its gradient: six products."""

    @staticmethod
    def forward(ctx, qkv: Tensor, scale: float) -> Tensor:
        batch, length, _, heads, width = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, width).unbind(0)
        weights = _scaled(q, k.transpose(1, 2), scale).softmax(dim=-1)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, weights)
        mixed = torch.bmm(weights, v).view(batch, heads, length, width)
        return mixed.transpose(1, 2).reshape(batch, length, heads * width)

    @staticmethod
    def backward(ctx, of_mixed: Tensor) -> tuple[Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        batch, length, width = len(of_mixed), q.shape[1], q.shape[2]
        heads = len(q) // batch
        of_mixed = of_mixed.view(batch, length, heads, width).transpose(1, 2).reshape(q.shape)
        of_weights = torch.bmm(of_mixed, v.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_qkv = of_mixed.new_empty(batch, length, 3, heads, width)
        gradients = (
            _scaled(of_scores, k, ctx.scale),
            _scaled(of_scores.transpose(1, 2), q, ctx.scale),
            torch.bmm(weights.transpose(1, 2), of_mixed),
        )
        for place, gradient in zip(of_qkv.permute(2, 0, 3, 1, 4), gradients, strict=True):
            place.copy_(gradient.view(batch, heads, length, width))
        return of_qkv, None


def _scaled(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """scale · one @ other in one pass."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=scale)
