"""flower_app.py over Flower's real processes on this machine."""

import pytest
from safetensors.torch import load_file

pytest.importorskip("flwr")

from flower_grid import SET
from flower_processes import cluster
from flower_run import same_weights

import fedmitr as fm
from fedmitr.evaluation.metrics import accuracy
from fedmitr.methods import METHODS
from fedmitr.settings import parse_assignment


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
