"""All settings of a run, and the ways to set them: Python, YAML profiles, `--set`, papermill parameters.

All take the same dotted names, `block.setting`; schema.py has what they mean.
"""

from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator
from pydantic.fields import FieldInfo

from ..core.errors import BadInput
from ..core.paths import shipped
from .schema import (
    TASKS,
    ClientSettings,
    Count,
    DistillSettings,
    EnsembleSettings,
    InversionSettings,
    ModelSettings,
    PartitionSettings,
    RelabelSettings,
    SettingsBlock,
    StatisticsSettings,
    TaskSettings,
    setting,
)

PROFILES = ("smoke", "laptop", "gpu", "paper")
TUNED = "results/tuned.yaml"  # profile -> shared start -> method -> dotted setting: value; by `fedmitr tune`


class Settings(SettingsBlock):
    """The settings of one run. `seed` fixes everything random in it."""

    seed: int = setting(0, "fixes data, partition, training, inversion and distillation", ge=0, le=2**32 - 1)
    threads: Count = setting(1, "CPU threads of a process; results may differ in the last bits with another")
    budget: Literal["equal", "own"] = setting(
        "equal",
        "equal: every method that distils makes inversion.images images and takes distill.steps steps; "
        "own: the numbers in its block",
    )
    task: TaskSettings = TaskSettings()
    partition: PartitionSettings = PartitionSettings()
    model: ModelSettings = ModelSettings()
    client: ClientSettings = ClientSettings()
    statistics: StatisticsSettings = StatisticsSettings()
    ensemble: EnsembleSettings = EnsembleSettings()
    inversion: InversionSettings = InversionSettings()
    relabel: RelabelSettings = RelabelSettings()
    distill: DistillSettings = DistillSettings()
    # `add_block` adds one block for every method that has settings of its own

    @model_validator(mode="after")
    def _drawn_by_class(self):
        if self.distill.per_class and self.ensemble.mode != "class":
            raise ValueError(
                f"distill.per_class={self.distill.per_class} draws clients by class: allowed with "
                f"ensemble.mode='class', not {self.ensemble.mode!r}"
            )
        return self

    @model_validator(mode="after")
    def _starts(self):
        if self.distill.start == "statistics" and not self.ensemble.anchor:
            raise ValueError(
                "distill.start='statistics' needs sums of features: allowed with ensemble.anchor=true"
            )
        if self.distill.start == "statistics" and self.relabel.head == "own":
            raise ValueError(
                "distill.start='statistics' has no token head of its own: allowed is relabel.head='shared'"
            )
        return self

    @classmethod
    def load(
        cls, profile: str = "laptop", overrides: Mapping[str, Any] | None = None, method: str | None = None
    ) -> "Settings":
        """Return a profile's settings with dotted overrides, such as {"partition.alpha": 0.1}.

        method: with the values that were tuned for this method under this profile, on its task and from this
        start, where there are any; overrides go before them. Raises BadInput, one line, for an unknown
        profile or setting and a value out of range.
        """
        tree, overrides = read_profile(profile), dict(overrides or {})
        own_task = tree.get("task", {}).get("name", TaskSettings().name)
        if method and overrides.get("task.name", own_task) == own_task:
            start = overrides.get("model.name", tree.get("model", {}).get("name", ModelSettings().name))
            overrides = tuned_values(profile, start, method) | overrides
        for name, value in overrides.items():
            _assign(tree, name, value)
        return build(tree)

    def changed(self, overrides: Mapping[str, Any]) -> "Settings":
        """Return these settings with other values under some dotted names; raises BadInput as `load` does."""
        tree = self.model_dump()
        for name, value in overrides.items():
            _assign(tree, name, value)
        return build(tree)

    def model_of(self, client: int) -> ModelSettings:
        """Return the model that a client starts from: the global one, or its own of `client.models`."""
        names = self.client.models
        name = names[client % len(names)] if names else self.model.name
        if name == self.model.name:
            return self.model
        return self.model.model_copy(update={"name": name, "checkpoint": None})

    @property
    def uses_counts(self) -> bool:
        """Whether the ensemble or inversion needs each client's class histogram c_k."""
        return self.ensemble.mode == "class" or self.inversion.teacher == "owners"

    @property
    def mixed(self) -> bool:
        """Whether some client's architecture is not the global model's."""
        return any(name != self.model.name for name in self.client.models[: self.partition.clients])


def add_block(name: str, block: type[SettingsBlock]) -> None:
    """Add a block to `Settings` under this name, for a method of that name.

    Settings that were made before have the block's defaults.
    """
    Settings.__annotations__[name] = block
    Settings.model_fields[name] = FieldInfo.from_annotated_attribute(block, block())
    Settings.model_rebuild(force=True)
    setattr(Settings, name, block())


def read_profile(profile: str) -> dict[str, Any]:
    """Read the settings of a shipped profile (notebooks/profiles/PROFILE.yaml) as nested dicts."""
    if profile not in PROFILES:
        raise BadInput(f"profile={profile!r} is unknown: allowed are {', '.join(PROFILES)}")
    flat = (
        yaml.safe_load((shipped("notebooks/profiles") / f"{profile}.yaml").read_text()).get("SETTINGS") or {}
    )
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        _assign(tree, name, value)
    return tree


def tuned_values(profile: str, start: str, method: str) -> dict[str, Any]:
    """Return the dotted settings that were tuned for a method from a shared start; empty where none were."""
    return dict(read_tuned(shipped(TUNED)).get(profile, {}).get(start, {}).get(method, {}))


def read_tuned(path: Path) -> dict[str, Any]:
    """Read a file of tuned values, as `TUNED` is one; empty where there is none."""
    return deepcopy(_parsed(path, path.stat().st_mtime_ns)) if path.exists() else {}


@lru_cache(maxsize=2)  # one command may load the settings of hundreds of runs
def _parsed(path: Path, changed: int) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}


def _assign(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted name in nested dicts; raise BadInput for a name that no block has."""
    known = defaults()
    if name not in known:
        block = name.split(".")[0]
        near = [k for k in known if k.split(".")[0] == block] or sorted({k.split(".")[0] for k in known})
        raise BadInput(f"setting {name!r} is unknown: known there are {', '.join(near)}")
    *blocks, leaf = name.split(".")
    for block in blocks:
        tree = tree.setdefault(block, {})
    tree[leaf] = value


def build(tree: dict[str, Any]) -> Settings:
    """Return the settings of nested dicts; raise BadInput for the first value that is out of range."""
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as failure:
        error = failure.errors()[0]
        name = ".".join(str(p) for p in error["loc"])
        said = error["msg"].removeprefix("Value error, ")
        given = "" if isinstance(error["input"], BaseModel | dict) else f"={error['input']!r}"
        where = f"{name}{given}: " if name else ""  # a rule over several blocks names its settings itself
        raise BadInput(f"{where}{said[0].lower()}{said[1:]}") from None
    if settings.task.name not in TASKS:
        raise BadInput(f"task.name={settings.task.name!r} is unknown: allowed are {', '.join(TASKS)}")
    return settings


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return name and value of a `key=value`; the value is read as YAML: numbers, lists, true, null."""
    name, equals, value = text.partition("=")
    if not equals:
        raise BadInput(f"--set {text!r} is not of the form key=value")
    try:
        value = yaml.safe_load(value)
    except yaml.YAMLError:
        raise BadInput(f"--set {text!r}: the value is not readable as YAML") from None
    return name.strip(), number(value)


def number(value: Any) -> Any:
    """Return text that is a number, such as 1e-3 to YAML, as that number; also in lists."""
    if isinstance(value, list):
        return [number(v) for v in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def fields() -> list[dict[str, Any]]:
    """Return one row per setting: its name, default, what is allowed, meaning and the default's source."""
    rows = []
    for block, info in Settings.model_fields.items():
        nested = isinstance(info.annotation, type) and issubclass(info.annotation, SettingsBlock)
        for name, field in (info.annotation.model_fields if nested else {block: info}).items():
            rows.append(
                {
                    "setting": f"{block}.{name}" if nested else name,
                    "default": field.default,
                    "allowed": _allowed(field),
                    "meaning": field.description,
                    "source": (field.json_schema_extra or {}).get("source", "yours"),
                }
            )
    return rows


def _allowed(field: Any) -> str:
    """Return a field's choices or limits as text, such as "> 0, < 1"."""
    if named := (field.json_schema_extra or {}).get("choices"):
        return ", ".join(named)
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    if choices := [a for a in get_args(field.annotation) if isinstance(a, str)]:
        return ", ".join(choices)
    items = [info for item in get_args(field.annotation) for info in getattr(item, "__metadata__", ())]
    limits = [
        f"{sign} {getattr(limit, name)}"
        for limit in [*field.metadata, *(limit for info in items for limit in info.metadata)]
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return ", ".join(dict.fromkeys(limits))  # both items of a pair have the same limits


def defaults() -> dict[str, Any]:
    """Return the default of every setting by its dotted name."""
    return {row["setting"]: row["default"] for row in fields()}
