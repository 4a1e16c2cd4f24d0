"""What a method leaves behind, and what it cost: the same account for all."""

from dataclasses import dataclass, field

from torch import nn

from ..inversion import SyntheticSet


@dataclass(frozen=True)
class Outcome:
    """models: one global model, or one per client (`local`).

    seconds of the server by stage, as measured when the stage was made; synthetic images the student
    learned from; its optimiser steps; how often clients and server exchanged messages; bytes up and
    down, where None means one upload per client and the shared model to each.
    """

    models: list[nn.Module]
    seconds: dict[str, float] = field(default_factory=dict)
    synthetic: SyntheticSet | None = None
    student_steps: int = 0
    exchanges: int = 1
    uplink_bytes: int | None = None
    downlink_bytes: int | None = None
