"""One run: settings in, one Result out; every stage kept in the store and reused.

This is the only room that sees both sides. Clients get shards and give uploads; methods get uploads.
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
from ..core.machine import uses_bf16, versions
from ..core.paths import default_store
from ..core.processes import jobs, parallel, spreads
from ..core.progress import progress
from ..core.store import Store, fingerprint, read_tensors, write_tensors
from ..data.image_sets import num_classes
from ..data.partition import partition
from ..data.tasks import Split, Task, load_task
from ..evaluation.flops import inference_flops
from ..evaluation.metrics import predict_with_members, predicted_classes, recall, share_correct
from ..methods import Method, Outcome, check_methods, find
from ..settings import Settings
from ..settings.schema import ModelSettings
from ..upload import Upload, wire_bytes
from ..vision.stages import stage_blocks
from ..vision.vit import client_vit, normalisation, shared_vit, weights_digest
from .result import Result, code_text, write_result


class Experiment:
    """The clients of one setting, made on demand: task, shards, shared model, uploads."""

    def __init__(self, settings: Settings, store: Store | Path | str | None = None) -> None:
        """The store is a folder; by default $FEDMITR_STORE, else data/store. Sets torch's threads."""
        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.store = store if isinstance(store, Store) else Store(store or default_store())

    @cached_property
    def initial(self) -> VisionTransformer:
        """The shared initial model that the server hands to every client."""
        return shared_vit(self.settings.model, num_classes(self.settings.task))

    def shared(self, model: ModelSettings) -> VisionTransformer:
        """The shared model of these settings: the initial one, or another that takes the same images."""
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
        size, stats = self.initial.patch_embed.img_size[0], normalisation(self.initial)
        return load_task(self.settings.task, self.settings.seed, size, stats, self.store.root / "tasks")

    @cached_property
    def shards(self) -> list[Tensor]:
        """Index tensors into the training split, one per client."""
        train = self.task.train
        return partition(train.labels, self.settings.partition, self.settings.seed, train.domains)

    @cached_property
    def uploads(self) -> list[Upload]:
        """What every client sends, once; the class histogram only where ensemble or inversion asks for it."""
        return [u if self.settings.uses_counts else u.without_counts() for u in self._everyone]

    @cached_property
    def _everyone(self) -> list[Upload]:
        """All uploads with their histograms; those that are not in the store are trained side by side."""
        names = range(len(self.shards))
        todo = [k for k in names if not self.store.has("uploads", self.upload_key(k))]
        if len(todo) > 1 and spreads():
            todo.sort(key=lambda k: -len(self.shards[k]))  # the longest first
            with progress(len(todo), "clients", "client") as bar:
                for _ in parallel(partial(_train_apart, self.settings, self.store.root), todo):
                    bar.update(1)
        return self._train([self._client(k) for k in names], self.upload_key, "clients")

    def train(self, client: int) -> Upload:
        """Train one client, unless its upload is in the store; the upload has the class histogram."""
        return self._train([self._client(client)], self.upload_key, "client")[0]

    def _client(self, client: int) -> tuple[int, Tensor, ModelSettings]:
        return client, self.shards[client], self.settings.model_of(client)

    @cached_property
    def clients(self) -> list[FusionClient]:
        """The clients themselves, for the method that exchanges more than one message with each."""
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
        """Everything that can be wrong with settings and methods is found here, before any work."""
        jobs()
        check_methods(methods, self.settings)
        for client in range(len(self.shards)):
            if self.store.has("uploads", self.upload_key(client)):  # damaged ones are refused now
                self.store.read("uploads", self.upload_key(client), Upload.load)
            self.shared(self.settings.model_of(client))
        if "fusefl" in methods:
            stage_blocks(len(self.initial.blocks), self.settings.fusefl.stages)

    def _train(
        self, clients: Sequence[tuple[int, Tensor, ModelSettings]], key_of: Callable[[int], str], title: str
    ) -> list[Upload]:
        """The uploads of clients with these shards and shared models, from the store or trained now."""
        settings = self.settings.client
        uploads = []
        with progress(sum(local_steps(len(s), settings) for _, s, _ in clients), title, "step") as bar:
            for client, index, model in clients:
                shard, before = self.task.train.subset(index), bar.n

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

                uploads.append(self.store.get("uploads", key_of(client), Upload.load, make, Upload.save))
                bar.update(before + local_steps(len(shard), settings) - bar.n)
        return uploads

    def upload_key(self, client: int) -> str:
        made_by = self._made_by(self.settings.model_of(client))
        return fingerprint("upload", made_by, self.settings.partition.model_dump(), client)

    @property
    def central_key(self) -> str:
        return fingerprint("central", self._made_by(self.settings.model))

    def _made_by(self, model: ModelSettings) -> list[Any]:
        """What local training from this shared model depends on, but for who trains it on which shard."""
        s = self.settings
        made_by = [
            s.seed,
            *self._data,
            s.client.model_dump(exclude={"models"}),
            model.model_dump(),
            weights_digest(model),
        ]
        return made_by if model == s.model else [*made_by, s.model.model_dump()]  # whose images they are

    @property
    def _data(self) -> list[Any]:
        """What the task's images are: settings, and what the files are, wherever they lie."""
        return [self.settings.task.model_dump(exclude={"data_dir", "download"}), self.task.digest]

    def outcome(self, method: str) -> Outcome:
        """What a method leaves behind: its models, its synthetic images, its account."""
        record = find(method)
        if record.given == "clients":
            return self._exchange(record)
        given = [self.central_upload] if record.given == "central" else self._uploads_for(record)
        return record(given, self.settings, self.store)

    def _uploads_for(self, method: Method) -> list[Upload]:
        """What every client sends for a method: with its class histogram where somebody needs it."""
        return self._everyone if method.needs_counts else self.uploads

    def models(self, method: str) -> list[nn.Module]:
        """The models alone: one, or one per client for `local`."""
        return self.outcome(method).models

    def _exchange(self, method: Method) -> Outcome:
        with progress(sum(c.steps for c in self.clients), method.label, "step") as bar:
            for client in self.clients:
                client.progress = bar.update
            return method(self.clients, self.settings, self.store)

    @cached_property
    def reference_predictions(self) -> dict[str, Tensor]:
        """Classes (models, n) that what every method is measured against names on the test split."""
        made_by = [[u.digest for u in self.uploads], self.settings.ensemble.model_dump()]
        if self.settings.mixed:
            made_by.append(self.settings.model.name)  # no average is among them
        return self.store.get(
            "references",
            fingerprint("predictions", made_by, self.settings.seed, *self._data),
            read=lambda folder: read_tensors(folder / "predictions.safetensors"),
            make=self._predict_references,
            write=lambda found, folder: write_tensors(found, folder / "predictions.safetensors"),
        )

    def _predict_references(self) -> dict[str, Tensor]:
        (ensemble,), images = self.models("ensemble"), self.task.test.images
        found = {} if self.settings.mixed else {"fedavg": predicted_classes(self.models("fedavg"), images)}
        if uses_bf16(ensemble.precision):  # its members are not the clients' own models, which are float32
            return found | {
                name: predicted_classes(self.models(name), images) for name in ("ensemble", "local")
            }
        together = predict_with_members(ensemble, images).argmax(-1)
        return found | {"ensemble": together[:1], "local": together[1:]}

    @property
    def reference_scores(self) -> dict[str, list[float]]:
        """Test accuracies of what every method is measured against: one, or one per client for `local`."""
        labels = self.task.test.labels
        return {
            name: share_correct(found, labels).tolist() for name, found in self.reference_predictions.items()
        }

    def result(self, method: str) -> Result:
        """Run a method and evaluate it and its references on the test split."""
        s, test = self.settings, self.task.test
        function = find(method).run
        made_by = [] if str(function.__module__).startswith("fedmitr.") else code_text(function)
        uploads = [u.digest for u in self.uploads]
        key = fingerprint("run", method, made_by, uploads, s.model_dump(), self.task.digest)
        return self.store.get(
            "runs",
            key,
            read=lambda folder: Result.model_validate_json((folder / "result.json").read_text()),
            make=lambda: self._evaluate(method, key, test),
            write=lambda result, folder: write_result(result, folder),
        )

    def _evaluate(self, method: str, key: str, test: Split) -> Result:
        s, outcome = self.settings, self.outcome(method)
        models, image = outcome.models, test.images[:1]
        found, scores = self.reference_predictions.get(method), self.reference_scores
        found = predicted_classes(models, test.images) if found is None else found
        own = share_correct(found, test.labels).tolist()
        per_class = torch.stack([recall(row, test.labels, len(self.task.classes)) for row in found])
        return Result(
            run_id=key,
            method=method,
            task=s.task.name,
            seed=s.seed,
            clients=s.partition.clients,
            alpha=s.partition.alpha,
            accuracy=sum(own) / len(own),
            accuracy_per_class=per_class.mean(0).tolist(),
            ensemble_accuracy=scores["ensemble"][0],
            fedavg_accuracy=scores["fedavg"][0] if "fedavg" in scores else None,
            local_accuracies=scores["local"],
            best_local_accuracy=max(scores["local"]),
            **self._wire(method, outcome),
            synthetic_images=len(outcome.synthetic) if outcome.synthetic else 0,
            student_steps=outcome.student_steps,
            inference_flops=inference_flops(models[0], image),
            seconds=self._seconds(method, outcome),
            settings=s.model_dump(mode="json"),
            versions=versions(),
        )

    def _wire(self, method: str, outcome: Outcome) -> dict[str, int]:
        """Exchanges and bytes up and down; by default one upload each, and the shared model to each."""
        sent = self._uploads_for(find(method))
        up, down = outcome.uplink_bytes, outcome.downlink_bytes
        return {
            "exchanges": outcome.exchanges,
            "upload_bytes": sum(u.bytes for u in sent) if up is None else up,
            "download_bytes": self._shared_bytes(sent) if down is None else down,
        }

    def _shared_bytes(self, uploads: Sequence[Upload]) -> int:
        """Bytes of the shared models that these clients were handed."""
        models = Counter(self.settings.model_of(u.client) for u in uploads)
        return sum(count * wire_bytes(self.shared(model).state_dict()) for model, count in models.items())

    def _seconds(self, method: str, outcome: Outcome) -> dict[str, float]:
        """Seconds of every stage, as measured when its artefact was made."""
        given = find(method).given
        if given == "central":
            seconds = {"central": self.store.seconds("uploads", self.central_key)}
        elif given == "clients":
            seconds = {"clients": sum(client.seconds for client in self.clients)}
        else:
            keys = [self.upload_key(k) for k in range(len(self.shards))]
            seconds = {"clients": sum(self.store.seconds("uploads", key) for key in keys)}
        return {stage: round(value, 3) for stage, value in (seconds | outcome.seconds).items()}


def _train_apart(settings: Settings, store: Path, client: int) -> None:
    Experiment(settings, store).train(client)


def run(method: str, settings: Settings | None = None, store: Path | str | None = None) -> Result:
    """One run of one method; everything finished before is taken from the store.

    Raises BadInput, before any training, for an unknown method or settings that cannot work.
    """
    experiment = Experiment(settings or Settings.load(), store)
    experiment.check([method])
    return experiment.result(method)
