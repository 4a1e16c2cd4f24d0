"""ViTs cut into stages of consecutive blocks, and several of them fused stage by stage (FuseFL).

Nothing here trains: `client.fusefl` trains stages, `server.fused` and `methods.fusefl` fuse them. K is the
number of members, P the prefix tokens and N the patches of a ViT, d its width.
"""

import itertools
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core.errors import BadInput
from ..settings.schema import FuseflSettings
from .attention import run_blocks
from .tokens import embed_patches, kept_patches, read_by_head

# What comes before the blocks belongs to the first stage; what is neither this nor a block, to the last.
BEFORE_BLOCKS = ("patch_embed.", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre.")


def stage_blocks(depth: int, count: int) -> list[range]:
    """Divide a ViT's `depth` blocks over `count` stages as equally as can be, longer stages first.

    Raises BadInput when there are more stages than blocks.
    """
    if count > depth:
        raise BadInput(
            f"fusefl.stages={count} is more than the model's {depth} blocks: allowed are 1 to {depth}"
        )
    ends = [0, *itertools.accumulate(_shares(depth, count))]
    return [range(*pair) for pair in itertools.pairwise(ends)]


def stage_epochs(epochs: int, count: int) -> list[int]:
    """Divide local epochs over `count` stages as equally as can be, at least one each."""
    return [max(1, share) for share in _shares(epochs, count)]


def _shares(total: int, count: int) -> list[int]:
    """Divide `total` into `count` whole parts that differ by one at most, larger first."""
    return [total // count + (i < total % count) for i in range(count)]


def stage_names(vit: VisionTransformer, count: int, stage: int) -> list[str]:
    """List the state-dict entries of one of `count` stages; every entry belongs to exactly one stage."""
    blocks = stage_blocks(len(vit.blocks), count)[stage]

    def belongs(name: str) -> bool:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) in blocks
        return stage == (0 if name.startswith(BEFORE_BLOCKS) else count - 1)

    return [name for name in vit.state_dict() if belongs(name)]


def stage_tokens(
    vit: VisionTransformer, x: Tensor, stage: int, count: int, rows: int | None = None
) -> Tensor:
    """Run one of `count` stages; return its tokens (B, P + N, d), normalised after the last stage.

    x: images (B, ch, H, W) for the first stage, the previous stage's tokens for the others. With `rows` the
    last stage returns only the first so many tokens, (B, rows, d).
    """
    blocks = stage_blocks(len(vit.blocks), count)[stage]
    tokens = x if stage else embed_patches(vit, *kept_patches(vit, x))
    last = stage == count - 1
    tokens = run_blocks(vit.blocks[blocks.start : blocks.stop], tokens, rows if last else None)
    return vit.norm(tokens) if last else tokens


def run_stage(vit: VisionTransformer, x: Tensor, stage: int, count: int) -> Tensor:
    """Run one stage as `stage_tokens`, the last to class logits (B, C): all stages in a row are the ViT."""
    tokens = stage_tokens(vit, x, stage, count, read_by_head(vit))
    return vit.forward_head(tokens) if stage == count - 1 else tokens


def average_adaptor(members: int, width: int) -> nn.Linear:
    """Make a linear adaptor K·d -> d that averages K members' tokens until it is trained."""
    adaptor = nn.utils.skip_init(nn.Linear, members * width, width)  # draws no random numbers
    with torch.no_grad():
        adaptor.weight.copy_(torch.eye(width).repeat(1, members) / members)  # [I … I] / K, (d, K·d)
        adaptor.bias.zero_()
    return adaptor


def fuse_tokens(tokens: Tensor, adaptor: nn.Linear | None = None) -> Tensor:
    """Fuse K members' tokens (K, B, T, d) to (B, T, d): their mean, or the adaptor on them side by side."""
    if adaptor is None:
        return tokens.mean(dim=0)
    return adaptor(tokens.permute(1, 2, 0, 3).flatten(2))  # (B, T, K·d)


def adaptor_arrays(adaptor: nn.Linear | None) -> dict[str, Tensor]:
    """Name an adaptor's arrays as a client's message does, `adaptor.*`; none for the average."""
    return {f"adaptor.{name}": v for name, v in adaptor.state_dict().items()} if adaptor else {}


class FusedStages(nn.Module):
    """K ViTs of one shape that exchange features between stages.

    Stage s of every member reads the fused tokens of all members' stages s − 1. The module is frozen and in
    evaluation mode; a forward pass costs as much as those of K models.
    """

    def __init__(self, members: Sequence[VisionTransformer], settings: FuseflSettings) -> None:
        """Take the members without a copy; BadInput when settings.stages is more than their blocks."""
        super().__init__()
        count, self.stages = len(members), settings.stages
        stage_blocks(len(members[0].blocks), self.stages)
        self.members = nn.ModuleList(members)
        boundaries = self.stages - 1 if settings.adaptor == "linear" else 0
        self.adaptors = nn.ModuleList(average_adaptor(count, members[0].embed_dim) for _ in range(boundaries))
        self.eval().requires_grad_(False)

    def outputs(self, images: Tensor, stage: int) -> Tensor:
        """Run all members to the end of a stage: tokens (K, B, P + N, d), after the last logits (K, B, C)."""
        x = images
        for s in range(stage + 1):
            each = torch.stack([run_stage(member, x, s, self.stages) for member in self.members])
            if s < stage:
                x = fuse_tokens(each, self.adaptors[s] if self.adaptors else None)
        return each

    def part(self, stage: int) -> dict[str, Tensor]:
        """Copy one stage's arrays to the CPU, under this module's names: what the server sends to clients.

        They are all members' entries of the stage and, where there is one, the adaptor before it.
        """
        names = stage_names(self.members[0], self.stages, stage)
        wanted = {f"members.{k}.{name}" for k in range(len(self.members)) for name in names}
        before = f"adaptors.{stage - 1}."
        return {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in self.state_dict().items()
            if name in wanted or name.startswith(before)
        }
