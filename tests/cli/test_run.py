"""cli.py, `fedmitr run`: one run from end to end, on clients of a few images."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import SMALL_OPTIONS, call_cli, read_cli, registrations_taken_back

from fedmitr.evaluation.metrics import accuracy
from fedmitr.experiments import clients
from fedmitr.experiments.run import Experiment
from fedmitr.methods import METHODS, Method, register
from fedmitr.settings import Settings, parse_assignment
from fedmitr.upload import Upload

pipeline = importlib.import_module("fedmitr.methods.fedmitr")  # the package's name for it is the method


def test_a_run_reports_what_outside_checks_rely_on(first):
    assert (first["method"], first["task"], first["seed"]) == ("fedmitr", "digits", 3)
    assert (first["alpha"], first["clients"]) == (1.0, 2)
    for name in ("accuracy", "ensemble_accuracy", "fedavg_accuracy", "best_local_accuracy"):
        assert 0 <= first[name] <= 1
    assert isinstance(first["run_id"], str) and first["run_id"]
    assert set(first["seconds"]) == {"clients", "inversion", "distillation"}
    assert all(value >= 0 for value in first["seconds"].values())
    assert first["versions"]["torch"] and first["versions"]["fedmitr"]
    assert (first["synthetic_images"], first["student_steps"], first["exchanges"]) == (4, 2, 1)
    assert first["inference_flops"] > 0 and first["download_bytes"] > 0


def test_the_reported_settings_make_the_same_run(first):
    settings = Settings.model_validate(first["settings"])
    words = SMALL_OPTIONS[SMALL_OPTIONS.index("--set") :]
    overrides = dict(parse_assignment(word) for word in words[1::2])
    overrides |= {"partition.clients": 2, "partition.alpha": 1.0, "seed": 3}
    assert settings == Settings.load("smoke", overrides)


def test_upload_bytes_are_the_files_in_the_store(first, store):
    folders = list((store / "uploads").iterdir())
    uploads = [Upload.load(f) for f in folders]
    counted = sum(u.bytes for u in uploads)
    if first["settings"]["ensemble"]["mode"] != "class":
        counted = sum(u.without_counts().bytes for u in uploads)
    assert len(uploads) == 2 and first["upload_bytes"] == counted
    assert sum(u.size for u in uploads) == 1797 - 360 - 1258


def test_accuracies_are_those_of_the_models_on_the_test_split(first, store):
    settings = Settings.model_validate(first["settings"])
    these = Experiment(settings, store)
    test = these.task.test
    for name, method in [
        ("accuracy", "fedmitr"),
        ("ensemble_accuracy", "ensemble"),
        ("fedavg_accuracy", "fedavg"),
    ]:
        (model,) = these.outcome(method).models
        hits = sum(
            int(model(x[None]).argmax()) == int(y)
            for x, y in zip(test.images[:60], test.labels, strict=False)
        )
        few = accuracy(model, test.subset(torch.arange(60)))
        assert few == pytest.approx(hits / 60)
        assert first[name] == pytest.approx(accuracy(model, test))


def tensors(store):
    """Every file of tensors in a store, by its address."""
    return {f.relative_to(store): f.read_bytes() for f in store.rglob("*.safetensors")}


def test_the_same_command_from_another_fresh_store_gives_the_same_run(first, store, tmp_path):
    again = read_cli("run", "--method", "fedmitr", "--seed", 3, "--json", *SMALL_OPTIONS, "--store", tmp_path)
    for name in first.keys() - {"seconds"}:
        assert again[name] == first[name], name
    made, before = tensors(tmp_path), tensors(store)
    stages = {"uploads", "synthetic", "global", "references"}
    assert {path.parts[0] for path in made} == stages and len(made) == 6
    assert all(before[path] == content for path, content in made.items())


def test_the_same_command_in_another_process_gives_the_same_run(first, tmp_path):
    words = ["run", "--method", "fedmitr", "--seed", "3", "--json", *SMALL_OPTIONS, "--store", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-m", "fedmitr.cli", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout.splitlines()[-1])
    assert again["accuracy"] == first["accuracy"] and again["run_id"] == first["run_id"]


def test_another_seed_trains_other_clients(first, store, tmp_path):
    other = read_cli("run", "--method", "fedavg", "--seed", 4, "--json", *SMALL_OPTIONS, "--store", tmp_path)
    assert other["run_id"] != first["run_id"] and other["seed"] == 4
    assert not set(tensors(tmp_path).values()) & set(tensors(store).values())


def test_a_second_run_from_the_same_store_repeats_no_stage(first, store, no_work):
    again = read_cli("run", "--method", "fedmitr", "--seed", 3, "--json", *SMALL_OPTIONS, "--store", store)
    assert again == first


def test_other_methods_share_the_clients(first, store, no_work):
    for method in ("fedavg", "local"):
        result = read_cli("run", "--method", method, "--seed", 3, "--json", *SMALL_OPTIONS, "--store", store)
        assert result["method"] == method and set(result["seconds"]) == {"clients"}
        assert result["upload_bytes"] == (first["upload_bytes"] if method == "fedavg" else 0)
        assert result["ensemble_accuracy"] == first["ensemble_accuracy"]
    assert result["accuracy"] == pytest.approx(sum(result["local_accuracies"]) / 2)


def test_other_distillation_settings_reuse_clients_and_images(first, store, forbid):
    forbid(clients, "train_client")
    forbid(pipeline, "invert")
    words = ["run", "--method", "fedmitr", "--seed", 3, "--json", *SMALL_OPTIONS, "--set", "distill.steps=3"]
    other = read_cli(*words, "--store", store)
    assert other["run_id"] != first["run_id"]
    assert other["seconds"]["inversion"] == first["seconds"]["inversion"]


def test_the_central_model_is_one_client_that_holds_everything(store):
    result = read_cli("run", "--method", "central", "--seed", 3, "--json", *SMALL_OPTIONS, "--store", store)
    assert set(result["seconds"]) == {"central"}
    sizes = [Upload.load(f).size for f in (store / "uploads").iterdir()]
    assert max(sizes) == 1797 - 360 - 1258 and len(sizes) == 3


def test_without_json_a_run_is_told_in_words(first, store, no_work):
    done = call_cli("run", "--method", "fedmitr", "--seed", 3, *SMALL_OPTIONS, "--store", store)
    assert done.exit_code == 0 and f"{first['accuracy']:.3f}" in done.stdout
    assert f"{first['fedavg_accuracy']:.3f}" in done.stdout


@pytest.mark.parametrize("profile", ["laptop", "gpu", "paper"])
def test_a_dry_run_tells_the_plan_and_does_nothing(profile, tmp_path, no_work):
    words = ["run", "--method", "fedmitr", "--profile", profile, "--task", "digits", "--dry-run"]
    done = call_cli(*words, "--store", tmp_path / "store")
    assert done.exit_code == 0, done.output
    assert all(stage in done.stdout for stage in ("clients", "inversion", "labels", "student", "all"))
    told = json.loads(call_cli(*words, "--json").stdout.splitlines()[-1])
    assert [row["stage"] for row in told] == ["clients", "inversion", "labels", "student"]
    assert not (tmp_path / "store").exists()


def test_a_dry_run_plans_a_method_of_your_own(tmp_path, no_work):
    words = ["run", "--method", "ripples", "--dry-run", *SMALL_OPTIONS, "--store", tmp_path / "store"]
    with registrations_taken_back():
        register(Method("ripples", METHODS["dense"].run, label="Ripples"))
        assert [row["stage"] for row in read_cli(*words, "--json")] == ["clients", "labels", "student"]
        told = call_cli(*words)
    assert told.exit_code == 0 and "student" in told.stdout
    assert call_cli(*words).exit_code == 2  # nobody knows it any more
    assert not (tmp_path / "store").exists()
