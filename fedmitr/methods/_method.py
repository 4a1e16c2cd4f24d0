"""The record of a method: everything that the rest of the package knows of it, in one place.

The command line, the checks before a run, the tables, the figures, the Flower app, the plan of `--dry-run`
and tuning read these records. So a new method is its own file and one line in `methods/__init__.py`, or one
call of `register` in a notebook.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from ..core.errors import BadInput
from ..core.processes import in_workers
from ..core.store import Store
from ..server.synthetic import SyntheticSet
from ..settings import Settings, SettingsBlock, add_block
from ..settings.schema import InversionSettings
from ..upload import Upload

Family = Literal["average", "statistics", "synthetic images", "fusion", "reference"]
FAMILIES: tuple[Family, ...] = ("average", "statistics", "synthetic images", "fusion", "reference")


@dataclass(frozen=True)
class Outcome:
    """What a method leaves behind, and what it cost: the same account for all methods.

    models: one global model, or one per client (`local`). seconds: the server's, by stage, as measured when
    the stage was computed. synthetic: the images that the student learned from, student_steps: its optimiser
    steps. exchanges: how often clients and server exchanged messages. Bytes up and down; None stands for one
    upload from each client, and the shared model to each.
    """

    models: list[nn.Module]
    seconds: dict[str, float] = field(default_factory=dict)
    synthetic: SyntheticSet | None = None
    student_steps: int = 0
    exchanges: int = 1
    uplink_bytes: int | None = None
    downlink_bytes: int | None = None


@dataclass(frozen=True)
class Work:
    """What a method's server computes, as passes through models; `evaluation.plan` says what they cost.

    images: synthetic images in all. inversion: the settings they are inverted with, None where they are not;
    student_inverted: the student's forward and backward pass is part of every iteration. generator_steps:
    optimiser steps of a generator in all, each on generator_batch images that every client and the student
    see. student_steps: optimiser steps of distillation, 0 where nothing is distilled. calibrate: the penalty
    of class offsets, 0 where none are fitted. group: clients distilled together first, None for all at once.
    """

    images: int = 0
    inversion: InversionSettings | None = None
    student_inverted: bool = False
    generator_steps: int = 0
    generator_batch: int = 0
    student_steps: int = 0
    calibrate: float = 0.0
    group: int | None = None


@dataclass(frozen=True)
class Range:
    """Values that tuning may try for a number, from low to high, both included; log: by their logarithm."""

    low: float
    high: float
    log: bool = False


Search = Mapping[str, Range | Sequence[Any]]
Run = Callable[[Sequence[Upload], Settings, Store], Outcome]


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    name: in settings, tables and on the command line. run: uploads, settings and store to an `Outcome`.
    label: as its paper spells it; by default the name. family: what the method makes of the uploads.
    citation: where it is from.

    settings: its own block, which then is part of every run under the method's name. search: dotted setting
    -> the `Range`, or the values, that tuning may try. work: what its server computes under given settings;
    None stands for distillation with everybody's budget in the family "synthetic images", else for nothing.

    given: what `run` gets in place of uploads where it is not them: "clients" for a method of several
    exchanges (`fusefl.Client`), "central" for the one upload of a client that holds all data. needs_counts:
    every upload must carry its class histogram. averages: weights or blocks of clients are averaged, so all
    must have one architecture; with start, only where `distill.start` is "average". single_model: whether it
    leaves one model; else every prediction runs all clients' blocks. sends: whether anything is sent at all.
    exchanges: how often; a dotted setting where it depends on settings.
    """

    name: str
    run: Run
    label: str = ""
    family: Family = "synthetic images"
    citation: str = "yours"
    settings: type[SettingsBlock] | None = None
    search: Search = field(default_factory=dict)
    work: Callable[[Settings], Work] | None = None
    given: Literal["uploads", "clients", "central"] = "uploads"
    needs_counts: bool = False
    averages: bool = False
    single_model: bool = True
    sends: bool = True
    exchanges: int | str = 1

    def __post_init__(self) -> None:
        """Raises BadInput for a name that is no Python name or one of a block, and for an unknown family."""
        if not self.name.isidentifier():
            raise BadInput(f"method={self.name!r} is no name: allowed are letters, digits and _")
        if self.family not in FAMILIES:
            raise BadInput(f"family={self.family!r} is unknown: allowed are {', '.join(FAMILIES)}")
        if not self.label:
            object.__setattr__(self, "label", self.name)

    def __call__(self, uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
        """Run the method."""
        return self.run(uploads, settings, store)

    @property
    def is_reference(self) -> bool:
        """Whether it is what methods are measured against, and no method itself."""
        return self.family == "reference"

    @property
    def distils(self) -> bool:
        """Whether it distils a student on synthetic images."""
        return self.family == "synthetic images"

    def own(self, settings: Settings) -> SettingsBlock | None:
        """Its own block in the settings of a run; None where it has none."""
        return getattr(settings, self.name) if self.settings else None

    def work_under(self, settings: Settings) -> Work:
        """What its server computes under these settings."""
        if self.work:
            return self.work(settings)
        if self.distils:
            return Work(images=settings.inversion.images, student_steps=settings.distill.steps)
        return Work()

    def exchanges_under(self, settings: Settings) -> int:
        """How often clients and server exchange messages under these settings."""
        if isinstance(self.exchanges, int):
            return self.exchanges
        block, name = self.exchanges.split(".")
        return getattr(getattr(settings, block), name)

    def asks_counts(self, settings: Settings) -> bool:
        """Whether clients send their class histogram: the ensemble, inversion or the method needs it."""
        return self.needs_counts or settings.uses_counts


METHODS: dict[str, Method] = {}
STAGES = frozenset(Settings.model_fields)  # the blocks that are no method's own


def register(*methods: Method) -> None:
    """Make methods known to the whole package and its workers; one of a known name takes its place.

    Raises BadInput for a name that is a block of settings already.
    """
    add(*methods)
    in_workers(add, *methods)


def add(*methods: Method) -> None:
    """Make methods known in this process."""
    for method in methods:
        block, known = method.settings, Settings.model_fields.get(method.name)
        if block and method.name in STAGES:
            raise BadInput(f"method={method.name!r} is the name of a block of settings: choose another")
        METHODS[method.name] = method
        if block and (known is None or known.annotation is not block):
            add_block(method.name, block)


def find(name: str) -> Method:
    """The record of a method; BadInput for an unknown name."""
    if name not in METHODS:
        raise BadInput(f"method={name!r} is unknown: allowed are {', '.join(METHODS)}")
    return METHODS[name]


def described(name: str) -> Method:
    """The record of a method; for a name in a table that is not registered here, one with the defaults."""
    return METHODS.get(name) or Method(name, run=find)


def in_order(names: Iterable[str]) -> list[str]:
    """Sort methods as tables show them: family by family, each in the order of registration."""
    known = list(METHODS)
    place = {name: known.index(name) if name in METHODS else len(known) for name in names}
    return sorted(place, key=lambda name: (FAMILIES.index(described(name).family), place[name]))


def check_methods(names: Iterable[str], settings: Settings) -> None:
    """BadInput for an unknown method, and for one that needs clients of one architecture but has several."""
    methods = [find(name) for name in names]
    if not settings.mixed:
        return
    differ = f"client.models={list(settings.client.models)} differ from model.name={settings.model.name!r}"
    for method in methods:
        if method.averages:
            raise BadInput(f"method={method.name!r} needs clients of one architecture: {differ}")
        if method.distils and settings.distill.start == "average":
            raise BadInput(
                f"distill.start='average' needs clients of one architecture: {differ}; allowed is 'initial'"
            )
