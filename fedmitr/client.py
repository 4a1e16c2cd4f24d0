"""Local training: a shard and the shared initial model in, one Upload out (method step 1)."""

import copy
import hashlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .augment import random_maps, warp
from .blocks import ClientSettings, FuseflSettings
from .fuse import (
    Fused,
    adaptor_arrays,
    average_adaptor,
    check_arrays,
    fuse_tokens,
    stage_blocks,
    stage_epochs,
    stage_names,
    stage_tokens,
)
from .optim import make_optimizer, make_schedule
from .runtime import autocast, device, generator
from .store import Store, fingerprint, read_tensors, write_tensors
from .tasks import Split
from .upload import ModelShape, Upload
from .vit import kept_patches, patch_features, read_by_head, token_logits


def train_client(
    initial: VisionTransformer,
    shard: Split,
    settings: ClientSettings,
    *,
    client: int,
    name: str = "vit_micro",
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Upload:
    """Minimise cross-entropy on the shard from the shared model; the initial model is left as it is.

    name is the shared model's name as `create_vit` takes it. progress is called with 1 after each
    step. The upload carries the class histogram; `Upload.without_counts` drops it.
    """
    at, rng = device(), generator(seed, "client", client)
    torch.manual_seed(torch.randint(2**31, (1,), generator=rng).item())  # dropout in models that have it
    vit = copy.deepcopy(initial).to(at).train()
    images, labels = shard.images.to(at), shard.labels.to(at)
    optimizer = make_optimizer(vit, settings.optimizer, settings.lr, settings.weight_decay, settings.momentum)
    schedule = make_schedule(optimizer, settings.schedule, local_steps(len(shard), settings))
    for _ in range(settings.epochs):
        for pick in torch.randperm(len(shard), generator=rng).split(settings.batch_size):
            batch = images[pick.to(at)]
            if settings.augment:
                batch = warp(batch, random_maps(len(pick), settings.augment, rng))
            loss = local_loss(vit, batch, labels[pick.to(at)], settings) + fedprox(vit, initial, settings)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress:
                progress(1)
    counts = torch.bincount(shard.labels, minlength=vit.num_classes)
    return Upload(
        client=client,
        size=len(shard),
        shape=ModelShape.of(name, vit),
        weights={k: v.detach().cpu().contiguous() for k, v in vit.state_dict().items()},
        class_counts=tuple(counts.tolist()),
    ).checked()  # training that diverged must not reach the store or the server


def local_loss(vit: VisionTransformer, images: Tensor, labels: Tensor, settings: ClientSettings) -> Tensor:
    """The local loss of images (B, ch, H, W): `loss_of_tokens` of the model's own tokens."""
    seen = kept_patches(vit, images)
    return loss_of_tokens(vit, lambda rows: patch_features(vit, *seen, rows), labels, settings)


def loss_of_tokens(
    vit: VisionTransformer,
    tokens: Callable[[int | None], Tensor],
    labels: Tensor,
    settings: ClientSettings,
) -> Tensor:
    """CE(z^0, y) + token_weight · (1/N) Σ_i CE(z^i, y), with label smoothing.

    tokens(rows) gives the normalised output tokens (B, P + N, d), or the first `rows` of them, which is
    all that the loss reads without token labels.
    """
    smooth, weight = settings.label_smoothing, settings.token_weight
    with autocast(settings.precision):
        features = tokens(None if weight else read_by_head(vit))
        of_cls = vit.forward_head(features)
        of_tokens = token_logits(vit, features) if weight else None
    loss = F.cross_entropy(of_cls.to(vit.pos_embed), labels, label_smoothing=smooth)
    if not weight:
        return loss
    each = labels[:, None].expand(-1, of_tokens.shape[1]).flatten()
    of_tokens = of_tokens.to(vit.pos_embed).flatten(0, 1)
    return loss + weight * F.cross_entropy(of_tokens, each, label_smoothing=smooth)


def fedprox(vit: VisionTransformer, initial: VisionTransformer, settings: ClientSettings) -> Tensor | float:
    """(μ/2)‖w − w_shared‖², which holds a client near the shared model (FedProx, Li et al. 2020)."""
    if not settings.fedprox:
        return 0.0
    pairs = zip(vit.parameters(), initial.parameters(), strict=True)
    return settings.fedprox / 2 * sum((w - shared.detach().to(w)).square().sum() for w, shared in pairs)


def local_steps(size: int, settings: ClientSettings) -> int:
    """Optimiser steps of one client with a shard of `size` images."""
    return settings.epochs * -(-size // settings.batch_size)


class FusionClient:
    """One client of FuseFL: trains the shared model stage by stage and sends every stage once.

    When the earlier stages are fused it goes on from its own later blocks. Choice: `settings.epochs`
    are divided over the stages as equally as can be, at least one each, so that local work equals the
    other methods'. With one stage it trains as `train_client` does, on the same batches.
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
        """key is the address of everything that made the client: data, settings, seed, initial weights.

        store keeps the client's own model after each stage, so that a killed run goes on from there;
        it is never sent. progress is called with 1 after each step, and with all steps of a stage that
        comes from the store. Raises BadInput for more stages than blocks.
        """
        stage_blocks(len(initial.blocks), fusion.stages)
        self.client, self.size, self.key = client, len(shard), key
        self.shape = ModelShape.of(name, initial)
        self.class_counts = tuple(torch.bincount(shard.labels, minlength=initial.num_classes).tolist())
        self._initial, self._shard, self._settings, self._fusion = initial, shard, settings, fusion
        self._store, self._seed, self.progress = store, seed, progress or (lambda steps: None)
        self._start_anew()

    def _start_anew(self) -> None:
        self._own = self._initial.state_dict()  # this client's weights after its last stage
        self._received: dict[str, Tensor] = {}  # all fused stages so far
        self._heard: list[str] = []  # hashes of what came down, one for each stage
        self._keys: list[str] = []  # addresses of the stages so far

    @property
    def steps(self) -> int:
        """Optimiser steps over all stages."""
        return sum(self._steps(stage) for stage in range(self._fusion.stages))

    def _steps(self, stage: int) -> int:
        epochs = stage_epochs(self._settings.epochs, self._fusion.stages)[stage]
        return epochs * -(-self.size // self._settings.batch_size)

    @property
    def seconds(self) -> float:
        """Seconds of the stages so far, as measured when they were trained."""
        return sum(self._store.seconds("fuse", key) for key in self._keys)

    def train_stage(self, stage: int, received: dict[str, Tensor]) -> dict[str, Tensor]:
        """Train this stage and all later ones on the fused stages before it; the arrays of this stage.

        Stages come in order; the first, for which nothing is received, starts anew. received: all
        members' arrays of the previous stage, as `Fused.part` names them. Returns the stage's entries
        under the model's own names and, for linear fusion, `adaptor.*` of the boundary before it.
        Raises BadInput for received arrays that do not fit.
        """
        if stage == 0:
            self._start_anew()
        if stage != len(self._keys):
            raise ValueError(f"stages come in order: {len(self._keys)} is next, not {stage}")
        known = {**self._received, **received}
        heard = [*self._heard, hashlib.sha256(save(received)).hexdigest()]
        key = fingerprint("fuse", self.key, self._fusion.model_dump(), stage, heard)
        state = self._kept(key, stage, known)
        self._own = {name: state[name] for name in self._own}
        self._received, self._heard, self._keys = known, heard, [*self._keys, key]
        sent = {*stage_names(self._initial, self._fusion.stages, stage), *(state.keys() - self._own.keys())}
        return {name: value for name, value in state.items() if name in sent}

    def _kept(self, key: str, stage: int, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """The own model after a stage, and its adaptor: from the store, or trained now."""
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
        """Itself; BadInput for training that diverged, which must not reach the store or the server."""
        expected = self._initial.state_dict() | adaptor_arrays(self._adaptor(stage, known))
        check_arrays(f"stage {stage} of client {self.client}", state, expected)
        return state

    def _train(self, stage: int, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """Minimise the local loss over what is not fused yet; the own weights, and `adaptor.*`."""
        settings, at = self._settings, device()
        rng = generator(self._seed, "client", self.client, *([stage] if stage else []))
        torch.manual_seed(torch.randint(2**31, (1,), generator=rng).item())  # dropout, as in train_client
        own, adaptor, front = self._model(stage), self._adaptor(stage, known), self._front(stage, known)
        trained = nn.ModuleList([own, adaptor] if adaptor else [own]).to(at)
        optimizer = self._optimizer(trained)
        schedule = make_schedule(optimizer, settings.schedule, self._steps(stage))
        images, labels = self._shard.images.to(at), self._shard.labels.to(at)
        for _ in range(stage_epochs(settings.epochs, self._fusion.stages)[stage]):
            for pick in torch.randperm(self.size, generator=rng).split(settings.batch_size):
                batch = images[pick.to(at)]
                if settings.augment:
                    batch = warp(batch, random_maps(len(pick), settings.augment, rng))
                tokens = partial(self._features, own, adaptor, front, batch, stage)
                loss = loss_of_tokens(own, tokens, labels[pick.to(at)], settings)
                loss = loss + fedprox(own, self._initial, settings)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                self.progress(1)
        state = own.state_dict() | adaptor_arrays(adaptor)
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def _model(self, stage: int) -> VisionTransformer:
        """This client's model as its last stage left it, with what is fused already frozen."""
        own = copy.deepcopy(self._initial)
        own.load_state_dict(self._own)
        own.train().requires_grad_(True)
        fused = {name for s in range(stage) for name in stage_names(own, self._fusion.stages, s)}
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(name not in fused)
        return own

    def _adaptor(self, stage: int, known: dict[str, Tensor]) -> nn.Linear | None:
        """The adaptor before a stage as training finds it: the average of the members' tokens."""
        if stage == 0 or self._fusion.adaptor == "average":
            return None
        return average_adaptor(_members(known), self._initial.embed_dim)

    def _front(self, stage: int, known: dict[str, Tensor]) -> Fused | None:
        """All members' stages before this one, frozen; BadInput for arrays that do not fit."""
        if stage == 0:
            return None
        front = Fused([copy.deepcopy(self._initial) for _ in range(_members(known))], self._fusion)
        expected = {name: value for s in range(stage) for name, value in front.part(s).items()}
        check_arrays(f"message of the server to client {self.client}", known, expected)
        front.load_state_dict(known, strict=False)
        return front.to(device())

    def _optimizer(self, trained: nn.ModuleList) -> torch.optim.Optimizer:
        """One optimiser of several models, the rule of what is decayed applied to each by its own names."""
        s = self._settings
        first, *others = (make_optimizer(m, s.optimizer, s.lr, s.weight_decay, s.momentum) for m in trained)
        for group in (group for other in others for group in other.param_groups):
            first.add_param_group(group)
        return first

    def _features(
        self,
        own: VisionTransformer,
        adaptor: nn.Linear | None,
        front: Fused | None,
        images: Tensor,
        stage: int,
        rows: int | None,
    ) -> Tensor:
        """Normalised output tokens, or their first rows: the fused stages, then this client's own."""
        x = images
        if front:
            with torch.no_grad():
                each = front.outputs(images, stage - 1)  # (K, B, P + N, d)
            x = fuse_tokens(each, adaptor)
        for later in range(stage, self._fusion.stages):
            x = stage_tokens(own, x, later, self._fusion.stages, rows)
        return x


def _members(received: dict[str, Tensor]) -> int:
    """How many members a message of the server holds; at least one, so that what is missing has a name."""
    return max(1, len({name.split(".")[1] for name in received if name.startswith("members.")}))
