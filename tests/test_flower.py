"""flower_app.py: the message, the server before a grid that needs no network, and real processes."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

from flower_processes import cluster
from flower_run import same_weights
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message as unavailable
from flwr.supercore.task_identity import TaskIdentity
from packaging.requirements import Requirement
from test_cli import SMALL

import fedmitr as fm
from fedmitr.core.errors import BadInput
from fedmitr.evaluation.metrics import accuracy
from fedmitr.flower_app import DEFAULTS, REFUSED, Order, accept, client_app, local_upload, pack, serve, unpack
from fedmitr.methods import METHODS
from fedmitr.settings import build, parse_assignment

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(fm.__file__).parent.parent
GIVEN = SMALL | {"partition.clients": 3, "partition.alpha": 1.0}
SET = " ".join(f"{name}={value}".replace(" ", "") for name, value in GIVEN.items())


class Loopback:
    """A grid whose nodes are functions of this process: node k runs the client app with its node config.

    silent nodes never answer, for lost ones Flower does; spoil(node, reply) may change a reply; last comes
    first where reverse.
    """

    def __init__(self, configs, silent=(), lost=(), spoil=None, reverse=False):
        self.configs, self.silent, self.lost = configs, silent, lost
        self.spoil, self.reverse = spoil, reverse
        self.sent, self.replies = [], []

    def get_node_ids(self):
        return list(self.configs)

    def send_and_receive(self, messages, *, timeout=None):
        for message in messages:
            self.sent.append(message)
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"to {node}"  # as Flower's own grids do
            if node in self.silent:
                continue
            if node in self.lost:
                self.replies.append(unavailable(message.metadata, "node_unavail"))
                continue
            reply = client_app(message, Context(1, node, self.configs[node], RecordDict(), {}))
            self.replies.append(self.spoil(node, reply) if self.spoil else reply)
        return self.replies[::-1] if self.reverse else self.replies


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Who writes the messages of this process; Flower's own processes set it."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the stores of the clients, of the server and of `fedmitr run`."""
    return tmp_path_factory.mktemp("flower")


@pytest.fixture(scope="module")
def nodes(folder):
    """Three nodes, numbered otherwise than the clients they hold, each with its own store."""
    return {
        11 * (4 - k): {"partition-id": k, "num-partitions": 3, "store": str(folder / f"client{k}")}
        for k in range(3)
    }


@pytest.fixture(scope="module")
def experiment(folder):
    """The same clients as `fedmitr run` has them."""
    settings = fm.Settings.load("smoke", dict(map(parse_assignment, SET.split())) | {"seed": 3})
    return fm.Experiment(settings, folder / "run")


@pytest.fixture
def config(tmp_path):
    """The run config; the server's store is new in every test."""
    here = {"out": str(tmp_path / "global.safetensors"), "store": str(tmp_path / "store"), "wait": 0}
    return here | {"profile": "smoke", "seed": 3, "set": SET}


# The message.


@pytest.mark.parametrize("counted", [True, False])
def test_an_upload_survives_the_message_bit_for_bit(uploads, counted):
    upload = uploads[1] if counted else uploads[1].without_counts()
    again = unpack(pack(upload), 7, lambda client: upload.shape)
    assert again.digest == upload.digest and again.card == upload.card


def weight(name, change):
    def spoil(content):
        content["weights"][name] = Array(change(torch.from_numpy(content["weights"][name].numpy())))

    return spoil


def card(**fields):
    def spoil(content):
        for name, value in fields.items():
            name = name.replace("__", ".")
            content["card"].pop(name) if value is None else content["card"].__setitem__(name, value)

    return spoil


def cut(content):
    whole = content["weights"]["head.bias"]
    content["weights"]["head.bias"] = Array(whole.dtype, whole.shape, whole.stype, whole.data[:-9])


MALFORMED = {
    "shape": (weight("head.bias", lambda w: w[:3]), "client 1", "'head.bias'"),
    "type": (weight("head.bias", lambda w: w.double()), "client 1", "float64"),
    "nan": (weight("head.bias", lambda w: w * float("nan")), "client 1", "NaN"),
    "truncated": (cut, "client 1", "not readable"),
    "missing weight": (lambda c: c["weights"].pop("head.bias"), "client 1", "'head.bias' is missing"),
    "unknown weight": (lambda c: c["weights"].__setitem__("x", Array(torch.zeros(1))), "client 1", "unknown"),
    "no size": (card(size=None), "client 1", "size"),
    "size 0": (card(size=0), "client 1", "size"),
    "no client": (card(client=None), "node 7", "client"),
    "client -1": (card(client=-1), "client -1", "client"),
    "client by name": (card(client="me"), "node 7", "client"),
    "no shape": (card(shape__name=None), "client 1", "shape.name"),
    "another field": (card(images=3), "client 1", "images"),
    "another model": (card(shape__name="deit_tiny_patch16_224"), "client 1", "deit_tiny"),
    "a huge model": (card(shape__num_classes=10**12), "client 1", "num_classes"),
    "counts": (card(class_counts=[1, 2]), "client 1", "class_counts"),
    "counts of another size": (card(class_counts=[3] * 10), "client 1", "class_counts"),
    "no card": (lambda c: c.pop("card"), "node 7", "card"),
    "no weights": (lambda c: c.pop("weights"), "node 7", "weights"),
    "more than an upload": (lambda c: c.__setitem__("images", ConfigRecord()), "node 7", "images"),
    "nothing": (lambda c: c.clear(), "node 7", "nothing"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_upload_is_one_line_that_names_its_sender(case, uploads, one_line):
    spoil, *words = MALFORMED[case]
    content = pack(uploads[1])
    spoil(content)
    with pytest.raises(BadInput) as error:
        unpack(content, 7, lambda client: uploads[1].shape)
    one_line(error.value, *words)


def test_settings_survive_the_message(experiment):
    order = Order("dense", experiment.settings, ("a", "b"))
    assert Order.unpack(order.pack()) == order


# The server.


@pytest.mark.parametrize("method, reverse", [("fedmitr", False), ("fedmitr", True), ("fedavg", True)])
def test_the_global_model_is_that_of_a_run_bit_for_bit(method, reverse, nodes, experiment, config, capfd):
    grid = Loopback(nodes, reverse=reverse)
    outcome = serve(grid, config | {"method": method})
    (expected,) = experiment.outcome(method).models
    written = load_file(config["out"])
    assert same_weights(written, expected.state_dict())
    assert same_weights(written, outcome.models[0].state_dict())
    assert "3 of 3 clients sent a usable upload\n" in capfd.readouterr().err
    for reply in grid.replies:  # nothing but the upload crosses
        assert set(reply.content) == {"weights", "card"}
    (kept,) = Path(config["store"], "received").iterdir()
    digests = [fm.Upload.load(kept / f"client{k}").digest for k in range(3)]
    assert digests == [u.digest for u in experiment.uploads]


@pytest.mark.parametrize("swapped", [False, True])
def test_clients_with_models_of_their_own_give_the_model_of_a_run(swapped, nodes, config, capfd):
    """And an upload of another architecture than its client's is refused, though some client has that one."""
    mixed = SET + " client.models=[vit_micro_patch6,vit_micro] distill.start=initial"

    def swap(node, reply):
        if swapped and nodes[node]["partition-id"] == 1:
            other = fm.create_vit("vit_micro_patch6", 10)
            reply.content["weights"] = ArrayRecord(other.state_dict())
            reply.content["card"]["shape.name"] = "vit_micro_patch6"
        return reply

    outcome = serve(Loopback(nodes, spoil=swap), config | {"set": mixed})
    told = capfd.readouterr().err
    if swapped:
        assert "rejected: upload of client 1: its model is name='vit_micro_patch6'" in told
        return
    settings = fm.Settings.load("smoke", dict(map(parse_assignment, mixed.split())) | {"seed": 3})
    (expected,) = fm.Experiment(settings, config["store"]).outcome("fedmitr").models
    assert same_weights(outcome.models[0].state_dict(), expected.state_dict())


@pytest.mark.parametrize("method, counted", [("fedavg", False), ("fedftg", True)])
def test_the_class_histogram_crosses_only_where_it_is_needed(method, counted, nodes, config):
    plain = SET + " ensemble.mode=size inversion.teacher=ensemble fedftg.generator_steps=1 fedftg.rounds=1"
    grid = Loopback(nodes)
    serve(grid, config | {"method": method, "set": plain})
    assert [("class_counts" in reply.content["card"]) for reply in grid.replies] == [counted] * 3


@pytest.mark.parametrize("how, word", [("silent", "did not answer in 5 s\n"), ("lost", "Node Unavailable")])
def test_without_one_node_the_others_go_on(how, word, nodes, experiment, config, capfd):
    node = next(node for node, held in nodes.items() if held["partition-id"] == 1)
    outcome = serve(Loopback(nodes, **{how: {node}}), config | {"method": "fedavg", "timeout": 5})
    left = [experiment.uploads[k] for k in (0, 2)]
    expected = METHODS["fedavg"](left, experiment.settings, experiment.store).models[0]
    assert same_weights(outcome.models[0].state_dict(), expected.state_dict())
    told = capfd.readouterr().err
    (line,) = [line for line in told.splitlines(keepends=True) if line.startswith("fedmitr: node")]
    assert str(node) in line and word in line
    assert "2 of 3 clients sent a usable upload; missing: 1\n" in told


def test_a_client_that_fails_says_why_at_home_only(nodes, config, capfd):
    failing = {node: dict(held) for node, held in nodes.items()}
    failing[44]["data-dir"] = "nowhere/mine"
    grid = Loopback(failing)
    serve(grid, config | {"method": "fedavg"})
    (reply,) = [r for r in grid.replies if r.has_error()]
    assert reply.error.reason == "client 0 failed; its own log says why"
    told = capfd.readouterr().err
    assert "data-dir='nowhere/mine'" in told and "node 44: client 0 failed" in told and "missing: 0\n" in told


def test_two_uploads_for_one_client_are_both_left_out(nodes, config, capfd):
    twice = nodes | {99: nodes[44]}
    serve(Loopback(twice), config | {"method": "fedavg"})
    told = capfd.readouterr().err
    assert "rejected: upload of client 0: came from 2 nodes\n" in told and "missing: 0\n" in told


def test_a_spoilt_upload_is_left_out_by_name(nodes, config, capfd):
    def spoil(node, reply):
        if node == 33:
            weight("head.bias", lambda w: w * float("inf"))(reply.content)
        return reply

    serve(Loopback(nodes, spoil=spoil), config | {"method": "fedavg"})
    told = capfd.readouterr().err
    assert "rejected: upload of client 1: weight 'head.bias' holds NaN or Inf\n" in told


@pytest.mark.parametrize(
    "change, word",
    [({"client": 3}, "allowed are 0 to 2"), ({"class_counts": None}, "class_counts is missing")],
)
def test_uploads_that_the_settings_do_not_ask_for_are_rejected(change, word, uploads, experiment, capfd):
    content = pack(dataclasses.replace(uploads[1], **change))
    ask = Message(RecordDict(), 7, "train")
    order = Order("fedmitr", experiment.settings, ())
    assert accept({7: Message(content, reply_to=ask)}, order, order.shape) == []
    assert word in capfd.readouterr().err


def test_an_error_without_a_reason_is_one_line(uploads, experiment, capfd):
    ask = Message(RecordDict(), 7, "train")
    reasons = (None, "", "first\nsecond")
    replies = {node: Message(Error(0, reason), reply_to=ask) for node, reason in enumerate(reasons)}
    assert accept(replies, Order("fedmitr", experiment.settings, ()), uploads[0].shape) == []
    assert len(capfd.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize("there", [0, 1])
def test_too_few_uploads_are_one_line(there, nodes, config, one_line):
    few = dict(list(nodes.items())[:there])
    with pytest.raises(BadInput) as error:
        serve(Loopback(few), config)
    one_line(error.value, "min-clients=2", f"{there} of 3", "missing: ")
    assert not Path(config["out"]).exists()


@pytest.mark.parametrize(
    "change, word",
    [
        *(({"method": method}, f"method={method!r}") for method in REFUSED),
        ({"method": "fedprox"}, "method='fedprox'"),
        ({"profile": "huge"}, "profile='huge'"),
        ({"seed": -1}, "seed"),
        ({"set": "client.epochs"}, "client.epochs"),
        ({"set": "distill.step=3"}, "distill.step"),
        ({"set": "model.name=resnet18"}, "model.name"),
        ({"set": "task.name=image-folder"}, "classes=''"),
        ({"classes": "cat,dog"}, "classes='cat,dog'"),
        ({"set": "task.name=image-folder", "classes": "cat, cat"}, "different names"),
        ({"set": "client.models=[vit_maximal] distill.start=initial"}, "client.models"),
        ({"set": "client.models=[vit_micro_deep]"}, "distill.start"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line_before_any_client_is_asked(change, word, nodes, config, one_line):
    grid = Loopback(nodes)
    with pytest.raises(BadInput) as error:
        serve(grid, config | change)
    one_line(error.value, word)
    assert not grid.sent


@pytest.mark.parametrize("node", [{}, {"partition-id": 3}, {"partition-id": 0, "num-partitions": 2}])
def test_a_node_that_does_not_know_which_client_it_is_fails_at_home(node, config, capfd):
    with pytest.raises(BadInput):
        serve(Loopback({7: node}), config)
    assert "partition-id" in capfd.readouterr().err


# A folder of one's own.


@pytest.fixture
def pictures(tmp_path):
    """Two clients' folders: one holds two classes and a broken file, the other a single class."""
    rng = torch.Generator().manual_seed(0)
    for client, held in enumerate((("cat", "dog"), ("fox",))):
        for name in held:
            place = tmp_path / f"own{client}" / name
            place.mkdir(parents=True)
            for k in range(4):
                pixels = torch.randint(256, (30, 26), generator=rng, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(place / f"{k}.png")
    (tmp_path / "own0" / "cat" / "broken.jpg").write_bytes(b"no image")
    return tmp_path


def test_clients_train_on_folders_of_their_own(pictures, config, capfd):
    nodes = {5 + k: {"partition-id": k, "data-dir": str(pictures / f"own{k}")} for k in range(2)}
    nodes = {node: held | {"store": str(pictures / "store")} for node, held in nodes.items()}
    grid = Loopback(nodes)
    small = SET + " task.name=image-folder partition.clients=2"
    serve(grid, config | {"method": "fedavg", "set": small, "classes": "cat, dog, fox"})
    assert [r.content["card"]["class_counts"] for r in grid.replies] == [[4, 4, 0], [0, 0, 4]]
    assert load_file(config["out"])["head.bias"].shape == (3,)
    mixed = small + " client.models=[vit_micro_deep] distill.start=initial"
    serve(Loopback(nodes), config | {"set": mixed, "classes": "cat, dog, fox"})
    assert load_file(config["out"])["head.bias"].shape == (3,)
    told = capfd.readouterr().err
    assert "cat/broken.jpg cannot be read and is left out\n" in told and "2 of 2 clients" in told


def test_a_class_that_nobody_named_is_one_line(pictures, one_line):
    settings = build({"task": {"name": "image-folder"}, "partition": {"clients": 2}})
    order = Order("fedavg", settings, ("cat", "fox"))
    with pytest.raises(BadInput) as error:
        local_upload(order, {"partition-id": 0, "data-dir": str(pictures / "own0"), "store": str(pictures)})
    one_line(error.value, "'dog' is not among classes=cat,fox")


# What ships.


def test_the_app_folder_has_the_defaults_of_the_code():
    app = tomllib.loads((ROOT / "flower" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["config"] == DEFAULTS
    assert app["components"] == {
        "serverapp": "fedmitr.flower_app:server_app",
        "clientapp": "fedmitr.flower_app:client_app",
    }


def test_flower_is_optional():
    code = """
import sys
sys.modules["flwr"] = None
import fedmitr
try:
    import fedmitr.flower_app
except fedmitr.BadInput as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "fedmitr[flower]" in done.stdout


def test_flower_has_all_that_it_asks_for():
    """requirements-flower.txt is installed without dependencies: the others come from requirements.txt."""
    (asked,) = (r for r in importlib.metadata.requires("fedmitr") if "flower" in r)
    needs, told = [Requirement(asked)], set()
    for need in needs:
        assert need.specifier.contains(importlib.metadata.version(need.name)), need
        for line in set(importlib.metadata.requires(need.name) or ()) - told:
            below = Requirement(line)
            extras = need.extras or {""}
            if not below.marker or any(below.marker.evaluate({"extra": extra}) for extra in extras):
                told.add(line)
                needs.append(below)


# Real processes on this machine.


@pytest.fixture(scope="module")
def five_nodes(folder):
    with cluster(folder, 5) as made:
        yield made


def start(nodes, name, seed):
    nodes.run(name, profile="smoke", seed=seed, set=f"{SET} partition.clients=5", timeout=120)


def five(seed, folder):
    """The same five clients as `fedmitr run` has them."""
    given = dict(map(parse_assignment, SET.split())) | {"seed": seed, "partition.clients": 5}
    return fm.Experiment(fm.Settings.load("smoke", given), folder / "run")


def test_five_real_processes_make_the_model_of_a_run(five_nodes, folder):
    start(five_nodes, "five", seed=3)
    five_nodes.wait_for("five", "global model of fedmitr")
    assert "5 of 5 clients sent a usable upload\n" in five_nodes.log("five")
    experiment = five(3, folder)
    (expected,) = experiment.outcome("fedmitr").models
    assert same_weights(load_file(folder / "five.safetensors"), expected.state_dict())
    run = fm.run("fedmitr", experiment.settings, folder / "run")
    assert accuracy(expected, experiment.task.test) == run.accuracy


def test_when_a_real_process_is_killed_the_others_go_on_and_say_so(five_nodes, folder):
    works = "Start `flwr-clientapp` process"
    before = five_nodes.log("node2").count(works)
    start(five_nodes, "four", seed=4)
    five_nodes.wait_for("node2", works, before + 1)
    five_nodes.kill("node2")
    five_nodes.wait_for("four", "global model of fedmitr")
    told = five_nodes.log("four")
    assert "Node Unavailable" in told
    assert "4 of 5 clients sent a usable upload; missing: 2\n" in told
    experiment = five(4, folder)
    left = [experiment.uploads[k] for k in (0, 1, 3, 4)]
    (expected,) = METHODS["fedmitr"](left, experiment.settings, experiment.store).models
    assert same_weights(load_file(folder / "four.safetensors"), expected.state_dict())
