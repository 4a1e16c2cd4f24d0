"""What one run reports, and how it is written."""

from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

from pydantic import BaseModel


class Result(BaseModel):
    """What one run reports; accuracies are on the test split, in [0, 1].

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


def code_text(function: Callable | CodeType) -> str:
    """A function's body as text, the same in every process: a method of your own that changed is run anew.

    What the function calls is not part of it.
    """
    code = getattr(function, "__code__", function)
    if not isinstance(code, CodeType):
        return repr(type(function))
    constants = [code_text(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def write_result(result: Result, folder: Path) -> None:
    (folder / "result.json").write_text(result.model_dump_json(indent=1) + "\n")
