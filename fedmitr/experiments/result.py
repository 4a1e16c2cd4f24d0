"""What one run reports: measured on the test split, written and read."""

from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from pydantic import BaseModel
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
    reported model on one image; seconds of every stage, as measured when it was made.
    """

    run_id: str
    method: str
    task: str
    seed: int
    clients: int
    alpha: float
    accuracy: float
    accuracy_per_class: list[float]
    ensemble_accuracy: float
    fedavg_accuracy: float | None  # none where clients' architectures differ
    local_accuracies: list[float]
    best_local_accuracy: float
    exchanges: int
    upload_bytes: int
    download_bytes: int
    synthetic_images: int
    student_steps: int
    inference_flops: int
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
        "exchanges": outcome.exchanges,
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
    """Return a function's body as text, so that a method of your own that changed is run anew.

    The text is the same in every process; what the function calls is not part of it.
    """
    code = getattr(function, "__code__", function)
    if not isinstance(code, CodeType):
        return repr(type(function))
    constants = [code_text(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def write_result(result: Result, folder: Path) -> None:
    """Write a result as `result.json` into a folder."""
    (folder / "result.json").write_text(result.model_dump_json(indent=1) + "\n")


def read_result(folder: Path) -> Result:
    """Read what `write_result` wrote."""
    return Result.model_validate_json((folder / "result.json").read_text())
