"""Where the files that ship with the package lie, and where results go."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
DEFAULT_PROFILE = "laptop"  # its figures and results are the ones that the repository ships


def shipped(name: str) -> Path:
    """Path of a shipped file or folder such as `data/…` or `notebooks/profiles`."""
    installed = PACKAGE / "shipped" / name
    return installed if installed.exists() else PACKAGE.parent / name


def home() -> Path:
    """The checkout that this package is installed from, or the working folder for a wheel."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()


def default_store() -> Path:
    """The run store: $FEDMITR_STORE, or data/store."""
    return Path(os.environ.get("FEDMITR_STORE") or home() / "data" / "store")


def output_folder(kind: str, profile: str) -> Path:
    """`figures` or `results` for the laptop profile, a folder below for any other."""
    folder = home() / kind if profile == DEFAULT_PROFILE else home() / kind / profile
    folder.mkdir(parents=True, exist_ok=True)
    return folder
