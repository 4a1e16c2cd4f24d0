"""cli.py: bad input of any command is one line on stderr and status 2, before any work."""

import os
import subprocess
import sys

import pytest
from helpers import SMALL_OPTIONS, call_cli

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
    (["--method", "ridge", "--set", "statistics.ridge=0"], "statistics.ridge=0"),
    (["--method", "ridge", "--set", "statistics.ridge=-1"], "statistics.ridge=-1"),
    (["--method", "ridge", "--set", "statistics.tokens=all"], "statistics.tokens='all'"),
    (["--method", "lda", "--set", "lda.shrinkage=0"], "lda.shrinkage=0"),
    (["--method", "lda", "--set", "lda.shrinkage=1.5"], "lda.shrinkage=1.5"),
    (["--set", "statistics.weight=-1"], "statistics.weight=-1"),
    (["--set", "fedmitr_plus.affine=2"], "fedmitr_plus.affine=2"),
    (["--method", "ridge", "--clients", "900"], "partition.clients"),
    (["--method", "ridge", "--model", "resnet18"], "model.name='resnet18'"),
    (["--method", "stacking", "--set", "model.checkpoint=nowhere.safetensors"], "model.checkpoint"),
    (["--jobs", "0"], "--jobs"),
    (["--jobs", "many"], "--jobs"),
    (["--set", "partition.scheme=shards", "--set", "partition.classes_per_client=3"], "classes_per_client"),
]


@pytest.mark.parametrize("words, name", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_bad_input_is_one_line_and_status_2_before_any_work(words, name, tmp_path, no_work):
    store = tmp_path / "store"
    command = ["run", "--method", "fedmitr", *SMALL_OPTIONS, "--store", str(store), *words]
    done = call_cli(*command)
    assert done.exit_code == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and name in done.stderr
    assert not store.exists() or not [p for p in store.rglob("*") if p.is_file()]


def test_a_store_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = call_cli("run", "--method", "fedavg", *SMALL_OPTIONS, "--store", tmp_path / "file" / "store")
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1 and "store=" in done.stderr


def test_bad_input_has_status_2_in_a_process_of_its_own(tmp_path):
    words = ["run", "--method", "fedmitr", "--alpha", "0", "--store", str(tmp_path / "store")]
    done = subprocess.run([sys.executable, "-m", "fedmitr.cli", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "partition.alpha" in done.stderr
    assert not (tmp_path / "store").exists()


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
    done = call_cli(*words, "--store", tmp_path / "store")
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1 and name in done.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", ["run", "compare", "reproduce"])
def test_jobs_say_how_many_processes_every_command_may_start(command, monkeypatch):
    monkeypatch.setenv("FEDMITR_JOBS", "1")
    rest = {"run": ["--method", "nobody"], "compare": ["--methods", "nobody"], "reproduce": ["--only", "99"]}
    assert call_cli(command, "--jobs", 3, *rest[command]).exit_code == 2
    assert os.environ["FEDMITR_JOBS"] == "3"
    assert call_cli(command, *rest[command]).exit_code == 2 and os.environ["FEDMITR_JOBS"] == "3"


@pytest.mark.parametrize("words", [["run", "--method", "dense"], ["compare", "--methods", "dense"]])
def test_a_bad_number_of_processes_in_the_environment_is_one_line(words, tmp_path, monkeypatch, no_work):
    monkeypatch.setenv("FEDMITR_JOBS", "all")
    done = call_cli(*words, *SMALL_OPTIONS, "--store", tmp_path)
    assert done.exit_code == 2 and done.stdout == "" and "FEDMITR_JOBS='all'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("command", [["compare", "--methods", "fedavg"], ["sweep", "--grid", "seed=0"]])
def test_an_output_that_is_a_folder_is_refused_before_any_work(command, tmp_path):
    done = call_cli(*command, *SMALL_OPTIONS, "--seeds", "0", "--out", str(tmp_path))
    assert done.exit_code == 2 and "is a folder" in done.output + done.stderr
    assert not list(tmp_path.iterdir())
