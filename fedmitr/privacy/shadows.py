"""Shadow runs: the same client trained again and again, each time on another half of its images.

One client is audited. Each run gives it a random half of its shard; the other clients' uploads are the same
in every run, and the attacker may know them, as the server does. So a run costs one client's training, and
what is found is what this client's message gives away, alone or mixed with the others'. Some of the client's
images, the canaries, carry a wrong label in all runs that hold them: hardly any model predicts that label
unless it was trained on it, which makes them the worst case (Aerni et al., CCS 2024; arXiv 2502.12976).

Training, uploads, sums of features and methods are those of any run (`experiments.clients`), so an audit
works under any settings, with protections too.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..core.rng import derive_seed, make_rng
from ..core.store import Store, digest, fingerprint
from ..data.tasks import Task
from ..experiments.run import Experiment
from ..methods import Outcome, find
from ..settings import Settings
from ..upload import Features


@dataclass(frozen=True)
class Audit:
    """What is audited: a profile with overrides by dotted name, and how.

    runs: shadow runs, a multiple of 4, 16 and more, so that half of them still have three of each kind.
    canaries: mislabelled images among the audited client's. client: whose images are audited; None: the one
    with most. population: validation images that RMIA compares with, at most.
    """

    profile: str = "laptop"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    runs: int = 64
    canaries: int = 32
    client: int | None = None
    population: int = 200

    def __post_init__(self) -> None:
        """Raise BadInput for numbers that cannot work."""
        if self.runs < 16 or self.runs % 4:
            raise BadInput(f"runs={self.runs}: allowed are multiples of 4 from 16 on")
        if self.canaries < 0:
            raise BadInput(f"canaries={self.canaries}: allowed are 0 and more")

    def settings(self, method: str, more: Mapping[str, Any] | None = None) -> Settings:
        """Return the settings of a method's runs; `more` goes before the audit's own overrides."""
        return Settings.load(self.profile, {**self.overrides, **(more or {})}, method)

    def told(self) -> dict[str, Any]:
        """Return the fields that fix who is in which run, for addresses in the store."""
        return {n: v for n, v in asdict(self).items() if n in ("runs", "canaries", "client", "population")}


@dataclass(frozen=True)
class Records:
    """The audited records: one client's shard with its canaries.

    client: its number. shards: index tensors of all clients. rows (n,): the audited shard, indices into the
    training split. labels (n,): as the client has them. canary (n,): true where the label is wrong.
    """

    client: int
    shards: list[Tensor]
    rows: Tensor
    labels: Tensor
    canary: Tensor

    @classmethod
    def of(cls, experiment: Experiment, audit: Audit) -> "Records":
        """Choose client and canaries; BadInput for a client that is not there or has too few images.

        A canary's wrong label is drawn from the other classes that the client holds, so that counts of
        classes do not give it away; from all others where it holds a single class.
        """
        shards, all_labels = experiment.shards, experiment.task.train.labels
        client = audit.client
        if client is None:
            client = max(range(len(shards)), key=lambda k: len(shards[k]))
        if not 0 <= client < len(shards):
            raise BadInput(f"client={client} is not there: allowed are 0 to {len(shards) - 1}")
        rows = shards[client]
        if len(rows) < 2 * audit.canaries or len(rows) < 8:
            raise BadInput(
                f"canaries={audit.canaries}: client {client} holds {len(rows)} images, of which half at most "
                "may be canaries; allowed is a client with 8 images and more"
            )
        rng, labels = make_rng(experiment.settings.seed, "canaries", client), all_labels[rows].clone()
        canary = torch.zeros(len(rows), dtype=torch.bool)
        canary[torch.randperm(len(rows), generator=rng)[: audit.canaries]] = True
        held = labels.unique()
        held = held if len(held) > 1 else torch.arange(len(experiment.task.classes))
        for index in canary.nonzero()[:, 0]:
            others = held[held != labels[index]]
            labels[index] = others[torch.randint(len(others), (1,), generator=rng)][0]
        return cls(client, shards, rows, labels, canary)


def memberships(runs: int, records: int, seed: int) -> Tensor:
    """Draw who is in which run: (R, n), true for a member.

    Each record is in exactly half of the first R/2 runs, and in half of the others, so that costly targets
    can be audited on the first half alone.
    """
    rng, half = make_rng(seed, "memberships"), runs // 2
    parts = [torch.rand(half, records, generator=rng).argsort(dim=0) < half // 2 for _ in range(2)]
    return torch.cat(parts)


class ShadowRun(Experiment):
    """An experiment in which the audited client holds the members of one run, and everyone else all images.

    What is random in the client's training, and in the server's work, is drawn anew in every run. Uploads of
    the other clients, and their addresses in the store, are those of an ordinary run.
    """

    def __init__(self, settings: Settings, store: Store, records: Records, member: Tensor, run: int) -> None:
        """Take the audited records, who of them is in this run, member (n,), and the run's number."""
        super().__init__(settings, store)
        self.records, self.member, self.number = records, member, run

    @cached_property
    def task(self) -> Task:
        """The task, with the canaries' labels in its training split."""
        task = super().task
        labels = task.train.labels.clone()
        labels[self.records.rows] = self.records.labels
        return replace(task, train=replace(task.train, labels=labels))

    @cached_property
    def shards(self) -> list[Tensor]:
        """Index tensors into the training split, the audited client's with members alone."""
        shards = list(self.records.shards)
        shards[self.records.client] = self.records.rows[self.member]
        return shards

    def seed_of(self, client: int | None) -> int:
        """Return the seed of a client's own randomness: another in every run for the audited one."""
        if client != self.records.client:
            return super().seed_of(client)
        return derive_seed(self.settings.seed, "shadow", self.number) % 2**32

    def upload_key(self, client: int) -> str:
        """Return the address of a client's upload in the store."""
        return self._shadowed(client, super().upload_key(client))

    def statistics_key(self, client: int | None, features: Features) -> str:
        """Return the address of a client's statistics in the store."""
        return self._shadowed(client, super().statistics_key(client, features))

    def _shadowed(self, client: int | None, key: str) -> str:
        if client != self.records.client:
            return key
        data = digest(self.shards[client].tolist(), self.task.train.labels[self.shards[client]].tolist())
        return fingerprint("shadow", key, data, self.seed_of(client))

    def outcome(self, method: str) -> Outcome:
        """Run a method on the uploads; the server's randomness is this run's own."""
        record = find(method)
        if record.given != "uploads":
            raise BadInput(
                f"method={method!r} gets more than one upload from each client: an audit needs just one"
            )
        settings = self.settings.changed({"seed": self.seed_of(self.records.client)})
        return record(self.uploads_for(record), settings, self.store)
