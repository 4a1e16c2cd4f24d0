"""What ships for Flower: the app's folder, the pins, and a package that does without it."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytest.importorskip("flwr")

import fedmitr as fm
from fedmitr.flower_app import DEFAULTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(fm.__file__).parent.parent


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
