"""A content-addressed store: an artefact's key is the hash of everything that made it.

An artefact is a folder. It is written under another name and renamed in one step, so an artefact that exists
is complete, a killed run leaves none half-made, and two runs at once do not disturb each other.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy
import pandas as pd
import sklearn
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import BadInput
from .machine import device, native_bf16

SECONDS = "seconds.json"
FORMAT = 5  # raised when a stage computes something else under the same settings
Artefact = TypeVar("Artefact")


def fingerprint(*parts: Any) -> str:
    """Hash JSON-able parts with library versions, device, threads and artefact format: 16 hex digits."""
    # sums over another number of threads round differently; precision=auto depends on the machine
    machine = [device().type, torch.get_num_threads(), native_bf16()]
    made_with = [FORMAT, *machine, *(m.__version__ for m in (numpy, sklearn, timm, torch))]
    return digest(made_with, *parts)


def digest(*parts: Any) -> str:
    """Hash JSON-able parts, the same on every machine: 16 hex digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_output(file: Path, setting: str) -> None:
    """Make the folder of a file to be written; BadInput, naming the setting, where it cannot be written."""
    if file.is_dir():
        raise BadInput(f"{setting} is a folder: give the path of a file")
    check_writable(file.parent, setting)


def check_writable(folder: Path, setting: str) -> None:
    """Make a folder; raise BadInput, naming the setting, when it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"{setting} cannot be written: {error.strerror or error}") from None


class Store:
    """Artefacts under one folder, addressed by stage and key."""

    def __init__(self, root: Path | str) -> None:
        """Make the folder `root`; raise BadInput when it cannot be made or written."""
        if not str(root).strip():
            raise BadInput("store='' is empty: give the path of a folder")
        self.root = Path(root)
        check_writable(self.root, f"store={str(root)!r}")

    def path(self, stage: str, key: str) -> Path:
        """Return the folder of an artefact, which may not exist yet."""
        return self.root / stage / key

    def has(self, stage: str, key: str) -> bool:
        """Whether an artefact is there."""
        return self.path(stage, key).is_dir()

    def put(self, stage: str, key: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a folder, rename it to the artefact's path in one step, and return that path."""
        target = self.path(stage, key)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=target.parent))
        aside.chmod(0o755)  # mkdtemp is private to its user; a store may be shared
        try:
            write(aside)
            os.replace(aside, target)
        except OSError:
            if not target.is_dir():  # else another run finished the same artefact first
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return target

    def get(
        self,
        stage: str,
        key: str,
        read: Callable[[Path], Artefact],
        make: Callable[[], Artefact],
        write: Callable[[Artefact, Path], None],
    ) -> Artefact:
        """Read an artefact if it is there, else make and write it, with the seconds that making it took."""
        if self.has(stage, key):
            return self.read(stage, key, read)
        start = time.perf_counter()
        made = make()
        seconds = time.perf_counter() - start

        def fill(folder: Path) -> None:
            write(made, folder)
            write_json(folder / SECONDS, round(seconds, 3))

        self.put(stage, key, fill)
        return made

    def read(self, stage: str, key: str, read: Callable[[Path], Artefact]) -> Artefact:
        """Read a finished artefact; raise BadInput, naming the folder to delete, when it is damaged."""
        folder = self.path(stage, key)
        try:
            return read(folder)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadInput(f"{reason}; damaged: delete {folder} to make it again") from None

    def seconds(self, stage: str, key: str) -> float:
        """Return the seconds that making the artefact took."""
        return json.loads((self.path(stage, key) / SECONDS).read_text())


def write_text(text: str, path: Path) -> None:
    """Write text, replacing a file in one step."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON, replacing a file in one step."""
    write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", path)


def write_csv(table: pd.DataFrame, path: Path, digits: int) -> None:
    """Write a table without its index, floats to `digits` decimals, replacing a file in one step."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    table.to_csv(aside, index=False, float_format=f"%.{digits}f")
    os.replace(aside, path)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; every type is kept."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, by name."""
    return load_file(path)
