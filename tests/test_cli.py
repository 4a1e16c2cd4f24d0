"""cli.py and experiment.py: the command line from end to end, on clients of a few images."""

import importlib
import json
import os
import subprocess
import sys
from itertools import product

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import fedmitr.experiments.run as experiment
from fedmitr.cli import main, parse_seeds
from fedmitr.core.errors import BadInput
from fedmitr.evaluation.metrics import accuracy
from fedmitr.methods import METHODS
from fedmitr.settings import PROFILES, Settings, fields, parse_assignment
from fedmitr.upload import Upload

pipeline = importlib.import_module("fedmitr.methods.fedmitr")  # the package's name for it is the method

SMALL = {
    "task.test": 0.2,
    "task.validation": 0.7,
    "model.pretrained": "false",
    "client.epochs": 1,
    "inversion.images": 4,
    "inversion.batch_size": 2,
    "inversion.iterations": 3,
    "inversion.stop_at": [1],
    "inversion.stop_ratio": [0.3],
    "distill.steps": 2,
    "distill.batch_size": 4,
}
TINY = ["--profile", "smoke", "--clients", "2", "--alpha", "1.0"]
TINY += [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]


def fedmitr(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


def answer(*words):
    """The JSON object in the last line of stdout."""
    done = fedmitr(*words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def first(store):
    """One run of FedMITR, in a fresh store."""
    return answer("run", "--method", "fedmitr", "--seed", 3, "--json", *TINY, "--store", store)


# One run.


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
    words = TINY[TINY.index("--set") :]
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
    these = experiment.Experiment(settings, store)
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
    again = answer("run", "--method", "fedmitr", "--seed", 3, "--json", *TINY, "--store", tmp_path)
    for name in first.keys() - {"seconds"}:
        assert again[name] == first[name], name
    made, before = tensors(tmp_path), tensors(store)
    stages = {"uploads", "synthetic", "global", "references"}
    assert {path.parts[0] for path in made} == stages and len(made) == 6
    assert all(before[path] == content for path, content in made.items())


def test_the_same_command_in_another_process_gives_the_same_run(first, tmp_path):
    words = ["run", "--method", "fedmitr", "--seed", "3", "--json", *TINY, "--store", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-m", "fedmitr.cli", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout.splitlines()[-1])
    assert again["accuracy"] == first["accuracy"] and again["run_id"] == first["run_id"]


def test_another_seed_trains_other_clients(first, store, tmp_path):
    other = answer("run", "--method", "fedavg", "--seed", 4, "--json", *TINY, "--store", tmp_path)
    assert other["run_id"] != first["run_id"] and other["seed"] == 4
    assert not set(tensors(tmp_path).values()) & set(tensors(store).values())


@pytest.fixture
def no_work(forbid):
    """Every stage fails if it is run."""
    forbid(experiment, "train_client")
    forbid(pipeline, "invert", "distill")


def test_a_second_run_from_the_same_store_repeats_no_stage(first, store, no_work):
    again = answer("run", "--method", "fedmitr", "--seed", 3, "--json", *TINY, "--store", store)
    assert again == first


def test_other_methods_share_the_clients(first, store, no_work):
    for method in ("fedavg", "local"):
        result = answer("run", "--method", method, "--seed", 3, "--json", *TINY, "--store", store)
        assert result["method"] == method and set(result["seconds"]) == {"clients"}
        assert result["upload_bytes"] == (first["upload_bytes"] if method == "fedavg" else 0)
        assert result["ensemble_accuracy"] == first["ensemble_accuracy"]
    assert result["accuracy"] == pytest.approx(sum(result["local_accuracies"]) / 2)


def test_other_distillation_settings_reuse_clients_and_images(first, store, forbid):
    forbid(experiment, "train_client")
    forbid(pipeline, "invert")
    words = ["run", "--method", "fedmitr", "--seed", 3, "--json", *TINY, "--set", "distill.steps=3"]
    other = answer(*words, "--store", store)
    assert other["run_id"] != first["run_id"]
    assert other["seconds"]["inversion"] == first["seconds"]["inversion"]


def test_the_central_model_is_one_client_that_holds_everything(store):
    result = answer("run", "--method", "central", "--seed", 3, "--json", *TINY, "--store", store)
    assert set(result["seconds"]) == {"central"}
    sizes = [Upload.load(f).size for f in (store / "uploads").iterdir()]
    assert max(sizes) == 1797 - 360 - 1258 and len(sizes) == 3


def settings_of(first, **changes):
    """The run's settings with some changed, by dotted name with __ for the dot."""
    tree = json.loads(json.dumps(first["settings"]))
    for name, value in changes.items():
        *blocks, leaf = name.split("__")
        node = tree
        for block in blocks:
            node = node[block]
        node[leaf] = value
    return Settings.model_validate(tree)


def test_the_class_histogram_leaves_a_client_only_where_ensemble_or_inversion_needs_it(first, store, no_work):
    for mode, teacher in product(("mean_probs", "size", "class"), ("ensemble", "owners")):
        changed = settings_of(first, ensemble__mode=mode, inversion__teacher=teacher)
        sent = [u.class_counts for u in experiment.Experiment(changed, store).uploads]
        assert all((counts is not None) == ("class" in mode or teacher == "owners") for counts in sent)


@pytest.mark.parametrize(
    "change, anew",
    [
        ({"client__lr": 0.5}, True),
        ({"partition__alpha": 0.5}, True),
        ({"task__clutter": 0.1}, True),
        ({"seed": 9}, True),
        ({"model__pretrained": True}, True),
        ({"inversion__lr": 0.1}, False),
        ({"distill__steps": 9}, False),
        ({"ensemble__mode": "size"}, False),
    ],
    ids=str,
)
def test_clients_are_trained_anew_where_their_settings_differ(first, store, change, anew):
    here, there = (experiment.Experiment(settings_of(first, **c), store) for c in ({}, change))
    assert (here.upload_key(0) != there.upload_key(0)) == anew
    assert here.upload_key(0) != here.upload_key(1)


def test_other_weights_in_the_checkpoints_file_are_another_run(first, store, uploads, tmp_path):
    keys = []
    for upload in uploads[:2]:
        upload.save(tmp_path)
        settings = settings_of(first, model__checkpoint=str(tmp_path / "weights.safetensors"))
        keys.append(experiment.Experiment(settings, store).upload_key(0))
        keys.append(pipeline.distill_key(uploads, settings))
    assert len(set(keys)) == 4


def test_without_json_a_run_is_told_in_words(first, store, no_work):
    done = fedmitr("run", "--method", "fedmitr", "--seed", 3, *TINY, "--store", store)
    assert done.exit_code == 0 and f"{first['accuracy']:.3f}" in done.stdout
    assert f"{first['fedavg_accuracy']:.3f}" in done.stdout


# Bad input: one line, status 2, no work.

BAD = [
    (["--method", "fedprox"], "method='fedprox'"),
    (["--profile", "huge"], "profile='huge'"),
    (["--task", "imagenet"], "task.name='imagenet'"),
    (["--alpha", "0"], "partition.alpha"),
    (["--alpha", "-1"], "partition.alpha"),
    (["--alpha", "nan"], "partition.alpha"),
    (["--alpha", "x"], "partition.alpha"),
    (["--clients", "0"], "partition.clients"),
    (["--clients", "900"], "partition.clients"),
    (["--clients", "2.5"], "partition.clients"),
    (["--seed", "first"], "seed"),
    (["--seed", "-1"], "seed"),
    (["--set", "distill.step=3"], "distill.step"),
    (["--set", "client.epochs=ten"], "client.epochs"),
    (["--set", "client.epochs"], "client.epochs"),
    (["--set", "inversion.stop_at=[1,"], "inversion.stop_at"),
    (["--set", "inversion.stop_at=[3]"], "inversion"),
    (["--set", "inversion.stop_ratio=[1.0]"], "inversion.stop_ratio"),
    (["--set", "model.name=resnet18"], "model.name"),
    (["--set", "model.name=no_such_model"], "model.name"),
    (["--set", "model.image_size=25"], "model.image_size=25"),
    (["--set", "model.checkpoint=nowhere.safetensors"], "model.checkpoint"),
    (["--set", "task.test=0.6"], "task.test"),
    (["--set", "budget=free"], "budget='free'"),
    (["--set", "threads=0"], "threads=0"),
    (["--set", "dense.rounds=0"], "dense.rounds=0"),
    (["--method", "fusefl", "--set", "fusefl.stages=5"], "fusefl.stages=5"),
    (["--jobs", "0"], "--jobs"),
    (["--jobs", "many"], "--jobs"),
    (["--set", "partition.scheme=shards", "--set", "partition.classes_per_client=3"], "classes_per_client"),
]


@pytest.mark.parametrize("words, name", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_bad_input_is_one_line_and_status_2_before_any_work(words, name, tmp_path, no_work):
    store = tmp_path / "store"
    command = ["run", "--method", "fedmitr", *TINY, "--store", str(store), *words]
    done = fedmitr(*command)
    assert done.exit_code == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and name in done.stderr
    assert not store.exists() or not [p for p in store.rglob("*") if p.is_file()]


def test_a_store_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = fedmitr("run", "--method", "fedavg", *TINY, "--store", tmp_path / "file" / "store")
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1 and "store=" in done.stderr


def test_bad_input_has_status_2_in_a_process_of_its_own(tmp_path):
    words = ["run", "--method", "fedmitr", "--alpha", "0", "--store", str(tmp_path / "store")]
    done = subprocess.run([sys.executable, "-m", "fedmitr.cli", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "partition.alpha" in done.stderr
    assert not (tmp_path / "store").exists()


# The other commands.


@pytest.mark.parametrize("profile", ["laptop", "gpu", "paper"])
def test_a_dry_run_tells_the_plan_and_does_nothing(profile, tmp_path, no_work):
    words = ["run", "--method", "fedmitr", "--profile", profile, "--task", "digits", "--dry-run"]
    done = fedmitr(*words, "--store", tmp_path / "store")
    assert done.exit_code == 0, done.output
    assert all(stage in done.stdout for stage in ("clients", "inversion", "labels", "student", "all"))
    told = json.loads(fedmitr(*words, "--json").stdout.splitlines()[-1])
    assert [row["stage"] for row in told] == ["clients", "inversion", "labels", "student"]
    assert not (tmp_path / "store").exists()


def test_compare_writes_one_row_per_run_and_the_summary(store, first, tmp_path, no_work):
    out = tmp_path / "runs.csv"
    words = ["compare", "--methods", "fedavg,local", "--seeds", "3", "--out", out, "--json", *TINY]
    table = answer(*words, "--store", store)
    rows = pd.read_csv(out)
    assert list(rows["method"]) == ["fedavg", "local"] and list(rows["seed"]) == [3, 3]
    assert list(rows["exchanges"]) == [1, 0] and list(rows["upload_bytes"]) == [first["upload_bytes"], 0]
    seconds = pd.read_csv(tmp_path / "runs_seconds.csv")
    assert list(seconds["client_seconds"]) == pytest.approx([first["seconds"]["clients"]] * 2)
    assert rows["accuracy"][0] == pytest.approx(first["fedavg_accuracy"], abs=1e-6)
    assert [row["method"] for row in table["summary"]] == ["fedavg", "local"]
    assert [row["accuracy"] for row in table["runs"]] == pytest.approx(list(rows["accuracy"]), abs=1e-6)


def test_compare_goes_over_several_skews(store, tmp_path):
    words = ["compare", "--methods", "fedavg,local", "--seeds", "3", "--json", *TINY, "--alpha", "0.1,0.3"]
    table = answer(*words, "--store", store)
    assert [(r["alpha"], r["method"]) for r in table["summary"]] == [
        (0.1, "fedavg"),
        (0.1, "local"),
        (0.3, "fedavg"),
        (0.3, "local"),
    ]
    assert [row["accuracy"] for row in table["runs"]] == [row["mean"] for row in table["summary"]]


def test_compare_goes_over_seeds_with_the_same_clients_for_every_method(store, first, tmp_path):
    out = tmp_path / "runs.csv"
    done = fedmitr(
        "compare", "--methods", "fedmitr,fedavg", "--seeds", "3-4", "--out", out, *TINY, "--store", store
    )
    assert done.exit_code == 0, done.output
    rows = pd.read_csv(out)
    assert list(zip(rows["seed"], rows["method"], strict=True)) == [
        (3, "fedmitr"),
        (3, "fedavg"),
        (4, "fedmitr"),
        (4, "fedavg"),
    ]
    assert rows["accuracy"][0] == pytest.approx(first["accuracy"], abs=1e-6)
    assert "fedmitr" in done.stdout and "fedavg" in done.stdout


@pytest.mark.parametrize("command", ["run", "compare", "reproduce"])
def test_jobs_say_how_many_processes_every_command_may_start(command, monkeypatch):
    monkeypatch.setenv("FEDMITR_JOBS", "1")
    rest = {"run": ["--method", "nobody"], "compare": ["--methods", "nobody"], "reproduce": ["--only", "99"]}
    assert fedmitr(command, "--jobs", 3, *rest[command]).exit_code == 2
    assert os.environ["FEDMITR_JOBS"] == "3"
    assert fedmitr(command, *rest[command]).exit_code == 2 and os.environ["FEDMITR_JOBS"] == "3"


@pytest.mark.parametrize("words", [["run", "--method", "dense"], ["compare", "--methods", "dense"]])
def test_a_bad_number_of_processes_in_the_environment_is_one_line(words, tmp_path, monkeypatch, no_work):
    monkeypatch.setenv("FEDMITR_JOBS", "all")
    done = fedmitr(*words, *TINY, "--store", tmp_path)
    assert done.exit_code == 2 and done.stdout == "" and "FEDMITR_JOBS='all'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    "text, seeds", [("0-4", [0, 1, 2, 3, 4]), ("1,3,5", [1, 3, 5]), ("7", [7]), ("0-1, 4", [0, 1, 4])]
)
def test_seeds_are_read(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-2-3", "1.5"])
def test_seeds_that_cannot_be_read_are_one_line(text, one_line):
    with pytest.raises(BadInput) as error:
        parse_seeds(text)
    one_line(error.value, f"seeds={text!r}")


@pytest.mark.parametrize(
    "words, name",
    [
        (["compare", "--methods", "fedavg,nobody"], "nobody"),
        (["compare", "--seeds", "x"], "seeds"),
        (["reproduce", "--only", "99"], "99"),
        (["reproduce", "--profile", "huge"], "huge"),
    ],
)
def test_bad_input_of_other_commands_is_one_line(words, name, tmp_path, no_work):
    done = fedmitr(*words, "--store", tmp_path / "store")
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1 and name in done.stderr
    assert not (tmp_path / "store").exists()


def test_info_says_what_is_installed():
    facts = answer("info", "--json")
    assert facts["torch"] == torch.__version__ or facts["torch"] == torch.__version__.split("+")[0]
    assert {"python", "timm", "device", "threads", "dask", "ray", "flwr"} <= set(facts)
    told = fedmitr("info")
    assert told.exit_code == 0 and facts["timm"] in told.stdout


def test_settings_lists_every_setting_with_meaning_and_source():
    listed = fedmitr("settings").stdout
    rows = [json.loads(line) for line in fedmitr("settings", "--json").stdout.splitlines()]
    assert [row["setting"] for row in rows] == [row["setting"] for row in fields()]
    for row in rows:
        assert f"{row['setting']} = " in listed and row["meaning"] in listed and row["source"] in listed


def test_help_names_methods_and_profiles():
    told = " ".join(fedmitr("run", "--help").stdout.split())
    assert all(word in told for word in (*METHODS, *PROFILES, "--set", "--json", "--store", "--jobs"))
    commands = fedmitr("--help").stdout
    assert all(word in commands for word in ("run", "compare", "reproduce", "info", "settings"))
    assert fedmitr("--version").stdout.strip().endswith("0.1.0")
