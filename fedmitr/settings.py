"""Every setting of a run, and the ways to say it: Python, YAML profiles, `--set`, papermill parameters.

All take the same dotted names, `block.setting`; blocks.py has what they mean.
"""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from .blocks import (
    TASKS,
    Block,
    ClientSettings,
    CoBoostingSettings,
    Count,
    DenseSettings,
    DistillSettings,
    EnsembleSettings,
    FadiSettings,
    FdaflSettings,
    FedftgSettings,
    FuseflSettings,
    InversionSettings,
    ModelSettings,
    PartitionSettings,
    RelabelSettings,
    TaskSettings,
    setting,
)
from .errors import BadInput
from .paths import shipped

PROFILES = ("smoke", "laptop", "gpu", "paper")
METHODS = (
    "fedmitr",
    "fedavg",
    "fdafl",
    "fadi",
    "dense",
    "co_boosting",
    "fedftg",
    "fusefl",
    "ensemble",
    "local",
    "central",
)
ONE_ARCHITECTURE = ("fedavg", "fusefl")  # they average weights or blocks
WITHOUT_STUDENT = ("fedavg", "fusefl", "ensemble", "local", "central")  # the others distil one


class Settings(Block):
    """One run. `seed` fixes everything random in it."""

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
    ensemble: EnsembleSettings = EnsembleSettings()
    inversion: InversionSettings = InversionSettings()
    relabel: RelabelSettings = RelabelSettings()
    distill: DistillSettings = DistillSettings()
    fdafl: FdaflSettings = FdaflSettings()
    fadi: FadiSettings = FadiSettings()
    dense: DenseSettings = DenseSettings()
    co_boosting: CoBoostingSettings = CoBoostingSettings()
    fedftg: FedftgSettings = FedftgSettings()
    fusefl: FuseflSettings = FuseflSettings()

    @model_validator(mode="after")
    def _drawn_by_class(self):
        if self.distill.per_class and self.ensemble.mode != "class":
            raise ValueError(
                f"distill.per_class={self.distill.per_class} draws clients by class: allowed with "
                f"ensemble.mode='class', not {self.ensemble.mode!r}"
            )
        return self

    @classmethod
    def load(cls, profile: str = "laptop", overrides: dict[str, Any] | None = None) -> "Settings":
        """A profile's settings with dotted overrides, such as {"partition.alpha": 0.1}.

        Raises BadInput, one line, for an unknown profile or setting and a value out of range.
        """
        tree = read_profile(profile)
        for name, value in (overrides or {}).items():
            _assign(tree, name, value)
        return build(tree)

    def model_of(self, client: int) -> ModelSettings:
        """The model that a client starts from: the global one, or its turn among `client.models`."""
        names = self.client.models
        name = names[client % len(names)] if names else self.model.name
        if name == self.model.name:
            return self.model
        return self.model.model_copy(update={"name": name, "checkpoint": None})

    @property
    def mixed(self) -> bool:
        """Whether some client's architecture is not the global model's."""
        return any(name != self.model.name for name in self.client.models[: self.partition.clients])


def check_architectures(settings: Settings, methods: Iterable[str]) -> None:
    """BadInput for a method that needs clients of one architecture, where they have several."""
    if not settings.mixed:
        return
    differ = f"client.models={list(settings.client.models)} differ from model.name={settings.model.name!r}"
    for method in methods:
        if method in ONE_ARCHITECTURE:
            raise BadInput(f"method={method!r} needs clients of one architecture: {differ}")
        if method not in WITHOUT_STUDENT and settings.distill.start == "average":
            raise BadInput(
                f"distill.start='average' needs clients of one architecture: {differ}; allowed is 'initial'"
            )


def read_profile(profile: str) -> dict[str, Any]:
    """The nested settings of a shipped profile (notebooks/profiles/PROFILE.yaml)."""
    if profile not in PROFILES:
        raise BadInput(f"profile={profile!r} is unknown: allowed are {', '.join(PROFILES)}")
    flat = (
        yaml.safe_load((shipped("notebooks/profiles") / f"{profile}.yaml").read_text()).get("SETTINGS") or {}
    )
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        _assign(tree, name, value)
    return tree


def _assign(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted name in a nested dict, refusing names that no block has."""
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
    """Validate nested settings; the first error as one line (BadInput)."""
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as failure:
        error = failure.errors()[0]
        name = ".".join(str(p) for p in error["loc"])
        said = error["msg"].removeprefix("Value error, ")
        given = "" if isinstance(error["input"], BaseModel | dict) else f"={error['input']!r}"
        where = f"{name}{given}: " if name else ""  # a rule between blocks names its settings itself
        raise BadInput(f"{where}{said[0].lower()}{said[1:]}") from None
    if settings.task.name not in TASKS:
        raise BadInput(f"task.name={settings.task.name!r} is unknown: allowed are {', '.join(TASKS)}")
    return settings


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` from the command line; the value is read as YAML: numbers, lists, true, null."""
    name, equals, value = text.partition("=")
    if not equals:
        raise BadInput(f"--set {text!r} is not of the form key=value")
    try:
        value = yaml.safe_load(value)
    except yaml.YAMLError:
        raise BadInput(f"--set {text!r}: the value is not readable as YAML") from None
    return name.strip(), number(value)


def number(value: Any) -> Any:
    """YAML reads 1e-3 as text; a reader means a number."""
    if isinstance(value, list):
        return [number(v) for v in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def fields() -> list[dict[str, Any]]:
    """Every setting: name, default, what is allowed, meaning, source; the table that the docs print."""
    rows = []
    for block, info in Settings.model_fields.items():
        nested = isinstance(info.annotation, type) and issubclass(info.annotation, Block)
        for name, field in (info.annotation.model_fields if nested else {block: info}).items():
            rows.append(
                {
                    "setting": f"{block}.{name}" if nested else name,
                    "default": field.default,
                    "allowed": _allowed(field),
                    "meaning": field.description,
                    "source": field.json_schema_extra["source"],
                }
            )
    return rows


def _allowed(field: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    if choices := [a for a in get_args(field.annotation) if isinstance(a, str)]:
        return ", ".join(choices)
    of_items = [info for item in get_args(field.annotation) for info in getattr(item, "__metadata__", ())]
    limits = [
        f"{s} {getattr(m, n)}"
        for m in [*field.metadata, *(m for info in of_items for m in info.metadata)]
        for n, s in signs.items()
        if getattr(m, n, None) is not None
    ]
    return ", ".join(dict.fromkeys(limits))  # the items of a pair share theirs


def defaults() -> dict[str, Any]:
    """Dotted name -> default of every setting."""
    return {row["setting"]: row["default"] for row in fields()}
