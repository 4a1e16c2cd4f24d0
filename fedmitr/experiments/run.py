"""One run: settings in, one Result out; every stage is kept in the store and reused.

Only this module and `flower_app` import both client and server code. Clients get shards and give uploads;
methods get uploads.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..client.fusefl import FusionClient
from ..client.train import local_steps, train_client
from ..core.machine import versions
from ..core.paths import default_store
from ..core.processes import jobs, parallel, spreads
from ..core.progress import progress
from ..core.store import Store, fingerprint, read_tensors, write_tensors
from ..data.image_sets import num_classes
from ..data.partition import partition
from ..data.tasks import Split, Task, load_task
from ..evaluation.metrics import share_correct
from ..methods import Method, Outcome, check_methods, find
from ..settings import Settings
from ..settings.schema import ModelSettings
from ..upload import ModelShape, Upload, wire_bytes
from ..vision.stages import stage_blocks
from ..vision.vit import client_vit, normalisation, shared_vit, weights_digest
from .result import Result, code_text, measure, predict_references, read_result, write_result


class Experiment:
    """The clients and the server of one setting: task, shards, shared model, uploads, outcomes, results.

    Each is made when it is first read, and comes from the store where an earlier run left it.
    """

    def __init__(self, settings: Settings, store: Store | Path | str | None = None) -> None:
        """Open the store, a folder, by default $FEDMITR_STORE, else data/store; set torch's threads."""
        torch.set_num_threads(settings.threads)
        self.settings = settings
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

    @cached_property
    def counted_uploads(self) -> list[Upload]:
        """All uploads with their class histograms; what the store lacks is trained in parallel."""
        names = range(len(self.shards))
        todo = [k for k in names if not self.store.has("uploads", self.upload_key(k))]
        if len(todo) > 1 and spreads():
            todo.sort(key=lambda k: -len(self.shards[k]))  # the longest first
            with progress(len(todo), "clients", "client") as bar:
                for _ in parallel(partial(_train_in_worker, self.settings, self.store.root), todo):
                    bar.update(1)
        return self._train([self._client(k) for k in names], self.upload_key, "clients")

    def train(self, client: int) -> Upload:
        """Train one client, unless the store has its upload; return the upload with its class histogram."""
        return self._train([self._client(client)], self.upload_key, "client")[0]

    def _client(self, client: int) -> tuple[int, Tensor, ModelSettings]:
        return client, self.shards[client], self.settings.model_of(client)

    @cached_property
    def clients(self) -> list[FusionClient]:
        """The clients themselves, for a method that exchanges more than one message with each."""
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
        whole = torch.arange(len(self.task.train))
        return self._train([(0, whole, self.settings.model)], lambda _: self.central_key, "central")[0]

    def check(self, methods: Sequence[str] = ()) -> None:
        """Raise BadInput, before any work, for all that can be wrong with settings, methods and uploads."""
        jobs()
        check_methods(methods, self.settings)
        for client in range(len(self.shards)):
            if self.store.has("uploads", self.upload_key(client)):  # damaged ones are refused now
                self.store.read(
                    "uploads", self.upload_key(client), self._load(self.settings.model_of(client))
                )
            self.shared(self.settings.model_of(client))
        if any(find(method).given == "clients" for method in methods):
            stage_blocks(len(self.initial.blocks), self.settings.fusefl.stages)

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
                        seed=self.settings.seed,
                        progress=bar.update,
                    )

                uploads.append(
                    self.store.get("uploads", key_of(client), self._load(model), make, Upload.save)
                )
                bar.update(before + local_steps(len(shard), settings) - bar.n)
        return uploads

    def _load(self, model: ModelSettings) -> Callable[[Path], Upload]:
        """Return a function that reads an upload of a client that started from this shared model."""
        return partial(Upload.load, expected=ModelShape.of(model.name, self.shared(model)))

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
        return inputs if model == s.model else [*inputs, s.model.model_dump()]  # it fixes the images

    @property
    def _data_inputs(self) -> list[Any]:
        """All that the task's images depend on: settings, and the files' digest, not their folder."""
        return [self.settings.task.model_dump(exclude={"data_dir", "download"}), self.task.digest]

    def outcome(self, method: str) -> Outcome:
        """Run a method and return its `Outcome`: models, synthetic images, costs."""
        record = find(method)
        if record.given == "clients":
            return self._exchange(record)
        given = [self.central_upload] if record.given == "central" else self._uploads_for(record)
        return record(given, self.settings, self.store)

    def _uploads_for(self, method: Method) -> list[Upload]:
        """Return what every client sends for a method, with class histograms where it needs them."""
        return self.counted_uploads if method.needs_counts else self.uploads

    def models(self, method: str) -> list[nn.Module]:
        """Return a method's models alone: one, or one per client for `local`."""
        return self.outcome(method).models

    def _exchange(self, method: Method) -> Outcome:
        """Run a method that exchanges several messages with each client."""
        with progress(sum(c.steps for c in self.clients), method.label, "step") as bar:
            for client in self.clients:
                client.progress = bar.update
            return method(self.clients, self.settings, self.store)

    @cached_property
    def reference_predictions(self) -> dict[str, Tensor]:
        """Predicted classes (models, n) on the test split of the references that every run reports."""
        inputs = [[u.digest for u in self.uploads], self.settings.ensemble.model_dump()]
        average = not self.settings.mixed  # clients of several architectures have no average
        if not average:
            inputs.append(self.settings.model.name)
        return self.store.get(
            "references",
            fingerprint("predictions", inputs, self.settings.seed, *self._data_inputs),
            read=lambda folder: read_tensors(folder / "predictions.safetensors"),
            make=lambda: predict_references(self.models, self.task.test.images, average),
            write=lambda found, folder: write_tensors(found, folder / "predictions.safetensors"),
        )

    @property
    def reference_scores(self) -> dict[str, list[float]]:
        """Test accuracies of the references: one, or one per client for `local`."""
        labels = self.task.test.labels
        return {
            name: share_correct(found, labels).tolist() for name, found in self.reference_predictions.items()
        }

    def result(self, method: str) -> Result:
        """Run a method and evaluate it and the references on the test split."""
        record = find(method)
        own = [] if record.is_shipped else [record.given, record.needs_counts, code_text(record.run)]
        uploads = [u.digest for u in self.uploads]
        key = fingerprint("run", method, own, uploads, self.settings.model_dump(), self.task.digest)
        return self.store.get("runs", key, read_result, lambda: self._evaluate(method, key), write_result)

    def _evaluate(self, method: str, key: str) -> Result:
        s, outcome = self.settings, self.outcome(method)
        found, scores = self.reference_predictions.get(method), self.reference_scores
        return Result(
            run_id=key,
            method=method,
            task=s.task.name,
            seed=s.seed,
            clients=s.partition.clients,
            alpha=s.partition.alpha,
            **measure(outcome, self.task, found),
            ensemble_accuracy=scores["ensemble"][0],
            fedavg_accuracy=scores["fedavg"][0] if "fedavg" in scores else None,
            local_accuracies=scores["local"],
            best_local_accuracy=max(scores["local"]),
            **self._account(find(method), outcome),
            seconds=self._seconds(method, outcome),
            settings=s.model_dump(mode="json"),
            versions=versions(),
        )

    def _account(self, method: Method, outcome: Outcome) -> dict[str, int]:
        """Count exchanges and bytes; by default one upload from each client, and the shared model to each."""
        sent = self._uploads_for(method)
        up, down = outcome.uplink_bytes, outcome.downlink_bytes
        if up is None:
            up = sum(u.bytes for u in sent) if method.sends else 0
        return {
            "exchanges": method.exchanges_under(self.settings),
            "upload_bytes": up,
            "download_bytes": self._shared_bytes(sent) if down is None else down,
        }

    def _shared_bytes(self, uploads: Sequence[Upload]) -> int:
        """Count the bytes of the shared models that these clients were handed."""
        models = Counter(self.settings.model_of(u.client) for u in uploads)
        return sum(count * wire_bytes(self.shared(model).state_dict()) for model, count in models.items())

    def _seconds(self, method: str, outcome: Outcome) -> dict[str, float]:
        """Return the seconds of every stage, as measured when its artefact was made."""
        given = find(method).given
        if given == "central":
            seconds = {"central": self.store.seconds("uploads", self.central_key)}
        elif given == "clients":
            seconds = {"clients": sum(client.seconds for client in self.clients)}
        else:
            keys = [self.upload_key(k) for k in range(len(self.shards))]
            seconds = {"clients": sum(self.store.seconds("uploads", key) for key in keys)}
        return {stage: round(value, 3) for stage, value in (seconds | outcome.seconds).items()}


def _train_in_worker(settings: Settings, store: Path, client: int) -> None:
    Experiment(settings, store).train(client)


def run(method: str, settings: Settings | None = None, store: Path | str | None = None) -> Result:
    """Run one method once and return its result; everything finished before is taken from the store.

    Raises BadInput, before any training, for an unknown method or settings that cannot work.
    """
    experiment = Experiment(settings or Settings.load(), store)
    experiment.check([method])
    return experiment.result(method)
