"""What one run reports: measured on the test split, written and read."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from ..core.machine import uses_bf16
from ..data.tasks import Task
from ..evaluation.flops import inference_flops
from ..evaluation.metrics import predict_with_members, predicted_classes, recall, share_correct
from ..methods import Outcome


class Result(BaseModel):
    """The report of one run; accuracies are on the test split, in [0, 1].

    The account: exchanges between clients and server; bytes of all messages up and down; synthetic
    images that the student learned from and the steps it took; floating-point operations of the
    reported model on one image; seconds of every stage, as measured when it was made. epsilon, delta: of the
    differential privacy of what clients sent (`upload.privacy`), None, and not written, without it.
    """

    run_id: str
    method: str
    task: str
    seed: int
    clients: int
    alpha: float
    accuracy: float
    accuracy_per_class: list[float]
    ensemble_accuracy: float | None  # this and the next three: none where no client trains
    fedavg_accuracy: float | None  # none, too, where clients' architectures differ
    local_accuracies: list[float]
    best_local_accuracy: float | None
    exchanges: int
    upload_bytes: int
    download_bytes: int
    synthetic_images: int
    student_steps: int
    inference_flops: int
    epsilon: float | None = Field(default=None, exclude_if=lambda value: value is None)
    delta: float | None = Field(default=None, exclude_if=lambda value: value is None)
    seconds: dict[str, float]
    settings: dict[str, Any]
    versions: dict[str, str | None]


def measure(outcome: Outcome, task: Task, found: Tensor | None = None) -> dict[str, Any]:
    """Return the fields of `Result` that follow from an outcome and the task's test split alone.

    found: the classes (models, n) that the outcome's models predict, where they are known already.
    """
    models, test = outcome.models, task.test
    found = predicted_classes(models, test.images) if found is None else found
    own = share_correct(found, test.labels).tolist()
    per_class = torch.stack([recall(row, test.labels, len(task.classes)) for row in found])  # (models, C)
    return {
        "accuracy": sum(own) / len(own),
        "accuracy_per_class": per_class.mean(0).tolist(),
        "synthetic_images": len(outcome.synthetic) if outcome.synthetic else 0,
        "student_steps": outcome.student_steps,
        "inference_flops": inference_flops(models[0], test.images[:1]),
    }


def predict_references(
    models_of: Callable[[str], list[nn.Module]], images: Tensor, average: bool
) -> dict[str, Tensor]:
    """Predict classes (models, n) with what every run reports: `ensemble`, `local`, and `fedavg` if average.

    models_of: the models of a method by its name. Every image passes each client's model once, for ensemble
    and `local` together.
    """
    (ensemble,) = models_of("ensemble")
    found = {"fedavg": predicted_classes(models_of("fedavg"), images)} if average else {}
    if uses_bf16(ensemble.precision):  # its members are not the clients' own models, which are float32
        return found | {name: predicted_classes(models_of(name), images) for name in ("ensemble", "local")}
    together = predict_with_members(ensemble, images).argmax(-1)  # (1 + K, n)
    return found | {"ensemble": together[:1], "local": together[1:]}


def code_text(function: Callable | CodeType) -> str:
    """Return a function as text, so that a method of your own that changed is run anew.

    Its name, body, defaults and closure count, and the arguments of a partial, as far as they cannot change;
    what it calls does not. The text is the same in every process.
    """
    if isinstance(function, partial):
        keywords = tuple(sorted(function.keywords.items()))
        return f"{code_text(function.func)} {_text(function.args)} {_text(keywords)}"
    if isinstance(function, CodeType):
        return f"{function.co_code.hex()} {function.co_names} {_text(function.co_consts)}"
    if not hasattr(function, "__code__"):
        return f"{type(function).__module__}.{type(function).__qualname__}"
    name = f"{function.__module__}.{function.__qualname__}"
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    defaults = (function.__defaults__, tuple(sorted((function.__kwdefaults__ or {}).items())))
    return f"{name} {code_text(function.__code__)} {_text((defaults, cells))}"


def _text(value: object) -> str:
    """Return a constant value as text, free of addresses and of the order of sets; of others the type."""
    if isinstance(value, CodeType | partial):
        return code_text(value)
    if hasattr(value, "__code__"):  # its code alone: it may refer to itself
        return code_text(value.__code__)
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    simple = value is None or isinstance(value, str | bytes | int | float | complex)
    return repr(value) if simple else f"{type(value).__module__}.{type(value).__qualname__}"


def write_result(result: Result, folder: Path) -> None:
    """Write a result as `result.json` into a folder."""
    (folder / "result.json").write_text(result.model_dump_json(indent=1) + "\n")


def read_result(folder: Path) -> Result:
    """Read what `write_result` wrote."""
    return Result.model_validate_json((folder / "result.json").read_text())
