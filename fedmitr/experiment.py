"""One run: settings in, one Result out; every stage kept in the store and reused.

This is the only room that sees both sides. Clients get shards and give uploads; methods get uploads.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .client import local_steps, train_client
from .errors import BadInput
from .methods import METHODS
from .methods.fedmitr import distill_key, inversion_keys
from .metrics import accuracy, accuracy_per_class
from .partition import partition
from .paths import default_store
from .runtime import progress, versions
from .settings import TASKS, Settings
from .store import Store, fingerprint
from .tasks import Split, Task, load_task
from .upload import Upload
from .vit import create_vit, normalisation, weights_digest


class Result(BaseModel):
    """What one run reports; accuracies are on the test split, in [0, 1]."""

    run_id: str
    method: str
    task: str
    seed: int
    clients: int
    alpha: float
    accuracy: float
    accuracy_per_class: list[float]
    ensemble_accuracy: float
    fedavg_accuracy: float
    local_accuracies: list[float]
    best_local_accuracy: float
    upload_bytes: int
    seconds: dict[str, float]
    settings: dict[str, Any]
    versions: dict[str, str | None]


class Experiment:
    """The clients of one setting, made on demand: task, shards, shared model, uploads."""

    def __init__(self, settings: Settings, store: Store | Path | str | None = None) -> None:
        """The store is a folder; by default $FEDMITR_STORE, else data/store."""
        self.settings = settings
        self.store = store if isinstance(store, Store) else Store(store or default_store())

    @cached_property
    def initial(self) -> VisionTransformer:
        """The shared initial model that the server hands to every client."""
        model = self.settings.model
        return create_vit(
            model.name,
            TASKS[self.settings.task.name],
            pretrained=model.pretrained,
            checkpoint=model.checkpoint,
            image_size=model.image_size,
        )

    @cached_property
    def task(self) -> Task:
        size = self.initial.patch_embed.img_size[0]
        return load_task(self.settings.task, self.settings.seed, size, normalisation(self.initial))

    @cached_property
    def shards(self) -> list[Tensor]:
        """Index tensors into the training split, one per client."""
        return partition(self.task.train.labels, self.settings.partition, self.settings.seed)

    @cached_property
    def uploads(self) -> list[Upload]:
        """What every client sends, once; the class histogram only where the ensemble asks for it."""
        everyone = self._train(list(enumerate(self.shards)), self.upload_key, "clients")
        wanted = self.settings.ensemble.mode == "class"
        return [u if wanted else u.without_counts() for u in everyone]

    @cached_property
    def central_upload(self) -> Upload:
        """The upload of one client that holds the whole training split: the upper bound."""
        whole = torch.arange(len(self.task.train))
        return self._train([(0, whole)], lambda _: self.central_key, "central")[0]

    def check(self) -> None:
        """Everything that can be wrong with the settings is found here, before any work."""
        for client in range(len(self.shards)):
            if self.store.has("uploads", self.upload_key(client)):  # damaged ones are refused now
                self.store.read("uploads", self.upload_key(client), Upload.load)

    def _train(self, clients: Sequence[tuple[int, Tensor]], key_of, title: str) -> list[Upload]:
        settings = self.settings.client
        uploads = []
        with progress(sum(local_steps(len(s), settings) for _, s in clients), title, "step") as bar:
            for client, index in clients:
                shard, before = self.task.train.subset(index), bar.n

                def make(client: int = client, shard: Split = shard) -> Upload:
                    return train_client(
                        self.initial,
                        shard,
                        settings,
                        client=client,
                        name=self.settings.model.name,
                        seed=self.settings.seed,
                        progress=bar.update,
                    )

                uploads.append(self.store.get("uploads", key_of(client), Upload.load, make, Upload.save))
                bar.update(before + local_steps(len(shard), settings) - bar.n)
        return uploads

    def upload_key(self, client: int) -> str:
        return fingerprint("upload", self._client_settings, self.settings.partition.model_dump(), client)

    @property
    def central_key(self) -> str:
        return fingerprint("central", self._client_settings)

    @property
    def _client_settings(self) -> list[Any]:
        s = self.settings
        return [
            s.seed,
            s.task.model_dump(),
            s.client.model_dump(),
            s.model.model_dump(),
            weights_digest(s.model),
        ]

    def models(self, method: str) -> list[nn.Module]:
        """The models that a method leaves out: one, or one per client for `local`."""
        uploads = [self.central_upload] if method == "central" else self.uploads
        return METHODS[method](uploads, self.settings, self.store)

    @cached_property
    def reference_scores(self) -> dict[str, list[float]]:
        """Test accuracies of what every method is measured against: one, or one per client for `local`."""
        names = ("ensemble", "fedavg", "local")
        return {name: [accuracy(m, self.task.test) for m in self.models(name)] for name in names}

    def result(self, method: str) -> Result:
        """Run a method and evaluate it and its references on the test split."""
        s, test = self.settings, self.task.test
        key = fingerprint("run", method, [u.digest for u in self.uploads], s.model_dump())
        return self.store.get(
            "runs",
            key,
            read=lambda folder: Result.model_validate_json((folder / "result.json").read_text()),
            make=lambda: self._evaluate(method, key, test),
            write=lambda result, folder: _write_result(result, folder),
        )

    def _evaluate(self, method: str, key: str, test: Split) -> Result:
        s = self.settings
        models = self.models(method)
        per_class = torch.stack([accuracy_per_class(m, test, len(self.task.classes)) for m in models])
        scores = self.reference_scores
        own = scores.get(method) or [accuracy(m, test) for m in models]
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
            fedavg_accuracy=scores["fedavg"][0],
            local_accuracies=scores["local"],
            best_local_accuracy=max(scores["local"]),
            upload_bytes=sum(u.bytes for u in self.uploads),
            seconds=self._seconds(method),
            settings=s.model_dump(mode="json"),
            versions=versions(),
        )

    def _seconds(self, method: str) -> dict[str, float]:
        """Seconds of every stage, as measured when its artefact was made."""
        made = {"clients": [("uploads", self.upload_key(k)) for k in range(len(self.shards))]}
        if method == "central":
            made = {"central": [("uploads", self.central_key)]}
        if method == "fedmitr":
            made["inversion"] = [("synthetic", key) for key in inversion_keys(self.uploads, self.settings)]
            made["distillation"] = [("global", distill_key(self.uploads, self.settings))]
        return {stage: round(sum(self.store.seconds(*a) for a in parts), 3) for stage, parts in made.items()}


def _write_result(result: Result, folder: Path) -> None:
    (folder / "result.json").write_text(result.model_dump_json(indent=1) + "\n")


def run(method: str, settings: Settings | None = None, store: Path | str | None = None) -> Result:
    """One run of one method; everything finished before is taken from the store.

    Raises BadInput, before any training, for an unknown method or settings that cannot work.
    """
    if method not in METHODS:
        raise BadInput(f"method={method!r} is unknown: allowed are {', '.join(METHODS)}")
    experiment = Experiment(settings or Settings.load(), store)
    experiment.check()
    return experiment.result(method)
