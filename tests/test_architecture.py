"""The layout: torchvision beside any torch, the server's reach, one direction of imports, file sizes."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fedmitr

PACKAGE = Path(fedmitr.__file__).parent
ROOT = PACKAGE.parent
# A module imports from its own folder and from those above it in this list, never from those below.
ORDER = [
    {"core"},
    {"settings"},
    {"vision"},
    {"upload"},
    {"data", "server"},  # neither knows the other
    {"client"},
    {"methods"},
    {"evaluation"},
    {"experiments"},
    {"study", "privacy"},  # neither knows the other
    {"figures"},
    {"flower_message"},
    {"cli", "flower_app"},
    {"__init__"},
]
RANK = {folder: rank for rank, folders in enumerate(ORDER) for folder in folders}
BLIND = ("upload.", "server.", "methods.", "vision.", "settings.", "core.")  # what sees no data
DATA = ("data.", "client.")
MOST_LINES = 350


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


# One direction: the graph of imports, read from the sources.


def module_names(package: Path) -> list[str]:
    """All modules of a package as dotted names below it, `folder.__init__` for a folder's own."""
    return sorted(".".join(p.relative_to(package).with_suffix("").parts) for p in package.rglob("*.py"))


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
            # a module named by `from . import module` counts, its folder's own file only for other names
            inside = [f"{source}.{a.name}" for a in node.names]
            modules = [n for n in inside if as_file(package, n.removeprefix(f"{package.name}."))]
            names = modules + ([source] if len(modules) < len(inside) else [])
        else:
            continue
        for name in names:
            if name == package.name:
                found.add("__init__")  # the public names: everything
            if name.startswith(f"{package.name}."):
                found.add(name.removeprefix(f"{package.name}."))
    return {as_file(package, n) for n in found} - {None}


def as_file(package: Path, name: str) -> str | None:
    """The module that a dotted name means: a file, a folder's __init__, or nothing (a function)."""
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


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a loop."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:  # Warshall's closure
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    looped = [name for name in graph if name in reach[name]]
    groups = {
        frozenset(other for other in looped if name in reach[other] and other in reach[name])
        for name in looped
    }
    return sorted(sorted(group) for group in groups)


def data_seen(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(DATA)}


@pytest.mark.parametrize("module", [m for m in module_names(PACKAGE) if m.startswith(BLIND)])
def test_the_server_cannot_see_data(module):
    assert not data_seen(reachable(PACKAGE, module))


DYNAMIC = re.compile(r"import_module|__import__|importlib|exec\(|(?<![.])eval\(")


@pytest.mark.parametrize("module", [m for m in module_names(PACKAGE) if m.startswith(BLIND)])
def test_nothing_is_imported_by_name_where_no_data_is_seen(module):
    source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text()
    by_name = {"methods.__init__": {"importlib", "import_module"}, "core.processes": {"__import__"}}
    assert set(DYNAMIC.findall(source)) - {"importlib"} <= by_name.get(module, set())


def test_only_the_client_of_the_flower_app_can_see_data():
    assert not data_seen(reachable(PACKAGE, "flower_app", but=("local_upload",)))
    assert data_seen(reachable(PACKAGE, "flower_app")) >= {"data.tasks", "client.train"}


def test_the_walk_sees_what_a_run_imports():
    assert reachable(PACKAGE, "experiments.run") >= {
        *("data.tasks", "data.partition", "client.train", "client.fusefl"),
        *("server.ensemble", "vision.vit", "upload.message"),
    }


def test_every_folder_has_its_place():
    assert {name.split(".")[0] for name in module_names(PACKAGE)} == set(RANK)


@pytest.mark.parametrize("module", module_names(PACKAGE))
def test_no_import_runs_back_up(module):
    folder = module.split(".")[0]
    for name in imports(PACKAGE, module):
        other = name.split(".")[0]
        assert other == folder or RANK[other] < RANK[folder], f"{module} imports {name}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imports(PACKAGE, name) for name in module_names(PACKAGE)}
    assert circles(graph) == []


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}, "f": {"g"}, "g": {"f"}}
    assert circles(graph) == [["a", "b", "c"], ["f", "g"]]


@pytest.mark.parametrize(
    "line",
    [
        "from .data.tasks import load_task",
        "from .data import tasks",
        "import fed.data.tasks",
        "from fed.data import tasks as t",
        "from .methods import peek",
        "from .methods.peek import look",
        "from .between import load_task",
        "from . import load_task",
        "import fed",
        "def f():\n    from fed.between import load_task",
    ],
)
def test_the_walk_catches_every_way_to_the_data(line, tmp_path):
    package = tmp_path / "fed"
    for folder in ("methods", "data"):
        (package / folder).mkdir(parents=True)
    files = {
        "data/__init__": "",
        "__init__": "from .data.tasks import load_task",
        "data/tasks": "x = 1",
        "between": "from .data.tasks import load_task",
        "methods/__init__": "",
        "methods/peek": "from ..data.tasks import load_task",
        "bad": line,
        "good": "import torch\nfrom .vit import create_vit",
        "vit": "import timm",
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    assert data_seen(reachable(package, "bad")) >= {"data.tasks"}
    assert reachable(package, "good") == {"vit"}


# Sizes, and tests that mirror the folders.


def sources() -> list[Path]:
    folders = ("fedmitr", "tests", "benchmarks", "tools")
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def test_no_file_is_long():
    lines = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in sources()}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}


def test_no_folder_is_crowded():
    for folder in PACKAGE.iterdir():
        if folder.is_dir() and folder.name not in ("methods", "shipped", "__pycache__"):
            assert len([p for p in folder.glob("*.py") if p.stem != "__init__"]) <= 12, folder.name


def test_tests_lie_in_the_folders_of_what_they_test():
    tested = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.glob("test_*.py"))}
    packages = {name.split(".")[0] for name in module_names(PACKAGE) if "." in name}
    assert packages <= tested
