"""Adding a method: with `register` in a notebook, or as a file and one line in the package."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import with_statistics
from tiny_runs import small

import fedmitr as fm
from fedmitr.core import processes
from fedmitr.core.store import Store
from fedmitr.evaluation.plan import plan
from fedmitr.methods import (
    METHODS,
    SHIPPED,
    Method,
    Outcome,
    Student,
    check_methods,
    described,
    find,
    in_order,
    register,
)
from fedmitr.methods._student import StudentSettings
from fedmitr.server.views import random_textures
from fedmitr.settings import Settings, SettingsBlock, setting
from fedmitr.settings.schema import Share

ROOT = Path(fm.__file__).parents[1]


class RipplesSettings(SettingsBlock):
    """Ripples: how strong they are."""

    contrast: Share = setting(1.0, "contrast of the ripples")


def ripples(uploads, settings, store):
    """Distil the ensemble on random ripples."""
    count, steps, shape = settings.inversion.images, settings.distill.steps, uploads[0].shape
    student = Student(uploads, settings, "ripples", steps)
    like = torch.empty(count, shape.in_chans, shape.image_size, shape.image_size)
    images = random_textures(student.vit, like, torch.Generator().manual_seed(settings.seed))
    student.add(images, student.ensemble(images).argmax(1))
    student.learn(steps, student.by_ensemble)
    return Outcome([student.vit], {}, student.images, steps)


RIPPLES = Method("ripples", ripples, label="Ripples")
WITH_BLOCK = dataclasses.replace(RIPPLES, settings=RipplesSettings)


def test_a_registered_method_is_found_checked_described_and_run(registrations, clients, tmp_path):
    register(RIPPLES)
    assert find("ripples") is described("ripples") is METHODS["ripples"] is RIPPLES
    check_methods(["fedavg", "ripples"], small())
    assert [stage.stage for stage in plan("ripples", small())] == ["clients", "labels", "student"]
    outcome = find("ripples")(clients, small(), Store(tmp_path))
    work = RIPPLES.work_under(small())
    assert (len(outcome.synthetic), outcome.student_steps) == (work.images, work.student_steps) == (6, 3)
    with pytest.raises(fm.BadInput, match="unknown"):
        Settings.load("smoke", {"ripples.contrast": 0.5})  # it has no settings of its own


def test_its_block_is_part_of_every_run(registrations, one_line):
    before = Settings()
    register(WITH_BLOCK)
    settings = Settings.load("smoke", {"ripples.contrast": 0.5})
    assert settings.ripples.contrast == 0.5 and settings.model_dump()["ripples"] == {"contrast": 0.5}
    assert Settings().ripples.contrast == before.ripples.contrast == 1.0
    with pytest.raises(fm.BadInput) as error:
        Settings.load("smoke", {"ripples.contrast": 2})
    one_line(error.value, "ripples.contrast=2")


def test_what_is_registered_is_taken_back(registrations):
    """What the fixture itself does: the tests before this one leave nothing."""
    assert tuple(METHODS) == SHIPPED and "ripples" not in Settings.model_fields
    with pytest.raises(fm.BadInput, match="unknown"):
        Settings.load("smoke", {"ripples.contrast": 0.5})


def test_registering_again_replaces_the_record_and_its_block(registrations):
    class Other(StudentSettings):
        """Ripples: the student's settings alone."""

    register(WITH_BLOCK)
    register(dataclasses.replace(WITH_BLOCK, label="Other", settings=Other))
    assert described("ripples").label == "Other" and list(METHODS).count("ripples") == 1
    assert type(Settings().ripples) is Other
    assert Settings.load("smoke", {"ripples.ce_weight": 0.5}).ripples.ce_weight == 0.5
    with pytest.raises(fm.BadInput, match="unknown"):
        Settings.load("smoke", {"ripples.contrast": 0.5})


class AskingSettings(SettingsBlock):
    """Asking: whether clients send sums of features."""

    sums: bool = setting(False, "clients send sums of features")


def test_what_clients_send_may_depend_on_a_setting_of_its_own(registrations, clients, tmp_path, one_line):
    register(Method("asking", ripples, settings=AskingSettings, needs_statistics="asking.sums"))
    record, asked = find("asking"), small({"asking.sums": True})
    assert record.sent_under(small()) == ["weights"]
    assert record.sent_under(asked) == ["weights", "statistics"]
    assert record(clients, small(), Store(tmp_path)).models
    with pytest.raises(fm.BadInput) as error:
        record(clients, asked, Store(tmp_path))
    one_line(error.value, "client 0", "has no statistics")
    assert record([with_statistics(u) for u in clients], asked, Store(tmp_path)).models


def test_workers_are_told_of_it(registrations):
    register(RIPPLES)
    add, told = processes._IN_WORKERS[-1]
    METHODS.pop("ripples")
    add(*told)
    assert find("ripples") is RIPPLES


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(name="my ripples"), ("'my ripples'", "letters")),
        (dict(name="2d"), ("'2d'", "letters")),
        (dict(name="_ripples"), ("'_ripples'", "letter first")),
        (dict(name=""), ("''", "letters")),
        (dict(name="distill", settings=RipplesSettings), ("'distill'", "choose another")),
        (dict(name="seed", settings=RipplesSettings), ("'seed'", "choose another")),
        (dict(name="changed", settings=RipplesSettings), ("'changed'", "choose another")),
        (dict(family="magic"), ("'magic'", "'ripples'", "statistics")),
    ],
    ids=str,
)
def test_a_record_that_cannot_be_used_is_one_line_and_changes_nothing(
    options, words, registrations, one_line
):
    told, fields = list(processes._IN_WORKERS), set(Settings.model_fields)
    with pytest.raises(fm.BadInput) as error:
        register(dataclasses.replace(RIPPLES, name="fine"), dataclasses.replace(RIPPLES, **options))
    one_line(error.value, *words)
    assert tuple(METHODS) == SHIPPED and set(Settings.model_fields) == fields
    assert told == processes._IN_WORKERS


def test_an_unknown_method_is_one_line(one_line):
    for refuse in (
        find,
        lambda name: check_methods([name], small()),
        lambda name: described(name)([], small(), 0),
    ):
        with pytest.raises(fm.BadInput) as error:
            refuse("nobody")
        one_line(error.value, "'nobody'", *SHIPPED)


def test_a_name_from_elsewhere_is_described_by_defaults():
    record = described("my-ripples")
    assert record.label == "my-ripples" and record.single_model and not record.is_reference


def test_tables_go_family_by_family_each_in_the_order_of_registration(registrations):
    register(RIPPLES, Method("median", ripples, family="average"))
    wanted = ["fedavg", "median", "fedmitr", "fdafl", "fadi", "dense", "co_boosting", "fedftg", "ripples"]
    wanted += ["elsewhere", "fusefl", "ensemble", "local", "central"]
    assert in_order(reversed(wanted)) == wanted
    assert in_order(["local", "fedmitr", "local"]) == ["fedmitr", "local"]


# A method that ships: its own file, and its name in `SHIPPED`.

UNIFORM = '''
"""The uniform average: every client counts alike, whatever it holds."""

from ..core.machine import device
from ..settings import SettingsBlock, setting
from ..settings.schema import Positive
from ._method import Method, Outcome, Range


class UniformSettings(SettingsBlock):
    """Uniform: how the average is scaled."""

    scale: Positive = setting(1.0, "factor of the averaged weights")


def uniform(uploads, settings, store):
    """Average the uploads, each with the same weight."""
    vit = uploads[0].shape.build()
    names, scale = vit.state_dict(), settings.uniform.scale / len(uploads)
    vit.load_state_dict({n: scale * sum(u.weights[n] for u in uploads) for n in names})
    return Outcome([vit.eval().to(device())])


METHOD = Method(
    name="uniform",
    run=uniform,
    label="Uniform",
    family="average",
    citation="a test",
    settings=UniformSettings,
    search={"uniform.scale": Range(0.9, 1.1)},
    averages=True,
)
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package with one more method: a file, and a name in `SHIPPED`."""
    root = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "fedmitr", root / "fedmitr", ignore=shutil.ignore_patterns("__pycache__"))
    if not (root / "fedmitr" / "shipped").exists():  # as the wheel has them
        for name in ("data", "notebooks"):
            (root / name).symlink_to(ROOT / name)
    (root / "fedmitr" / "methods" / "uniform.py").write_text(UNIFORM.lstrip())
    table = root / "fedmitr" / "methods" / "__init__.py"
    lines = table.read_text()
    assert lines.count('    "fedavg",\n') == 1
    table.write_text(lines.replace('    "fedavg",\n', '    "fedavg",\n    "uniform",\n'))
    return root


def fedmitr(package: Path, *words: str) -> str:
    """What the command line of that copy prints."""
    environment = os.environ | {"PYTHONPATH": str(package), "FEDMITR_STORE": str(package / "store")}
    command = [sys.executable, "-m", "fedmitr.cli", *words]
    done = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


RUN = ["run", "--method", "uniform", "--profile", "smoke", "--clients", "2", "--alpha", "1", "--json"]
QUICK = ("client.epochs=1", "uniform.scale=0.9")


def test_a_shipped_method_is_a_file_and_a_line(package):
    sets = [word for name in QUICK for word in ("--set", name)]
    out = json.loads(fedmitr(package, *RUN, *sets).splitlines()[-1])
    assert out["method"] == "uniform" and out["exchanges"] == 1 and out["synthetic_images"] == 0
    assert 0.1 < out["accuracy"] < 1 and out["settings"]["uniform"] == {"scale": 0.9}


def test_its_plan_is_there_too(package):
    stages = json.loads(fedmitr(package, *RUN, "--dry-run"))
    assert [stage["stage"] for stage in stages] == ["clients"] and stages[0]["bytes"] > 0


class Plain(SettingsBlock):
    """A block written as plain pydantic, without `setting`."""

    width: int = 3


class NoDefault(SettingsBlock):
    width: int


class BadDefault(SettingsBlock):
    share: Share = setting(-1.0, "no share")


def test_a_block_of_plain_pydantic_is_settable_and_listed(registrations):
    register(Method("plain", run=lambda *_: None, settings=Plain))
    assert Settings.load("smoke", {"plain.width": 5}).plain.width == 5
    assert {"plain.width"} <= {row["setting"] for row in fm.settings.fields()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": NoDefault}, "wrong.width"),
        ({"settings": BadDefault}, "wrong.share"),
        ({"settings": Plain()}, "SettingsBlock"),
        ({"run": None}, "no function"),
        ({"given": "nothing"}, "given='nothing'"),
        ({"exchanges": "nonsense"}, "exchanges='nonsense'"),
        ({"exchanges": "distill.nonsense"}, "exchanges='distill.nonsense'"),
        ({"exchanges": "wrong.width"}, "exchanges='wrong.width'"),
        ({"needs_statistics": "fedmitr_plus.nonsense"}, "needs_statistics='fedmitr_plus.nonsense'"),
    ],
)
def test_a_wrong_record_is_one_line_and_leaves_nothing(registrations, one_line, change, said):
    record = dataclasses.replace(Method("wrong", run=lambda *_: None), **change)
    with pytest.raises(fm.BadInput) as caught:
        register(record)
    one_line(caught.value, said)
    assert "wrong" not in METHODS and "wrong" not in Settings.model_fields
