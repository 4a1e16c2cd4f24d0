"""Importing: torchvision beside any torch, and what the server's side can reach."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fedmitr

PACKAGE = Path(fedmitr.__file__).parent
FORBIDDEN = {"photos", "tasks", "partition", "client"}
SERVER = ["upload", "ensemble", "attention", "pixels", "inversion", "relabel", "distill", "fuse"]
SERVER += sorted(f"methods.{p.stem}" for p in (PACKAGE / "methods").glob("*.py") if p.stem != "__init__")
SERVER += ["methods.__init__"]


def test_timm_and_torchvision_import_beside_fedmitr():
    code = "import fedmitr, timm, torchvision.transforms, torchvision.datasets; print(fedmitr.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == fedmitr.__version__


@pytest.mark.parametrize("operators_load", [True, False])
def test_only_a_torchvision_whose_operators_do_not_load_is_patched(operators_load, monkeypatch, tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_C.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    stub = "torchvision._meta_registrations"
    for name in ("torchvision", stub):
        monkeypatch.delitem(sys.modules, name, raising=False)
    asked = []

    def load(path):
        asked.append(Path(path))
        if not operators_load:
            raise OSError("undefined symbol")

    monkeypatch.setattr(torch.ops, "load_library", load)
    fedmitr._let_torchvision_import()
    assert asked == [package / "_C.so"]
    assert (stub in sys.modules) == (not operators_load)
    sys.modules.pop(stub, None)


def test_a_torchvision_that_is_already_imported_is_left_alone(monkeypatch):
    assert importlib.import_module("torchvision")

    def load(path):
        raise AssertionError("loaded twice")

    monkeypatch.setattr(torch.ops, "load_library", load)
    fedmitr._let_torchvision_import()


# The server's rooms import nothing that knows the data.


def imports(package: Path, module: str, but: tuple[str, ...] = ()) -> set[str]:
    """Modules of the package, as dotted names below it, that a module's source imports anywhere.

    but: functions and classes of the module that are left out of the walk.
    """
    base = [package.name, *module.split(".")[:-1]]
    found: set[str] = set()
    tree = ast.parse((package / f"{module.replace('.', '/')}.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) not in but]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*above, node.module] if node.module else above)
            names = [source, *(f"{source}.{a.name}" for a in node.names)]
        else:
            continue
        for name in names:
            if name.startswith(f"{package.name}."):
                found.add(name.removeprefix(f"{package.name}."))
    return {as_file(package, n) for n in found} - {None}


def as_file(package: Path, name: str) -> str | None:
    """The module that a dotted name means: a file, a package's __init__, or nothing (a function)."""
    if (package / f"{name.replace('.', '/')}.py").is_file():
        return name
    return f"{name}.__init__" if (package / name.replace(".", "/") / "__init__.py").is_file() else None


def reachable(package: Path, module: str, but: tuple[str, ...] = ()) -> set[str]:
    """Everything a module imports, itself (but for some functions) or through modules of the package."""
    seen = imports(package, module, but)
    todo = list(seen)
    while todo:
        for name in imports(package, todo.pop()) - seen:
            seen.add(name)
            todo.append(name)
    return seen


@pytest.mark.parametrize("module", SERVER)
def test_server_cannot_see_data(module):
    assert not reachable(PACKAGE, module) & FORBIDDEN


def test_only_the_client_of_the_flower_app_can_see_data():
    assert not reachable(PACKAGE, "flower_app", but=("local_upload",)) & FORBIDDEN
    assert reachable(PACKAGE, "flower_app") >= FORBIDDEN


def test_the_walk_sees_what_the_experiment_imports():
    assert reachable(PACKAGE, "experiment") >= {*FORBIDDEN, "inversion", "methods.fedmitr", "vit"}


@pytest.mark.parametrize(
    "line",
    [
        "from .tasks import load_task",
        "from . import tasks",
        "import fed.tasks",
        "from fed import tasks as t",
        "from .methods import peek",
        "from .methods.peek import look",
        "from .between import load_task",
        "def f():\n    from fed.between import load_task",
    ],
)
def test_the_walk_catches_every_way_to_the_data(line, tmp_path):
    package = tmp_path / "fed"
    (package / "methods").mkdir(parents=True)
    files = {
        "tasks": "x = 1",
        "between": "from .tasks import load_task",
        "methods/__init__": "",
        "methods/peek": "from ..tasks import load_task",
        "bad": line,
        "good": "import torch\nfrom .vit import create_vit",
        "vit": "import timm",
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    assert "tasks" in reachable(package, "bad")
    assert reachable(package, "good") == {"vit"}
