"""The same clients and the same server as a Flower app: real machines, one upload from each (docs/flower.md).

The server sends settings and gets uploads; it runs the method's own function on them, as every other run
does. For the same shards, seed and settings its global model is the same, bit for bit on one machine. This
module holds client and server code; only the client's imports data modules.
"""

import json
import secrets
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from shlex import split
from typing import Any, NamedTuple

import torch

from .core.errors import BadInput
from .core.paths import default_store
from .core.processes import jobs
from .core.rng import make_rng
from .core.store import Store, check_output, fingerprint, write_tensors
from .methods import METHODS, Method, Outcome, check_methods, find
from .settings import Settings, build, parse_assignment
from .settings.schema import TASKS
from .upload import Features, ModelShape, Upload
from .vision.vit import client_vit, create_vit, normalisation, shared_vit, vit_beside, weights_digest

try:
    from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.common.constant import ErrorCode
    from flwr.serverapp import Grid, ServerApp

    from .flower_message import pack, unpack
except ImportError:
    raise BadInput("fedmitr.flower_app needs Flower 1.42: pip install 'fedmitr[flower]'") from None

# Flower's run config, as in flower/pyproject.toml, which says what each means.
DEFAULTS = {
    "method": "fedmitr",
    "profile": "laptop",
    "seed": 0,
    "set": "",
    "classes": "",
    "min-clients": 2,
    "wait": 60,
    "timeout": 3600,
    "out": "global.safetensors",
    "store": "",
}


def refusal(method: Method) -> str:
    """Return why a method cannot run as a Flower app of one exchange; empty where it can."""
    if method.given in ("clients", "stages"):
        return "it takes several exchanges"
    if method.given == "images":
        return "it needs clients' images"
    if method.given == "central":
        return "it needs all data in one place"
    if not method.is_shipped:
        return "its clients know only the methods that ship"
    if not method.sends:
        return "its clients send nothing"
    if not method.single_model:
        return "it leaves no single model, but the uploads, which every other method keeps"
    return ""


class Order(NamedTuple):
    """The server's message to clients: method, settings, class names where the task does not fix them."""

    method: str
    settings: Settings
    classes: tuple[str, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Order":
        """Read Flower's run config; BadInput for what `fedmitr run` refuses and for what `refusal` names."""
        method, seed = config["method"], config["seed"]
        reason = refusal(METHODS[method]) if method in METHODS else "unknown"
        if reason:
            allowed = ", ".join(name for name, one in METHODS.items() if not refusal(one))
            raise BadInput(f"method={method!r}: {reason}; allowed are {allowed}")
        overrides = dict(map(parse_assignment, split(config["set"]))) | {"seed": seed}
        settings = Settings.load(config["profile"], overrides, method)
        check_methods([method], settings)
        names = list(dict.fromkeys(name.strip() for name in config["classes"].split(",") if name.strip()))
        expected = TASKS[settings.task.name]
        if len(names) < 2 if expected is None else names and len(names) != expected:
            raise BadInput(
                f"classes={config['classes']!r}: task.name={settings.task.name} needs "
                f"{expected or 'two or more'} different names, a,b,…"
            )
        return cls(method, settings, tuple(names))

    @property
    def num_classes(self) -> int:
        """The number of classes of the task."""
        return len(self.classes) or TASKS[self.settings.task.name]

    @property
    def shape(self) -> ModelShape:
        """The shape of the global model; a client's model differs from it by its name alone.

        Raises BadInput for a client's model that cannot have this shape. No weights are read.
        """
        settings = self.settings
        vit = create_vit(settings.model.name, self.num_classes, image_size=settings.model.image_size)
        for name in {settings.model_of(k).name for k in range(settings.partition.clients)}:
            vit_beside(vit, name)
        return ModelShape.of(settings.model.name, vit)

    @property
    def features(self) -> Features | None:
        """What statistics must be sums of; None where the method needs none. Reads the shared weights."""
        if not find(self.method).needs_statistics_under(self.settings):
            return None
        own = find(self.method).adapted(self.settings).statistics
        return Features.under(self.shape, weights_digest(self.settings.model), own)

    def pack(self) -> RecordDict:
        """Write the order as Flower's records."""
        record = {"method": self.method, "settings": self.settings.model_dump_json()}
        return RecordDict({"order": ConfigRecord(record | {"classes": list(self.classes)})})

    @classmethod
    def unpack(cls, content: RecordDict) -> "Order":
        """Read what `pack` wrote."""
        record = content["order"]
        return cls(record["method"], build(json.loads(record["settings"])), tuple(record["classes"]))


# --- the client -------------------------------------------------------------------------------------

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Reply with one upload, made from the node's own data, or with an error that tells nothing else."""
    try:
        return Message(
            pack(local_upload(Order.unpack(message.content), context.node_config)), reply_to=message
        )
    except Exception as error:
        # The error may tell of paths and data, so it stays here: the server learns only that there was one.
        told = f"fedmitr: {error}\n" if isinstance(error, BadInput) else traceback.format_exc()
        print(told, end="", file=sys.stderr, flush=True)
        who = context.node_config.get("partition-id", "without a partition-id")
        reason = f"client {who} failed; its own log says why"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def local_upload(order: Order, node: Mapping[str, Any]) -> Upload:
    """Compute what this client sends: weights, class counts, statistics, each only where the order needs it.

    node: `partition-id`, the client's number; `data-dir`, a folder <class>/*.jpg of its own instead of the
    shard that `fedmitr run` would give it; `store`, its folder of artefacts. Raises BadInput where these
    cannot be used, and as `Experiment` does. Noise of differential privacy is drawn from this machine's own
    random numbers, which the server does not know. What the client's store has is sent again, without new
    noise; with `data-dir` nothing is stored, so that every order spends ε anew.
    """
    from .client.noise import told_counts
    from .client.statistics import sent_statistics
    from .client.train import train_client
    from .data.photos import own_images
    from .data.tasks import Split
    from .experiments.run import Experiment

    settings, client = order.settings, node.get("partition-id")
    count = settings.partition.clients
    if not isinstance(client, int) or not 0 <= client < count or node.get("num-partitions", count) != count:
        raise BadInput(
            f"partition-id={client!r} of num-partitions={node.get('num-partitions', count)!r}: "
            f"allowed are 0 to {count - 1} of partition.clients={count}"
        )
    record, secret = find(order.method), secrets.randbits(63)
    experiment = Experiment(settings, node.get("store"), noise_seed=secret)
    if not (folder := node.get("data-dir")):
        return experiment.upload_for(record, client)
    shared, model = shared_vit(settings.model, order.num_classes), settings.model_of(client)
    shard = Split(*own_images(folder, order.classes, shared.patch_embed.img_size[0], normalisation(shared)))
    if record.needs_weights:
        vit = shared if model == settings.model else client_vit(shared, model)
        upload = train_client(
            vit,
            shard,
            settings.client,
            client=client,
            name=model.name,
            seed=settings.seed,
            noise_seed=secret,
        )
    else:
        upload = Upload(client, len(shard), order.shape, None)
    if features := order.features:
        sums = sent_statistics(shared, shard, features, make_rng(secret, "noise of sums"), f"client {client}")
        upload = upload.with_statistics(sums, features)
    counted = record.needs_counts_under(settings)
    return told_counts(upload, counted, settings.statistics.smallest).checked()


# --- the server -------------------------------------------------------------------------------------

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one round: settings out, uploads in, one global model written."""
    serve(grid, context.run_config)


def serve(grid: Grid, config: Mapping[str, Any]) -> Outcome:
    """Get every node's upload, run the method on those that came, write model and uploads.

    config: any of `DEFAULTS`. Raises BadInput, one line, before any message is sent, for settings that cannot
    work, and later for fewer than `min-clients` usable uploads.
    """
    config = DEFAULTS | dict(config)
    order = Order.read(config)
    store, out = Store(config["store"] or default_store()), Path(config["out"]).expanduser()
    check_output(out, f"out={str(out)!r}")
    jobs()  # a number of processes that cannot be read is found now
    torch.set_num_threads(order.settings.threads)
    uploads = collect(grid, order, config)
    kept = store.path("received", key := fingerprint("received", [u.digest for u in uploads]))
    if not kept.is_dir():  # clients send once: what came outlives a server that is killed from here on
        store.put("received", key, lambda at: [u.save(at / f"client{u.client}") for u in uploads])
    outcome = find(order.method)(uploads, order.settings, store)
    write_tensors(outcome.models[0].state_dict(), out)
    say(f"global model of {order.method} in {out}, the uploads in {kept}")
    return outcome


def collect(grid: Grid, order: Order, config: Mapping[str, Any]) -> list[Upload]:
    """Return the usable uploads by client number; log which are missing; BadInput if too few are left."""
    shape, clients = order.shape, order.settings.partition.clients
    nodes = wait_for_nodes(grid, clients, config["wait"])
    messages = [Message(order.pack(), node, "train", ttl=float(config["timeout"])) for node in nodes]
    received = list(grid.send_and_receive(messages, timeout=config["timeout"])) if messages else []
    # By the message that it replies to: for a node that is gone, Flower itself replies and is the sender.
    node_of = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    replies = {node_of[reply.metadata.reply_to_message_id]: reply for reply in received}
    for node in sorted(set(nodes) - set(replies)):
        say(f"node {node} did not reply in {config['timeout']} s")
    uploads = accept(replies, order, shape)
    missing = sorted(set(range(clients)) - {upload.client for upload in uploads})
    came = f"{len(uploads)} of {clients} clients sent a usable upload"
    came += f"; missing: {', '.join(map(str, missing))}" if missing else ""
    if len(uploads) < max(1, config["min-clients"]):
        raise BadInput(f"min-clients={config['min-clients']}: {came}")
    say(came)
    return uploads


def wait_for_nodes(grid: Grid, clients: int, seconds: float) -> list[int]:
    """Return all connected nodes, as soon as there is one for each client or the time is up."""
    end = time.monotonic() + seconds
    while len(nodes := sorted(grid.get_node_ids())) < clients and time.monotonic() < end:
        time.sleep(1)
    return nodes


def accept(replies: Mapping[int, Message], order: Order, shape: ModelShape) -> list[Upload]:
    """Return the usable uploads in the order of clients; log, for each other reply, what is wrong with it.

    replies: by node. shape: the global model's; a client's differs from it by its name alone. Where two nodes
    send for one client, neither can be told to be the true one, so both are left out.
    """
    uploads, clients = [], order.settings.partition.clients
    method, features = find(order.method), order.features
    counted = method.needs_counts_under(order.settings)

    def shape_of(client: int) -> ModelShape:
        if not method.needs_weights:  # statistics are those of the shared model
            return shape
        return shape.model_copy(update={"name": order.settings.model_of(client).name})

    for node, reply in sorted(replies.items()):
        if reply.has_error():
            say(f"node {node}: {next(iter((reply.error.reason or 'failed').splitlines()), 'failed')}")
            continue
        try:
            upload = unpack(reply.content, node, shape_of, features)
            if upload.client >= clients:
                raise BadInput(f"upload of client {upload.client}: allowed are 0 to {clients - 1}")
            if counted and upload.class_counts is None:
                raise BadInput(f"upload of client {upload.client}: class_counts is missing")
            if method.needs_weights and upload.weights is None:
                raise BadInput(f"upload of client {upload.client}: weights are missing")
            if features and upload.statistics is None:
                raise BadInput(f"upload of client {upload.client}: statistics are missing")
            upload = upload if features else upload.without_statistics()
            uploads.append(upload if counted else upload.without_counts())
        except BadInput as error:
            say(f"rejected: {error}")
    times = Counter(upload.client for upload in uploads)
    for client in sorted(client for client, n in times.items() if n > 1):
        say(f"rejected: upload of client {client}: came from {times[client]} nodes")
    return sorted((u for u in uploads if times[u.client] == 1), key=lambda u: u.client)


def say(line: str) -> None:
    """Write one line to the server's log."""
    print(f"fedmitr: {line}", file=sys.stderr, flush=True)
