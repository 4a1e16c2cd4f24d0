"""FuseFL: clients' networks trained and fused block by block (Tang et al., NeurIPS 2024).

"FuseFL: One-Shot Federated Learning through the Lens of Causality with Progressive Model Fusion"
(arXiv 2410.20380). Models that are trained alone fit what is spurious in their own shard. FuseFL lets
each later block see the features of all clients: from the first block to the last, every client trains,
the server puts all clients' blocks side by side and freezes them, and the next blocks are trained on
their fused features. All messages up together are one model per client; there are as many exchanges as
stages, and inference runs every client's blocks.

Published values, from the official code (github.com/wizard1203/FuseFL): split number 2 (scripts also 4
and 8), adaptor `avg` (scripts: 1×1 convolution), classifier `avg`, SGD with lr 0.01 and momentum 0.9,
batches of 128; 100 epochs for each of 2 stages or 50 for each of 4, against 200 for plain training.
Training here is the other methods': `client.*`, its epochs divided over the stages in the same way.

What a ViT changed:
- Stages end between transformer blocks. Patch embedding, CLS and positions go with the first, final norm
  and head with the last; all tokens, CLS too, are fused.
- The 1×1 convolution becomes one linear layer on the members' tokens side by side, the same for every
  token. It starts as their average, not at random: the next blocks are pretrained and expect tokens of
  their own kind. Choice: the server averages the clients' adaptors by n_k; in the official code each
  client's adaptor stays with its own next block.
- The official `avg` classifier sums the members' last features, averages the heads and calibrates them on
  statistics of the clients' features. Here no statistics leave a client: every member keeps its head,
  and the logits are combined by the run's `ensemble.mode`.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..core.machine import device
from ..core.progress import timed
from ..core.store import Store
from ..server.ensemble import client_weights
from ..server.fused import Fused
from ..settings import Settings
from ..settings.schema import FuseflSettings
from ..upload import Card, ModelShape, check_arrays, check_same_shape, wire_bytes
from ._method import Method, Outcome


class Client(Protocol):
    """The interface of a FuseFL client: metadata, and one training call per stage."""

    client: int
    size: int
    shape: ModelShape
    class_counts: tuple[int, ...] | None

    def train_stage(self, stage: int, received: dict[str, Tensor]) -> dict[str, Tensor]:
        """Train a stage on top of the fused stages before it, and return its arrays.

        received: the arrays of the fused stage before it (`FusedStages.part`); empty for the first stage.
        """
        ...


def fusefl(clients: Sequence[Client], settings: Settings, store: Store) -> Outcome:
    """Train and fuse stage by stage, in one exchange of messages for each stage.

    seconds are the server's own; the clients keep theirs. Bytes up: every stage's message, and each
    client's card once. Bytes down: the shared model, then every fused stage but the last, to every
    client. Raises BadInput for no clients, several architectures, more stages than blocks, and a message
    whose arrays are not those of its stage.
    """
    check_same_shape(clients)
    counted, stages = settings.ensemble.mode == "class", settings.fusefl.stages
    shape, sizes = clients[0].shape, [c.size for c in clients]
    weights = client_weights(clients, settings.ensemble.mode)
    fused = Fused([shape.build() for _ in clients], settings.fusefl, weights, settings.ensemble.mode)
    up = sum(card_bytes(c, counted) for c in clients)
    down = len(clients) * wire_bytes(fused.members[0].state_dict())
    received: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for stage in range(stages):
        messages = [stage_message(client, stage, received, fused) for client in clients]
        up += sum(wire_bytes(message) for message in messages)
        with timed(seconds, "fusing"):
            fused.take(stage, messages, sizes)
        if stage < stages - 1:
            received = fused.part(stage)
            down += len(clients) * wire_bytes(received)
    return Outcome([fused.to(device())], seconds, uplink_bytes=up, downlink_bytes=down)


def stage_message(client: Client, stage: int, received: dict[str, Tensor], fused: Fused) -> dict[str, Tensor]:
    """Have one client train a stage, and check its message on arrival."""
    message = client.train_stage(stage, received)
    check_arrays(f"stage {stage} of client {client.client}", message, fused.expected(stage))
    return message


def card_bytes(client: Client, counted: bool) -> int:
    """Count the bytes of a client's card, with its class histogram c_k only where `counted`."""
    counts = client.class_counts if counted else None
    card = Card(client=client.client, size=client.size, shape=client.shape, class_counts=counts)
    return card.bytes


METHOD = Method(
    name="fusefl",
    run=fusefl,
    label="FuseFL",
    family="fusion",
    citation="Tang et al., NeurIPS 2024",
    settings=FuseflSettings,
    search={
        "ensemble.mode": ("mean_probs", "mean_logits", "size", "class"),
        "fusefl.stages": (2, 4),  # in one stage nothing is fused: that is the ensemble
        "fusefl.adaptor": ("average", "linear"),
    },
    given="stages",
    averages=True,
    single_model=False,
    exchanges="fusefl.stages",
)
