"""The server's side of FuseFL: all clients' stages in one network, whose logits are combined as in step 2."""

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..settings.schema import FuseflSettings
from ..vision.stages import FusedStages, adaptor_arrays, stage_names
from .ensemble import combine


class Fused(FusedStages):
    """`FusedStages` whose members' logits after the last stage are combined like an ensemble's."""

    def __init__(
        self,
        members: Sequence[VisionTransformer],
        settings: FuseflSettings,
        weights: Tensor | None = None,
        mode: str = "mean_logits",
    ) -> None:
        """Build the network; weights (K, 1) or (K, C) and mode as in `ensemble.combine`, by default 1/K each.

        Raises BadInput when settings.stages is more than the members' blocks.
        """
        super().__init__(members, settings)
        count, self.mode = len(members), mode
        self.register_buffer("weights", torch.full((count, 1), 1 / count) if weights is None else weights)

    def forward(self, images: Tensor) -> Tensor:
        """Return log-probabilities (B, C) of images (B, ch, H, W)."""
        return combine(self.outputs(images, self.stages - 1), self.weights, self.mode)

    def expected(self, stage: int) -> dict[str, Tensor]:
        """Return the arrays that a client's message of a stage must hold, `adaptor.*` where it trains one."""
        state = self.members[0].state_dict()
        arrays = {name: state[name] for name in stage_names(self.members[0], self.stages, stage)}
        if stage and self.adaptors:
            arrays |= adaptor_arrays(self.adaptors[stage - 1])
        return arrays

    def take(self, stage: int, messages: Sequence[dict[str, Tensor]], sizes: Sequence[int]) -> None:
        """Load the members' checked messages of one stage; adaptors are averaged by size n_k."""
        for member, message in zip(self.members, messages, strict=True):
            member.load_state_dict(
                {n: message[n] for n in stage_names(member, self.stages, stage)}, strict=False
            )
        if stage and self.adaptors:
            adaptor, total = self.adaptors[stage - 1], sum(sizes)
            for name, value in adaptor.state_dict().items():
                parts = zip(messages, sizes, strict=True)
                value.copy_(sum(m[f"adaptor.{name}"].double() * (n / total) for m, n in parts))
