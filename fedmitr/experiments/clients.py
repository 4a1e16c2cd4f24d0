"""The clients of one setting, from images to uploads; what is made is kept in the store and reused."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..client.fusefl import FusionClient
from ..client.noise import large_classes, told_counts
from ..client.private import training_noise
from ..client.statistics import StatisticsClient, sent_statistics
from ..client.train import local_steps, train_client
from ..core.paths import default_store
from ..core.processes import parallel, spreads
from ..core.progress import progress
from ..core.rng import make_rng
from ..core.store import Store, fingerprint, read_tensors, write_tensors
from ..data.image_sets import num_classes
from ..data.partition import partition
from ..data.tasks import Split, Task, load_task
from ..methods import Method, find
from ..settings import Settings
from ..settings.schema import ModelSettings
from ..upload import Features, ModelShape, Statistics, Upload
from ..vision.vit import client_vit, normalisation, shared_vit, weights_digest


class Clients:
    """The clients of one setting: task, shards, shared model, and what each client sends.

    Each is made when it is first read, and comes from the store where an earlier run left it.
    """

    def __init__(
        self, settings: Settings, store: Store | Path | str | None = None, noise_seed: int | None = None
    ) -> None:
        """Open the store, a folder, by default $FEDMITR_STORE, else data/store; set torch's threads.

        noise_seed: of the noise of differential privacy. By default that of the settings, so that a run can
        be repeated, which protects from nobody who knows the settings; a client on a machine of its own
        passes a secret.
        """
        torch.set_num_threads(settings.threads)
        self.settings, self.noise_seed = settings, noise_seed
        self.store = store if isinstance(store, Store) else Store(store or default_store())

    @cached_property
    def initial(self) -> VisionTransformer:
        """The shared initial model that the server sends to the clients."""
        return shared_vit(self.settings.model, num_classes(self.settings.task))

    def shared(self, model: ModelSettings) -> VisionTransformer:
        """Return the shared model of these settings: the initial one, or another for the same images."""
        if model == self.settings.model:
            return self.initial
        if model.name not in self._others:
            self._others[model.name] = client_vit(self.initial, model)
        return self._others[model.name]

    @cached_property
    def _others(self) -> dict[str, VisionTransformer]:
        return {}

    @cached_property
    def task(self) -> Task:
        """The data: splits, class names, normalisation."""
        size, stats = self.initial.patch_embed.img_size[0], normalisation(self.initial)
        return load_task(self.settings.task, self.settings.seed, size, stats, self.store.root / "tasks")

    @cached_property
    def shards(self) -> list[Tensor]:
        """Index tensors into the training split, one per client."""
        train = self.task.train
        return partition(train.labels, self.settings.partition, self.settings.seed, train.domains)

    @cached_property
    def uploads(self) -> list[Upload]:
        """The one upload of every client; with its class histogram where ensemble or inversion needs it."""
        return [u if self.settings.uses_counts else u.without_counts() for u in self.counted_uploads]

    @property
    def features(self) -> Features:
        """What statistics of clients are sums of under the run's own settings."""
        return self.features_of(self.settings)

    def features_of(self, settings: Settings) -> Features:
        """Return what statistics are sums of under a method's reading of the settings (`Method.adapted`)."""
        shape = ModelShape.of(self.settings.model.name, self.initial)
        return Features.under(shape, self._initial_digest, settings.statistics)

    @cached_property
    def _initial_digest(self) -> str:
        return weights_digest(self.settings.model)

    @property
    def statistics(self) -> list[Statistics]:
        """The sums of features of every client, under the run's own settings."""
        return self.statistics_of(self.features)

    def statistics_of(self, features: Features) -> list[Statistics]:
        """Return the sums of these features of every client."""
        if features not in self._statistics:
            with progress(len(self.shards), "statistics", "client", delay=1) as bar:
                found = []
                for client, shard in enumerate(self.shards):
                    found.append(self._sum_features(client, shard, features))
                    bar.update(1)
            self._statistics[features] = found
        return self._statistics[features]

    @cached_property
    def _statistics(self) -> dict[Features, list[Statistics]]:
        return {}

    def _sum_features(self, client: int | None, rows: Tensor, features: Features) -> Statistics:
        """Return the sums over these images of the training split, from the store or computed now.

        client: whose images these are, None for those of all.
        """
        path, shard = "statistics.safetensors", self.task.train.subset(rows)
        sizes = "stored statistics", features.shape.num_classes, features.width
        who = "one that holds all images" if client is None else f"client {client}"

        def read(folder: Path) -> Statistics:
            sums = Statistics.from_arrays(read_tensors(folder / path))
            if features.noise:
                return sums.checked_noisy(*sizes, len(rows), features.noise)
            kept = large_classes(shard, features.smallest, who) if features.smallest else shard
            return sums.checked(*sizes, len(kept))

        def make() -> Statistics:
            seed = self.seed_of(client) if self.noise_seed is None else self.noise_seed
            rng = make_rng(seed, "noise of sums", client, features.model_dump_json())
            return sent_statistics(self.initial, shard, features, rng, who)

        return self.store.get(
            "statistics",
            self.statistics_key(client, features),
            read=read,
            make=make,
            write=lambda sums, folder: write_tensors(sums.to_arrays(), folder / path),
        )

    @cached_property
    def counted_uploads(self) -> list[Upload]:
        """All uploads with their class histograms; what the store lacks is trained in parallel."""
        names = range(len(self.shards))
        todo = [k for k in names if not self.store.has("uploads", self.upload_key(k))]
        if len(todo) > 1 and spreads():
            todo.sort(key=lambda k: -len(self.shards[k]))  # the longest first
            with progress(len(todo), "clients", "client") as bar:
                for _ in parallel(
                    partial(_train_in_worker, self.settings, self.store.root, self.noise_seed), todo
                ):
                    bar.update(1)
        return self._train([self._client(k) for k in names], self.upload_key, "clients")

    def train(self, client: int) -> Upload:
        """Train one client, unless the store has its upload; return the upload with its class histogram."""
        return self._train([self._client(client)], self.upload_key, "client")[0]

    def check_noise(self) -> None:
        """Raise BadInput, before any work, where no noise of training gives the wanted ε."""
        for shard in self.shards:
            training_noise(len(shard), local_steps(len(shard), self.settings.client), self.settings.client)

    def seed_of(self, client: int | None) -> int:
        """Return the seed of a client's own randomness, the run's; `privacy.shadows` draws it anew."""
        return self.settings.seed

    def _client(self, client: int) -> tuple[int, Tensor, ModelSettings]:
        return client, self.shards[client], self.settings.model_of(client)

    @cached_property
    def clients(self) -> list[StatisticsClient]:
        """The clients themselves, for a method that asks for statistics after the uploads."""
        subset = self.task.train.subset
        return [
            StatisticsClient(upload, self.shared(self.settings.model_of(k)), subset(self.shards[k]))
            for k, upload in enumerate(self.uploads)
        ]

    @cached_property
    def stage_clients(self) -> list[FusionClient]:
        """The clients themselves, for a method that trains stage by stage."""
        s = self.settings
        return [
            FusionClient(
                self.initial,
                self.task.train.subset(shard),
                s.client,
                s.fusefl,
                self.store,
                client=client,
                key=self.upload_key(client),
                name=s.model.name,
                seed=s.seed,
            )
            for client, shard in enumerate(self.shards)
        ]

    @cached_property
    def central_upload(self) -> Upload:
        """The upload of one client that holds the whole training split: the upper bound."""
        clients = [(0, self._everything, self.settings.model)]
        return self._train(clients, lambda _: self.central_key, "central")[0]

    @property
    def _everything(self) -> Tensor:
        """Indices of the whole training split."""
        return torch.arange(len(self.task.train))

    def _train(
        self, clients: Sequence[tuple[int, Tensor, ModelSettings]], key_of: Callable[[int], str], title: str
    ) -> list[Upload]:
        """Return the uploads of clients (number, shard, shared model), from the store or trained now."""
        settings = self.settings.client
        uploads = []
        with progress(sum(local_steps(len(s), settings) for _, s, _ in clients), title, "step") as bar:
            for client, rows, model in clients:
                shard, before = self.task.train.subset(rows), bar.n

                def make(client: int = client, shard: Split = shard, model: ModelSettings = model) -> Upload:
                    return train_client(
                        self.shared(model),
                        shard,
                        settings,
                        client=client,
                        name=model.name,
                        seed=self.seed_of(client),
                        progress=bar.update,
                        noise_seed=self.noise_seed,
                    )

                uploads.append(
                    self.store.get("uploads", key_of(client), self._load(model), make, Upload.save)
                )
                bar.update(before + local_steps(len(shard), settings) - bar.n)
        return uploads

    def _load(self, model: ModelSettings) -> Callable[[Path], Upload]:
        """Return a function that reads an upload of a client that started from this shared model."""
        return partial(Upload.load, expected=ModelShape.of(model.name, self.shared(model)))

    def statistics_key(self, client: int | None, features: Features) -> str:
        """Return the address of a client's statistics in the store; None: of those of all images."""
        who = [] if client is None else [self.settings.partition.model_dump(), client]
        who += ["secret noise"] if features.noise and self.noise_seed is not None else []
        told = features.model_dump_json()
        return fingerprint("statistics", self.settings.seed, *self._data_inputs, told, *who)

    def upload_key(self, client: int) -> str:
        """Return the address of a client's upload in the store."""
        inputs = self._training_inputs(self.settings.model_of(client))
        return fingerprint("upload", inputs, self.settings.partition.model_dump(), client)

    @property
    def central_key(self) -> str:
        """The address of the central upload in the store."""
        return fingerprint("central", self._training_inputs(self.settings.model))

    def _training_inputs(self, model: ModelSettings) -> list[Any]:
        """List all that local training from this shared model depends on, except client and partition."""
        s = self.settings
        inputs = [
            s.seed,
            *self._data_inputs,
            s.client.model_dump(exclude={"models"}),
            model.model_dump(),
            weights_digest(model),
        ]
        if s.client.dp_epsilon is not None and self.noise_seed is not None:
            inputs += ["secret noise"]  # one that only the settings' seed made is not sent in its place
        return inputs if model == s.model else [*inputs, s.model.model_dump()]  # it fixes the images

    @property
    def _data_inputs(self) -> list[Any]:
        """All that training images depend on: settings, and the files' digest, not their folder."""
        others = {"data_dir", "download", "scenes"}
        return [self.settings.task.model_dump(exclude=others), self.task.digest]

    def uploads_for(self, method: Method | str) -> list[Upload]:
        """Return what every client sends for a method: weights, class histogram, statistics, as it needs."""
        record = find(method) if isinstance(method, str) else method
        counted = record.needs_counts_under(self.settings) or record.given == "central"
        if record.given == "central":
            found = (
                [self.central_upload] if record.needs_weights else [self._bare_upload(0, self._everything)]
            )
        elif record.needs_weights:
            found = self.counted_uploads
        else:
            found = [self._bare_upload(k, shard) for k, shard in enumerate(self.shards)]
        if record.needs_statistics_under(self.settings):
            features = self.features_of(record.adapted(self.settings))
            if record.given == "central":
                sums = [self._sum_features(None, self._everything, features)]
            else:
                sums = self.statistics_of(features)
            found = [u.with_statistics(s, features) for u, s in zip(found, sums, strict=True)]
        return [self._as_sent(upload, counted) for upload in found]

    def upload_for(self, method: Method, client: int) -> Upload:
        """Return what one client sends for a method; no other client is trained."""
        if method.needs_weights:
            upload = self.train(client)
        else:
            upload = self._bare_upload(client, self.shards[client])
        if method.needs_statistics_under(self.settings):
            features = self.features_of(method.adapted(self.settings))
            sums = self._sum_features(client, self.shards[client], features)
            upload = upload.with_statistics(sums, features)
        return self._as_sent(upload, method.needs_counts_under(self.settings)).checked()

    def _as_sent(self, upload: Upload, counted: bool) -> Upload:
        """Return an upload with what it tells of its class counts."""
        return told_counts(upload, counted, self.settings.statistics.smallest)

    def _bare_upload(self, client: int, rows: Tensor) -> Upload:
        """Return an upload without weights, to which statistics are added."""
        return Upload(client, len(rows), self.features.shape, None)


def _train_in_worker(settings: Settings, store: Path, noise_seed: int | None, client: int) -> None:
    Clients(settings, store, noise_seed).train(client)
