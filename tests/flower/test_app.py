"""flower_app.py: server and clients on a grid that needs no network."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("flwr")

from flower_grid import SET, Loopback
from flower_run import same_weights
from flwr.app import Array, ArrayRecord

import fedmitr as fm
from fedmitr.core.errors import BadInput
from fedmitr.data.photos import own_images
from fedmitr.flower_app import Order, local_upload, refusal, serve
from fedmitr.methods import METHODS
from fedmitr.settings import build, parse_assignment
from fedmitr.vision.features import FeatureClassifier
from fedmitr.vision.vit import normalisation

REFUSED = [name for name, method in METHODS.items() if refusal(method)]


SENT = [
    ("fedmitr", {"weights"}),
    ("fedavg", {"weights"}),
    ("ridge", {"statistics"}),
    ("lda", {"statistics"}),
    ("fedmitr_plus", {"weights", "statistics"}),
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method, sent", SENT, ids=[method for method, _ in SENT])
def test_the_global_model_is_that_of_a_run_bit_for_bit(
    method, sent, reverse, nodes, experiment, config, capfd
):
    grid = Loopback(nodes, reverse=reverse)
    outcome = serve(grid, config | {"method": method})
    (expected,) = experiment.outcome(method).models
    written = load_file(config["out"])
    assert same_weights(written, expected.state_dict())
    assert same_weights(written, outcome.models[0].state_dict())
    assert "3 of 3 clients sent a usable upload\n" in capfd.readouterr().err
    for reply in grid.replies:  # nothing but the upload crosses
        assert set(reply.content) == sent | {"card"}
        assert ("class_counts" in reply.content["card"]) == (method == "fedmitr_plus")
    (kept,) = Path(config["store"], "received").iterdir()
    digests = [fm.Upload.load(kept / f"client{k}").digest for k in range(3)]
    assert digests == [u.digest for u in experiment.uploads_for(method)]


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


@pytest.mark.parametrize("method", ["ridge", "fedmitr_plus"])
def test_noise_is_drawn_by_the_client_and_sent_again_as_it_was(method, nodes, config):
    """The server knows the seed of everything else; what a client has sent once spends nothing anew."""
    pytest.importorskip("opacus")
    private = SET + " client.dp_epsilon=20 statistics.dp_epsilon=5"
    sent = []
    for folder in ("one", "two"):
        store = str(Path(config["store"]) / folder)
        serve(Loopback(nodes), config | {"method": method, "set": private, "store": store})
        (kept,) = Path(store, "received").iterdir()
        sent.append([fm.Upload.load(kept / f"client{k}") for k in range(3)])
    assert [u.digest for u in sent[0]] == [u.digest for u in sent[1]]
    settings = fm.Settings.load("smoke", dict(map(parse_assignment, private.split())) | {"seed": 3}, method)
    guessed = fm.Experiment(settings, config["store"]).uploads_for(method)  # from the seed alone
    for own, other in zip(sent[0], guessed, strict=True):
        assert own.noises == other.noises and own.features == other.features
        assert not torch.equal(own.statistics.gram, other.statistics.gram)
        if own.weights:
            assert not torch.equal(own.weights["head.weight"], other.weights["head.weight"])


def test_an_upload_that_lacks_the_noise_is_refused(nodes, config, capfd):
    pytest.importorskip("opacus")

    def hide(node, reply):
        if node == 33:
            for name in [n for n in reply.content["card"] if n.startswith("features.noise")]:
                del reply.content["card"][name]
        return reply

    private = SET + " statistics.dp_epsilon=5"
    serve(Loopback(nodes, spoil=hide), config | {"method": "ridge", "set": private})
    told = capfd.readouterr().err
    assert "rejected: upload of client 1: its statistics are of" in told and "missing: 1\n" in told


@pytest.mark.parametrize("method, counted", [("fedavg", False), ("fedftg", True)])
def test_the_class_histogram_crosses_only_where_it_is_needed(method, counted, nodes, config):
    plain = SET + " ensemble.mode=size inversion.teacher=ensemble fedftg.generator_steps=1 fedftg.rounds=1"
    grid = Loopback(nodes)
    serve(grid, config | {"method": method, "set": plain})
    assert [("class_counts" in reply.content["card"]) for reply in grid.replies] == [counted] * 3


@pytest.mark.parametrize("how, word", [("silent", "did not reply in 5 s\n"), ("lost", "Node Unavailable")])
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
            bias = torch.from_numpy(reply.content["weights"]["head.bias"].numpy())
            reply.content["weights"]["head.bias"] = Array(bias * float("inf"))
        return reply

    serve(Loopback(nodes, spoil=spoil), config | {"method": "fedavg"})
    told = capfd.readouterr().err
    assert "rejected: upload of client 1: weight 'head.bias' holds NaN or Inf\n" in told


def test_without_one_node_statistics_are_those_of_the_others(nodes, experiment, config, capfd):
    node = next(node for node, held in nodes.items() if held["partition-id"] == 1)
    outcome = serve(Loopback(nodes, silent={node}), config | {"method": "ridge"})
    left = [experiment.uploads_for("ridge")[k] for k in (0, 2)]
    expected = METHODS["ridge"](left, experiment.settings, experiment.store).models[0]
    assert same_weights(outcome.models[0].state_dict(), expected.state_dict())
    assert "2 of 3 clients sent a usable upload; missing: 1\n" in capfd.readouterr().err


def test_the_file_of_a_method_on_statistics_is_read_as_the_docs_say(nodes, experiment, config):
    (model,) = serve(Loopback(nodes), config | {"method": "ridge"}).models
    arrays, tokens = load_file(config["out"]), experiment.settings.statistics.tokens
    vit = fm.create_vit("vit_micro", 10)
    again = FeatureClassifier([vit], tokens, arrays["head.weight"], arrays["head.bias"])
    again.load_state_dict(arrays)
    images = experiment.task.validation.images[:9]
    assert torch.equal(again(images), model(images))


def test_statistics_of_another_shared_model_are_left_out_by_name(nodes, config, capfd):
    """A client whose file of shared weights is another one says so by its digest."""

    def swap(node, reply):
        if nodes[node]["partition-id"] == 2:
            reply.content["card"]["features.weights"] = "0" * 64
        return reply

    serve(Loopback(nodes, spoil=swap), config | {"method": "ridge"})
    told = capfd.readouterr().err
    assert "rejected: upload of client 2: its statistics are of tokens='both'" in told
    assert "with weights '000000000000'" in told and "missing: 2\n" in told


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
        *(({"method": m}, f"method={m!r}: {refusal(METHODS[m])}") for m in REFUSED),
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
    assert [r.content["card"]["size"] for r in grid.replies] == [8, 4]
    assert load_file(config["out"])["head.bias"].shape == (3,)
    mixed = small + " client.models=[vit_micro_deep] distill.start=initial"
    serve(Loopback(nodes), config | {"set": mixed, "classes": "cat, dog, fox"})
    assert load_file(config["out"])["head.bias"].shape == (3,)
    told = capfd.readouterr().err
    assert "cat/broken.jpg cannot be read and is left out\n" in told and "2 of 2 clients" in told


@pytest.mark.parametrize("method", ["ridge", "fedmitr_plus"])
def test_clients_sum_features_of_folders_of_their_own(method, pictures, config):
    nodes = {5 + k: {"partition-id": k, "data-dir": str(pictures / f"own{k}")} for k in range(2)}
    nodes = {node: held | {"store": str(pictures / "store")} for node, held in nodes.items()}
    grid = Loopback(nodes)
    small = SET + " task.name=image-folder partition.clients=2 statistics.tokens=cls"
    small += " fedmitr_plus.regions=false fedmitr_plus.views=0"
    outcome = serve(grid, config | {"method": method, "set": small, "classes": "cat, dog, fox"})
    (kept,) = Path(config["store"], "received").iterdir()
    uploads = [fm.Upload.load(kept / f"client{k}") for k in range(2)]
    assert [u.statistics.counts.tolist() for u in uploads] == [[4, 4, 0], [0, 0, 4]]
    assert [u.weights is None for u in uploads] == [method == "ridge"] * 2
    vit = fm.create_vit("vit_micro", 3).double().eval()
    for client, upload in enumerate(uploads):  # timm's own pass over the client's files
        names, stats = ("cat", "dog", "fox"), normalisation(vit)
        pixels, labels = own_images(str(pictures / f"own{client}"), names, 24, stats)
        with torch.no_grad():
            features = vit.forward_features(pixels[torch.arange(len(labels))].double())[:, 0]
        torch.testing.assert_close(upload.statistics.gram, features.T @ features)
    if method == "ridge":
        (model,) = outcome.models
        assert model(torch.zeros(2, 1, 24, 24)).shape == (2, 3)
        assert load_file(config["out"])["head.bias"].shape == (3,)


def test_a_class_that_nobody_named_is_one_line(pictures, one_line):
    settings = build({"task": {"name": "image-folder"}, "partition": {"clients": 2}})
    order = Order("fedavg", settings, ("cat", "fox"))
    with pytest.raises(BadInput) as error:
        local_upload(order, {"partition-id": 0, "data-dir": str(pictures / "own0"), "store": str(pictures)})
    one_line(error.value, "'dog' is not among classes=cat,fox")
