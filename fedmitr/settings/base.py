"""What the blocks of settings are made of: the block itself, its fields, and the ranges of numbers."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
OpenShare = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["auto", "fp32", "bf16"]
FeatureTokens = Literal["cls", "patches", "both", "regions"]  # as `vision.features.image_features` reads them


def setting(
    default: Any,
    meaning: str,
    source: str = "ours",
    choices: Collection[str] = (),
    later: bool = False,
    **limits: Any,
) -> Any:
    """Make a field of a block with its default, meaning and the source of the default.

    choices: the allowed names where the type does not have them, because more can be registered. later: the
    setting came after results were stored; a dump leaves it out at its default, so that their addresses
    stay. limits: pydantic's gt, ge, lt, le.
    """
    extra = {"source": source, "choices": choices}
    if later:
        limits["exclude_if"] = lambda value: value == default
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


class SettingsBlock(BaseModel):
    """A group of settings; unknown names and values out of range are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


def precision_of(what: str) -> Any:
    """Make the field for the precision of a stage's matrix products."""
    return setting("fp32", f"precision of matrix products in {what}; auto: bf16 where the hardware has it")
