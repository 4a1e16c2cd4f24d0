"""timm's transformer blocks with less work: only the rows that are read, and on CPUs explicit products.

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
    """Run timm blocks on tokens (B, L, d); return (B, L, d), or the first `rows` tokens, (B, rows, d).

    The last block computes these rows alone. That is exact: none of its other outputs enters them.
    """
    for block in blocks[:-1]:
        tokens = _run(block, tokens)
    return _run(blocks[-1], tokens, rows) if len(blocks) else tokens


def _run(block: Block, tokens: Tensor, rows: int | None = None) -> Tensor:
    """Run one block on tokens (B, L, d): timm's own forward unless a cheaper way gives the same."""
    if (rows is None or rows == tokens.shape[1]) and not _per_sample(tokens):
        if not _explicit(block.attn, tokens):
            return block(tokens)
        mixed, skip = _mix_all(block.attn, block.norm1(tokens)), tokens
    else:
        rows = tokens.shape[1] if rows is None else rows
        mixed, skip = _mix_rows(block.attn, block.norm1(tokens), rows), tokens[:, :rows]
    tokens = skip + block.drop_path1(block.ls1(mixed))  # x + Attention(LN(x))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))  # x + MLP(LN(x))


def attention_weights(attention: Attention, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Compute the attention of the first `rows` of tokens (B, L, d) to all of them.

    Returns the weights softmax(s·QKᵀ), (B, heads, rows, L), and the values V, (B, heads, L, D).
    """
    batch, length, _ = tokens.shape
    sizes = [attention.attn_dim, 2 * attention.attn_dim]
    query_weight, rest_weight = attention.qkv.weight.split(sizes)
    bias = (None, None) if attention.qkv.bias is None else attention.qkv.bias.split(sizes)
    shape = (attention.num_heads, attention.head_dim)
    query = F.linear(tokens[:, :rows], query_weight, bias[0]).view(batch, rows, *shape).transpose(1, 2)
    rest = F.linear(tokens, rest_weight, bias[1]).view(batch, length, 2, *shape)  # K and V
    key, value = rest.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, D) each
    query, key = attention.q_norm(query), attention.k_norm(key)
    return (attention.scale * query @ key.transpose(-2, -1)).softmax(dim=-1), value


def _mix_rows(attention: Attention, tokens: Tensor, rows: int) -> Tensor:
    """Compute the attention layer's output for the first `rows` of tokens (B, L, d): (B, rows, d)."""
    weights, value = attention_weights(attention, tokens, rows)
    mixed = attention.attn_drop(weights.to(value)) @ value  # (B, heads, rows, D)
    return _project(attention, mixed.transpose(1, 2).flatten(2), tokens[:, :rows])


def _mix_all(attention: Attention, tokens: Tensor) -> Tensor:
    """Compute the attention layer's output for all tokens (B, L, d) by explicit products."""
    batch, length, _ = tokens.shape
    qkv = attention.qkv(tokens).view(batch, length, 3, attention.num_heads, attention.head_dim)
    return _project(attention, _Products.apply(qkv, attention.scale), tokens)


def _project(attention: Attention, mixed: Tensor, tokens: Tensor) -> Tensor:
    """Apply what follows the mixing of values in timm's Attention: (B, R, heads·D) -> (B, R, d)."""
    mixed = attention.norm(mixed)
    if attention.gate is not None:
        mixed = mixed * attention.gate(tokens).sigmoid()
    return attention.proj_drop(attention.proj(mixed))


def _explicit(attention: Attention, tokens: Tensor) -> bool:
    """Whether `_Products` computes the same as the fused kernel, and faster."""
    plain = isinstance(attention.q_norm, torch.nn.Identity)
    dropped = attention.training and attention.attn_drop.p > 0
    return plain and not dropped and tokens.device.type == "cpu" and tokens.shape[1] <= SHORT


def _per_sample(tokens: Tensor) -> bool:
    """Whether torch.func maps over images, as DP-SGD does: it knows the plain products alone."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tokens)


class _Products(torch.autograd.Function):
    """softmax(s·QKᵀ)V of packed Q, K, V (B, L, 3, heads, D) as (B, L, heads·D), and its gradient.

    With A = softmax(S) and S = s·QKᵀ: ∂V = Aᵀ∂O, ∂A = ∂O·Vᵀ, ∂S = A ⊙ (∂A − Σ_j A ⊙ ∂A), ∂Q = s·∂S·K and
    ∂K = s·∂Sᵀ·Q. Heads are batched: each product is one call.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, scale: float) -> Tensor:
        batch, length, _, heads, width = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, width).unbind(0)
        weights = _scaled(q, k.transpose(1, 2), scale).softmax(dim=-1)  # A, (B·heads, L, L)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, weights)
        mixed = torch.bmm(weights, v).view(batch, heads, length, width)
        return mixed.transpose(1, 2).reshape(batch, length, heads * width)

    @staticmethod
    def backward(ctx, grad_mixed: Tensor) -> tuple[Tensor, None]:
        q, k, v, weights = ctx.saved_tensors  # (B·heads, L, D) each, and (B·heads, L, L)
        batch, length, width = len(grad_mixed), q.shape[1], q.shape[2]
        heads = len(q) // batch
        grad_mixed = grad_mixed.view(batch, length, heads, width).transpose(1, 2).reshape(q.shape)
        grad_weights = torch.bmm(grad_mixed, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_qkv = grad_mixed.new_empty(batch, length, 3, heads, width)
        gradients = (
            _scaled(grad_scores, k, ctx.scale),
            _scaled(grad_scores.transpose(1, 2), q, ctx.scale),
            torch.bmm(weights.transpose(1, 2), grad_mixed),
        )
        for part, gradient in zip(grad_qkv.permute(2, 0, 3, 1, 4), gradients, strict=True):
            part.copy_(gradient.view(batch, heads, length, width))
        return grad_qkv, None


def _scaled(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """Compute scale · one @ other in one pass; beta=0 leaves the empty tensor unread."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=scale)
