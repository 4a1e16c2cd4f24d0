"""Where the files that ship with the package lie, and where results go."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
DEFAULT_PROFILE = "laptop"  # its figures and results are the ones that the repository ships


def shipped(name: str) -> Path:
    """Return the path of a file or folder that ships, such as `data/…` or `notebooks/profiles`."""
    installed = PACKAGE / "shipped" / name
    return installed if installed.exists() else PACKAGE.parent / name


def home() -> Path:
    """Return the checkout that this package is installed from, or the working folder for a wheel."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()


def default_store() -> Path:
    """Return the folder of the run store: $FEDMITR_STORE, or data/store."""
    return Path(os.environ.get("FEDMITR_STORE") or home() / "data" / "store")


def reproduced(profile: str) -> Path:
    """Return where `fedmitr reproduce` and notebooks write: $FEDMITR_OUTPUT, or reproduced/PROFILE.

    What ships in figures/ and results/ is never touched: git ignores this folder.
    """
    return Path(os.environ.get("FEDMITR_OUTPUT") or home() / "reproduced" / profile)


def output_folder(kind: str, profile: str) -> Path:
    """Make and return the folder for `figures`, `results` or `notebooks` (kind) that a profile writes."""
    folder = reproduced(profile) / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder
