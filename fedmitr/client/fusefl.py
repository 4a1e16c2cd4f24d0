"""The client's side of FuseFL: local training stage by stage, on the fused earlier stages of all clients."""

import copy
import hashlib
from collections.abc import Callable
from functools import partial

import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core.machine import device
from ..core.rng import make_rng
from ..core.store import Store, fingerprint, read_tensors, write_tensors
from ..data.tasks import Split
from ..settings.schema import ClientSettings, FuseflSettings
from ..upload import ModelShape, check_arrays
from ..vision.stages import (
    FusedStages,
    adaptor_arrays,
    average_adaptor,
    fuse_tokens,
    stage_blocks,
    stage_epochs,
    stage_names,
    stage_tokens,
)
from .train import fedprox, fit, steps_of, token_loss


class FusionClient:
    """A client of FuseFL, which trains the shared model stage by stage and sends every stage once.

    Each stage goes on from the client's own later blocks, behind the fused stages of all clients. Choice:
    `settings.epochs` are divided over the stages as equally as can be, at least one each, so that local work
    equals the other methods'. With one stage it trains as `train_client` does, on the same batches.
    """

    def __init__(
        self,
        initial: VisionTransformer,
        shard: Split,
        settings: ClientSettings,
        fusion: FuseflSettings,
        store: Store,
        *,
        client: int,
        key: str,
        name: str = "vit_micro",
        seed: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Keep what the client trains on; nothing is trained yet.

        key is the address of everything that made the client: data, settings, seed, initial weights. store
        keeps the client's own model after each stage, so that a killed run goes on from there; that model is
        never sent. progress is called with 1 after each step, and with all steps of a stage that comes from
        the store. Raises BadInput for more stages than blocks.
        """
        stage_blocks(len(initial.blocks), fusion.stages)
        self.client, self.size, self.key = client, len(shard), key
        self.shape = ModelShape.of(name, initial)
        self.class_counts = tuple(torch.bincount(shard.labels, minlength=initial.num_classes).tolist())
        self._initial, self._shard, self._settings, self._fusion = initial, shard, settings, fusion
        self._store, self._seed, self.progress = store, seed, progress or (lambda steps: None)
        self._start_anew()

    def _start_anew(self) -> None:
        """Forget all stages trained and received so far."""
        self._own = self._initial.state_dict()  # this client's weights after its last stage
        self._received: dict[str, Tensor] = {}  # all fused stages so far
        self._received_hashes: list[str] = []  # of what was received, one for each stage
        self._keys: list[str] = []  # addresses of the stages so far

    @property
    def steps(self) -> int:
        """The number of optimiser steps over all stages."""
        return sum(self._steps(stage) for stage in range(self._fusion.stages))

    def _steps(self, stage: int) -> int:
        """Count the optimiser steps of one stage."""
        epochs = stage_epochs(self._settings.epochs, self._fusion.stages)[stage]
        return steps_of(self.size, epochs, self._settings)

    @property
    def seconds(self) -> float:
        """The seconds that the stages so far took when they were trained."""
        return sum(self._store.seconds("fuse", key) for key in self._keys)

    def train_stage(self, stage: int, received: dict[str, Tensor]) -> dict[str, Tensor]:
        """Train this stage and all later ones behind the fused earlier stages; return this stage's arrays.

        Stages come in order; the first, for which nothing is received, starts anew. received: all members'
        arrays of the previous stage, named as `FusedStages.part` does. The returned arrays have the model's
        own names and, for linear fusion, `adaptor.*` of the boundary before the stage. Raises BadInput for
        received arrays that do not fit, ValueError for a stage out of order.
        """
        if stage == 0:
            self._start_anew()
        if stage != len(self._keys):
            raise ValueError(f"stages come in order: {len(self._keys)} is next, not {stage}")
        known = {**self._received, **received}
        hashes = [*self._received_hashes, hashlib.sha256(save(received)).hexdigest()]
        key = fingerprint("fuse", self.key, self._fusion.model_dump(), stage, hashes)
        state = self._stored(key, stage, known)
        self._own = {name: state[name] for name in self._own}
        self._received, self._received_hashes, self._keys = known, hashes, [*self._keys, key]
        sent = {*stage_names(self._initial, self._fusion.stages, stage), *(state.keys() - self._own.keys())}
        return {name: value for name, value in state.items() if name in sent}

    def _stored(self, key: str, stage: int, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the own model after a stage, and `adaptor.*`: from the store, or trained now and stored."""
        if self._store.has("fuse", key):
            self.progress(self._steps(stage))
        path = "state.safetensors"
        return self._store.get(
            "fuse",
            key,
            read=lambda folder: self._checked(read_tensors(folder / path), stage, known),
            make=lambda: self._checked(self._train(stage, known), stage, known),
            write=lambda state, folder: write_tensors(state, folder / path),
        )

    def _checked(self, state: dict[str, Tensor], stage: int, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state; BadInput if training diverged, which must not reach the store or the server."""
        expected = self._initial.state_dict() | adaptor_arrays(self._adaptor(stage, known))
        check_arrays(f"stage {stage} of client {self.client}", state, expected)
        return state

    def _train(self, stage: int, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """Minimise the local loss over what is not fused yet; return the own weights, and `adaptor.*`."""
        settings, at = self._settings, device()
        rng = make_rng(self._seed, "client", self.client, *([stage] if stage else []))
        own, front = self._model(stage).to(at), self._front(stage, known)
        adaptor = self._adaptor(stage, known)
        models = [own, adaptor.to(at)] if adaptor else [own]

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            tokens = partial(self._features, own, adaptor, front, images, stage)
            return token_loss(own, tokens, labels, settings) + fedprox(own, self._initial, settings)

        epochs = stage_epochs(settings.epochs, self._fusion.stages)[stage]
        fit(models, loss, self._shard, settings, epochs, rng, self.progress)
        state = own.state_dict() | adaptor_arrays(adaptor)
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def _model(self, stage: int) -> VisionTransformer:
        """Build this client's model as its last stage left it, with the stages fused so far frozen."""
        own = copy.deepcopy(self._initial)
        own.load_state_dict(self._own)
        own.train().requires_grad_(True)
        fused = {name for s in range(stage) for name in stage_names(own, self._fusion.stages, s)}
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(name not in fused)
        return own

    def _adaptor(self, stage: int, known: dict[str, Tensor]) -> nn.Linear | None:
        """Make the adaptor before a stage as training starts from it, the average; None if it stays that."""
        if stage == 0 or self._fusion.adaptor == "average":
            return None
        return average_adaptor(_members(known), self._initial.embed_dim)

    def _front(self, stage: int, known: dict[str, Tensor]) -> FusedStages | None:
        """Build all members' stages before this one, frozen; BadInput for arrays that do not fit."""
        if stage == 0:
            return None
        front = FusedStages([copy.deepcopy(self._initial) for _ in range(_members(known))], self._fusion)
        expected = {name: value for s in range(stage) for name, value in front.part(s).items()}
        check_arrays(f"message of the server to client {self.client}", known, expected)
        front.load_state_dict(known, strict=False)
        return front.to(device())

    def _features(
        self,
        own: VisionTransformer,
        adaptor: nn.Linear | None,
        front: FusedStages | None,
        images: Tensor,
        stage: int,
        rows: int | None,
    ) -> Tensor:
        """Compute normalised output tokens (B, P + N, d), or their first `rows`.

        The images pass the fused stages of all members, then this client's own stages.
        """
        x = images
        if front:
            with torch.no_grad():
                each = front.outputs(images, stage - 1)  # (K, B, P + N, d)
            x = fuse_tokens(each, adaptor)  # (B, P + N, d)
        for later in range(stage, self._fusion.stages):
            x = stage_tokens(own, x, later, self._fusion.stages, rows)
        return x


def _members(received: dict[str, Tensor]) -> int:
    """Count the members in a message of the server.

    It is at least one, so that an empty message is refused with the name of the first array that it lacks.
    """
    return max(1, len({name.split(".")[1] for name in received if name.startswith("members.")}))
