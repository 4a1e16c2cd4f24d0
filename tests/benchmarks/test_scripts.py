"""Every script in benchmarks/ runs at toy size, with the options that docs/performance.md gives."""

import importlib.util
import re
from functools import partial
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from fedmitr.core.paths import home
from fedmitr.vision import attention

FOLDER = home() / "benchmarks"
TOY = ["--image-size", "12", "--rounds", "1"]
NUMBER = r"\d+\.\d+"


def load(name: str) -> ModuleType:
    """A script as a module that has no place in sys.modules: workers get its functions by value."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, *words: object) -> str:
    """What a script prints with these options; threads and attention are left as they were."""
    threads, short = torch.get_num_threads(), attention.SHORT
    done = CliRunner().invoke(module.main, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    torch.set_num_threads(threads)
    assert short == attention.SHORT
    return done.stdout


def rows(text: str) -> list[str]:
    """The first words of the rows of `variants`' tables."""
    return [line.split("  ")[1].strip() for line in text.splitlines() if re.search(rf"{NUMBER} ms", line)]


def test_every_script_has_a_test_here():
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == {"plain_loop", "time_to_quality", "variants", "where"}


def test_time_to_quality_measures_every_seed_and_their_mean(tmp_path):
    small = ["client.epochs=1", "partition.clients=2", "inversion.images=6", "inversion.batch_size=4"]
    small += ["inversion.iterations=6", "inversion.stop_at=[1,2,3,4]", "task.limit=8"]
    options = [word for one in small for word in ("--set", one)]
    told = run(load("time_to_quality"), "--seeds", "5,6", "--store", tmp_path, *options).splitlines()
    assert told[0].split() == ["seconds", "per", "image", "teacher", "survivors", "whole", "views"]
    table = {line.split()[0]: list(map(float, line.split()[1:])) for line in told[1:]}
    assert list(table) == ["5", "6", "mean"]
    for seconds, *confidence in table.values():
        assert seconds >= 0 and len(confidence) == 4 and all(0 <= value <= 1 for value in confidence)


def test_time_to_quality_uses_the_classes_that_clients_hold(tmp_path, monkeypatch):
    """With one client of few classes no image is made of the others."""
    script, labels = load("time_to_quality"), []
    monkeypatch.setattr(script.fm, "invert", lambda _, wanted, *__, **___: labels.append(wanted))
    monkeypatch.setattr(script, "held_classes", lambda uploads: torch.tensor([2, 7]))
    monkeypatch.setattr(script.fm.SyntheticSet, "concat", lambda parts: labels)
    monkeypatch.setattr(script, "confidence", lambda *_: {})
    settings = script.fm.Settings.load(
        "smoke", {"client.epochs": 1, "partition.clients": 2, "task.limit": 8, "inversion.images": 6}
    )
    script.measure(settings, tmp_path)
    assert set(torch.cat(labels).tolist()) == {2, 7} and len(torch.cat(labels)) == 6


def test_where_shares_add_up_to_a_hundred_per_cent():
    told = run(load("where"), "--model", "vit_micro", "--batch", 2, "--iterations", 6, "--threads", 1)
    lines = [line.split() for line in told.splitlines()]
    assert lines[0] == ["dense", "sparse"]
    for column in (-2, -1):
        assert sum(float(line[column]) for line in lines[1:]) == pytest.approx(100, abs=1)
    assert {"linear", "attention", "GELU", "copies", "norms"} <= {line[0] for line in lines[1:]}


def test_where_takes_half_precision_and_several_clients():
    options = ["--model", "vit_micro", "--batch", 1, "--iterations", 5, "--threads", 1]
    assert "linear layers" in run(load("where"), *options, "--clients", 2, "--precision", "bf16")


def test_variants_of_a_gradient_step_are_one_and_several_teachers():
    told = run(load("variants"), "steps", *TOY, "--threads", 1, "--batch", 2, "--clients", 2, "--patches", 5)
    assert "one teacher: vit_micro, 5 patches, batch 2, 1 threads" in told and "2 teachers:" in told
    assert len(rows(told)) == 8 and rows(told)[0] == "timm's blocks whole, fp32"


def test_stacked_teachers_have_the_logits_of_one_after_another():
    script = load("variants")
    vits = [upload.vit() for upload in script.random_uploads("vit_micro", 12, 2)]
    patches, positions = script.random_patches(vits[0], 2)
    with script.short(0):  # our own attention does not vmap
        one, other = (f(vits, positions)(patches) for f in (script.stacked, script.one_by_one))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_variants_of_a_training_step():
    told = run(load("variants"), "student", *TOY, "--threads", 1, "--batch", 2)
    assert rows(told) == ["timm's forward, fp32", "ours, fp32", "timm's forward, bf16", "ours, bf16"]


def test_variants_through_torch_compile(monkeypatch):
    """Without a compiler's minutes: torch.compile traces, and runs what it traced as it is."""
    script = load("variants")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    told = run(script, "compiling", *TOY, "--threads", 1, "--batch", 2)
    assert "compiling took" in told and rows(told) == ["as it is", "through torch.compile"]


def test_variants_of_a_batch_in_chunks():
    told = run(load("variants"), "batches", *TOY, "--threads", 1, "--batch", 6, "--iterations", 5)
    assert rows(told) == ["chunks of 6", "chunks of 5"]


def test_variants_of_processes():
    told = run(load("variants"), "processes", *TOY, "--batch", 2, "--iterations", 5, "--each", 1)
    assert rows(told) == ["one process of two threads", "two processes of one thread"]


def test_without_a_command_all_variants_are_measured(monkeypatch):
    script, called = load("variants"), []
    names = ["steps", "student", "compiling", "batches", "processes"]
    for name in names:
        monkeypatch.setattr(getattr(script, name), "callback", lambda name=name, **_: called.append(name))
    run(script)
    assert called == names
