"""What tests of FuseFL share: three shards, clients that record what passes, clients that train nothing."""

import torch
from helpers import loud

import fedmitr as fm
from fedmitr.client.fusefl import FusionClient
from fedmitr.settings import Settings
from fedmitr.settings.schema import ClientSettings, EnsembleSettings, FuseflSettings
from fedmitr.vision.stages import stage_names

MODES = ("mean_probs", "mean_logits", "size", "class")
LOCAL = ClientSettings(epochs=2, batch_size=6, lr=1e-3)
HELD = [(0, 1, 2, 3), (3, 4, 5), (7,)]  # classes of the three clients: 12, 9 and 3 images


def shared_model():
    return loud(fm.create_vit("vit_micro", 10), seed=5, scale=0.05).requires_grad_(True)


def three_shards(task):
    """Shards of the classes `HELD`, three images of each class."""

    def shard_of(classes):
        rows = [torch.nonzero(task.train.labels == c)[:3, 0] for c in classes]
        return task.train.subset(torch.cat(rows))

    return [shard_of(classes) for classes in HELD]


def run_settings(stages=2, adaptor="average", mode="mean_probs"):
    return Settings(
        client=LOCAL,
        ensemble=EnsembleSettings(mode=mode),
        fusefl=FuseflSettings(stages=stages, adaptor=adaptor),
    )


def make_clients(initial, shards, store, run, **options):
    return [
        FusionClient(initial, shard, run.client, run.fusefl, store, client=k, key=f"client {k}", **options)
        for k, shard in enumerate(shards)
    ]


class Wire:
    """A client that records what passes: everything received and sent, stage by stage."""

    def __init__(self, inner):
        self.inner, self.received, self.sent = inner, [], []
        self.client, self.size, self.shape = inner.client, inner.size, inner.shape
        self.class_counts = inner.class_counts

    def train_stage(self, stage, received):
        self.received.append({name: value.clone() for name, value in received.items()})
        message = self.inner.train_stage(stage, received)
        self.sent.append({name: value.clone() for name, value in message.items()})
        return message


class Ready:
    """A client that trains nothing: it sends the stages of a finished model, and an adaptor."""

    def __init__(self, vit, client, size, stages, adaptor=None):
        self.client, self.size, self.vit, self.stages = client, size, vit, stages
        self.shape = fm.upload.ModelShape.of("vit_micro", vit)
        self.class_counts, self.adaptor = (size, *[0] * 9), adaptor

    def train_stage(self, stage, received):
        state = self.vit.state_dict()
        message = {name: state[name].clone() for name in stage_names(self.vit, self.stages, stage)}
        if stage and self.adaptor:
            message |= {f"adaptor.{n}": v.clone() for n, v in self.adaptor.state_dict().items()}
        return message


def several(count):
    return [loud(fm.create_vit("vit_micro", 10), seed=20 + k) for k in range(count)]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
