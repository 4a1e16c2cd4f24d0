"""One run: settings in, one Result out; every stage is kept in the store and reused.

`clients` makes the uploads, methods get them. Only this folder and `flower_app` import both client and server
code.
"""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from ..core.machine import versions
from ..core.processes import jobs
from ..core.progress import progress
from ..core.store import fingerprint, read_tensors, write_json, write_tensors
from ..evaluation.metrics import accuracy, share_correct
from ..methods import Method, Outcome, check_methods, find
from ..settings import Settings
from ..settings.schema import ModelSettings
from ..upload import Upload, wire_bytes
from ..upload.privacy import epsilon
from ..vision.stages import stage_blocks
from ..vision.vit import weights_digest
from .clients import Clients
from .result import Result, code_text, measure, predict_references, read_result, write_result


class Experiment(Clients):
    """The clients and the server of one setting: all of `Clients`, and outcomes and results of methods."""

    def check(self, methods: Sequence[str] = ()) -> None:
        """Raise BadInput, before any work, for all that can be wrong with settings, methods and uploads."""
        jobs()
        check_methods(methods, self.settings)
        self.check_noise()
        for client in range(len(self.shards)):
            if self.store.has("uploads", self.upload_key(client)):  # damaged ones are refused now
                self.store.read(
                    "uploads", self.upload_key(client), self._load(self.settings.model_of(client))
                )
            self.shared(self.settings.model_of(client))
        if any(find(method).given == "stages" for method in methods):
            stage_blocks(len(self.initial.blocks), self.settings.fusefl.stages)

    def outcome(self, method: str) -> Outcome:
        """Run a method and return its `Outcome`: models, synthetic images, costs."""
        record = find(method)
        if record.given == "stages":
            return self._exchange(record)
        given = self.clients if record.given == "clients" else self.uploads_for(record)
        more = [self.task.train.images] if record.given == "images" else []
        return record(given, self.settings, self.store, *more)

    def models(self, method: str) -> list[nn.Module]:
        """Return a method's models alone: one, or one per client for `local`."""
        return self.outcome(method).models

    def _exchange(self, method: Method) -> Outcome:
        """Run a method that trains the clients stage by stage."""
        clients = self.stage_clients
        with progress(sum(c.steps for c in clients), method.label, "step") as bar:
            for client in clients:
                client.progress = bar.update
            return method(clients, self.settings, self.store)

    @cached_property
    def reference_predictions(self) -> dict[str, Tensor]:
        """Predicted classes (models, n) on the test split of the references that every run reports."""
        inputs = [[u.digest for u in self.uploads], self.settings.ensemble.model_dump()]
        inputs.append(self.settings.task.scenes)
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
        uploads = [u.digest for u in self._addressed_by(record)]
        key = fingerprint(
            "run", method, _own_code(record), uploads, self.settings.model_dump(), self.task.digest
        )
        return self.store.get("runs", key, read_result, lambda: self._evaluate(method, key), write_result)

    def validation_accuracy(self, method: str) -> float:
        """Return a method's accuracy on validation images, its models' mean, from the store if there."""
        images = self.task.validation

        def measure() -> float:
            models = self.models(method)
            return sum(accuracy(model, images) for model in models) / len(models)

        return self.store.get(
            "validation",
            self.validation_key(method),
            read=lambda folder: json.loads((folder / "accuracy.json").read_text()),
            make=measure,
            write=lambda value, folder: write_json(folder / "accuracy.json", value),
        )

    def validation_key(self, method: str) -> str:
        """Return the address of a method's validation accuracy in the store."""
        s = self.settings
        whose = [weights_digest(s.model), self.task.digest]  # a checkpoint's digest, not its place
        whose += _own_code(find(method))
        return fingerprint("validation", method, s.model_dump(exclude={"model": {"checkpoint"}}), *whose)

    def _addressed_by(self, method: Method) -> list[Upload]:
        """Return the uploads that address a run: the method's or, for `central`, those of the references."""
        if not method.needs_weights:
            return self.uploads_for(method)
        return self.uploads if method.given == "central" else self.uploads_for(method)

    def _evaluate(self, method: str, key: str) -> Result:
        s, outcome, trained = self.settings, self.outcome(method), find(method).needs_weights
        found = self.reference_predictions.get(method) if trained else None
        scores = self.reference_scores if trained else {}
        local = scores.get("local", [])
        return Result(
            run_id=key,
            method=method,
            task=s.task.name,
            seed=s.seed,
            clients=s.partition.clients,
            alpha=s.partition.alpha,
            **measure(outcome, self.task, found),
            ensemble_accuracy=scores["ensemble"][0] if scores else None,
            fedavg_accuracy=scores["fedavg"][0] if "fedavg" in scores else None,
            local_accuracies=local,
            best_local_accuracy=max(local, default=None),
            **self._account(find(method), outcome),
            **self._privacy(find(method)),
            seconds=self._seconds(method, outcome),
            settings=s.model_dump(mode="json"),
            versions=versions(),
        )

    def _account(self, method: Method, outcome: Outcome) -> dict[str, int]:
        """Count exchanges and bytes; by default one upload from each client, and the shared model to each."""
        sent = self.uploads_for(method)
        up, down = outcome.uplink_bytes, outcome.downlink_bytes
        if up is None:
            up = sum(u.bytes for u in sent) if method.sends else 0
        return {
            "exchanges": method.exchanges_under(self.settings),
            "upload_bytes": up,
            "download_bytes": self._shared_bytes(method, sent) if down is None else down,
        }

    def _privacy(self, method: Method) -> dict[str, float]:
        """Return ε and δ of what the method's clients send, of the client with the largest ε.

        Empty without noise. Noise of weights and of sums of one client composes; δ is then the larger of both
        settings.
        """
        sent = {
            "weights": (self.settings.client, method.needs_weights),
            "sums": (self.settings.statistics, method.needs_statistics_under(self.settings)),
        }
        deltas = [own.dp_delta for own, is_sent in sent.values() if is_sent and own.dp_epsilon is not None]
        if not deltas:
            return {}
        found = [epsilon(upload.noises, max(deltas)) for upload in self.uploads_for(method)]
        return {"epsilon": max(found), "delta": max(deltas)}

    def _shared_bytes(self, method: Method, uploads: Sequence[Upload]) -> int:
        """Count the bytes of the models that these clients were handed.

        A client trains from the model of its own name; its statistics are of the global one.
        """
        own, summed = method.needs_weights, method.needs_statistics_under(self.settings)
        models: Counter[ModelSettings] = Counter()
        for upload in uploads:
            handed = {self.settings.model_of(upload.client)} if own else set()
            models.update(handed | ({self.settings.model} if summed else set()))
        return sum(count * wire_bytes(self.shared(model).state_dict()) for model, count in models.items())

    def _seconds(self, method: str, outcome: Outcome) -> dict[str, float]:
        """Return the seconds of every stage, as measured when its artefact was made."""
        record, clients = find(method), range(len(self.shards))
        who = "central" if record.given == "central" else "clients"
        keys = []
        if record.given == "stages":
            spent = sum(client.seconds for client in self.stage_clients)
        else:
            spent = sum(client.seconds for client in self.clients) if record.given == "clients" else 0.0
            alone = record.given == "central"
            if record.needs_weights:
                keys = [("uploads", self.central_key if alone else self.upload_key(k)) for k in clients]
            if record.needs_statistics_under(self.settings):
                features = self.features_of(record.adapted(self.settings))
                keys += [("statistics", self.statistics_key(None if alone else k, features)) for k in clients]
        seconds = {who: spent + sum(self.store.seconds(*key) for key in set(keys))}
        return {stage: round(value, 3) for stage, value in (seconds | outcome.seconds).items()}


def _own_code(method: Method) -> list[object]:
    """Return what addresses results of a method of your own, so that one that changed is run anew."""
    needs = [method.needs_weights, method.needs_counts, method.needs_statistics]
    return [] if method.is_shipped else [method.given, *needs, code_text(method.run)]


def run(method: str, settings: Settings | None = None, store: Path | str | None = None) -> Result:
    """Run one method once and return its result; everything finished before is taken from the store.

    Raises BadInput, before any training, for an unknown method or settings that cannot work.
    """
    experiment = Experiment(settings or Settings.load(method=method), store)
    experiment.check([method])
    return experiment.result(method)
