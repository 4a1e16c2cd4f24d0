"""The record of a method: everything that the rest of the package knows of it, in one place.

The command line, the checks before a run, tables, figures, the Flower app and `--dry-run` read these
records; `search` is what tuning may try. So a new method is a file of its own and one line in
`methods/__init__.py`, or one call of `register` in a notebook. fedavg.py is the shortest example, dense.py
one with settings. `run` may ignore the store; `_student.stored` is how methods keep their results in it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import ValidationError
from torch import nn

from ..core.errors import BadInput
from ..core.processes import in_workers
from ..core.store import Store
from ..server.synthetic import SyntheticSet
from ..settings import Settings, SettingsBlock, add_block, defaults
from ..settings.schema import InversionSettings
from ..upload import Upload, check_noise, check_statistics, check_weights

Given = Literal["uploads", "clients", "stages", "central", "images"]
Family = Literal["average", "statistics", "synthetic images", "fusion", "reference"]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class Outcome:
    """The result of a method: models and costs, in the same terms for all methods.

    models: one global model, or one per client (`local`). seconds: the server's, by stage, measured when the
    stage was computed. synthetic: the images that the student learned from; student_steps: its optimiser
    steps. uplink_bytes, downlink_bytes: of all messages together; None where every client sends one upload
    (nothing, if the record says so), and receives the shared model.
    """

    models: list[nn.Module]
    seconds: dict[str, float] = field(default_factory=dict)
    synthetic: SyntheticSet | None = None
    student_steps: int = 0
    uplink_bytes: int | None = None
    downlink_bytes: int | None = None


@dataclass(frozen=True)
class Work:
    """The server's computation, counted in passes through models; `evaluation.plan` turns it into costs.

    images: synthetic images in all. inversion: the settings that they are inverted with, None where none
    are; student_inverted: the student's forward and backward pass is part of every iteration.
    generator_steps: optimiser steps of a generator in all, each on generator_batch images that pass through
    every client and the student; one_client: through one client and the student. student_steps: optimiser
    steps of distillation, 0 where nothing is distilled. calibrate: the penalty of class offsets, 0 where none
    are fitted. perturbed: every view is moved along a gradient through the clients. reweighing: images on
    which weights of clients are fitted. with_statistics: the shared model labels every view beside the
    clients. group: clients that are distilled together first, None for all at once.
    """

    images: int = 0
    inversion: InversionSettings | None = None
    student_inverted: bool = False
    generator_steps: int = 0
    generator_batch: int = 0
    one_client: bool = False
    student_steps: int = 0
    calibrate: float = 0.0
    perturbed: bool = False
    reweighing: int = 0
    with_statistics: bool = False
    group: int | None = None


@dataclass(frozen=True)
class Range:
    """Values that tuning may try for a number: low to high, both included; log: on a logarithmic scale."""

    low: float
    high: float
    log: bool = False


Search = Mapping[str, Range | Sequence[Any]]  # dotted setting -> what tuning may try
Run = Callable[[Sequence[Upload], Settings, Store], Outcome]


@dataclass(frozen=True)
class Method:
    """One method of the comparison. Only `name` and `run` are needed; the rest has defaults.

    What it is:
        name: a Python name; it is used in settings, in tables and on the command line.
        run: the function from uploads, settings and store to an `Outcome`.
        label: the name as its paper spells it; by default `name`.
        family: what it makes of the uploads, one of `FAMILIES`.
        citation: where it was published; empty for a reference.

    How it is set and what it computes:
        settings: its own block of settings, which every run then has under the method's name.
        search: dotted setting -> the `Range`, or the values, that tuning may try.
        tuned_as: the method whose tuned settings it runs under; by default its own.
        adapt: from the run's settings to those that it works under, where it reads some otherwise.
        work: what its server computes under given settings. By default `inversion.images` images and
            `distill.steps` student steps in the family "synthetic images", nothing in the others.

    What it needs of clients:
        given: what `run` gets: "uploads"; "clients" for a method that asks for statistics after the uploads
            (`_statistics.Client`); "stages" for one that trains stage by stage (`fusefl.Client`); "central"
            for the one upload of a client that holds all data; "images" for the uploads and, as a fourth
            argument, all clients' images, which no server has: a reference.
        needs_weights: whether every upload must carry weights; without, no client trains.
        needs_counts: whether every upload must carry its class histogram.
        needs_statistics: whether every upload must carry sums of features; a dotted setting where it depends
            on settings.
        averages: whether weights or blocks of clients are averaged, so that all need one architecture.

    What is sent and what it leaves:
        single_model: whether a prediction runs one model; else it runs the models of all clients.
        sends: whether clients send anything.
        exchanges: how often messages are exchanged; a dotted setting where it depends on settings.
    """

    name: str
    run: Run
    label: str = ""
    family: Family = "synthetic images"
    citation: str = "yours"
    settings: type[SettingsBlock] | None = None
    search: Search = field(default_factory=dict, hash=False)
    tuned_as: str = ""
    adapt: Callable[[Settings], Settings] | None = None
    work: Callable[[Settings], Work] | None = None
    given: Given = "uploads"
    needs_weights: bool = True
    needs_counts: bool = False
    needs_statistics: bool | str = False
    averages: bool = False
    single_model: bool = True
    sends: bool = True
    exchanges: int | str = 1

    def __post_init__(self) -> None:
        for field_name in ("label", "tuned_as"):
            if not getattr(self, field_name):
                object.__setattr__(self, field_name, self.name)

    def __call__(self, given: Sequence[Any], settings: Settings, store: Store, *more: Any) -> Outcome:
        """Run the method under its own reading of the settings; BadInput for uploads that lack a part."""
        if self.given not in ("clients", "stages"):
            given = self.admitted(given, settings)
        return self.run(given, self.adapted(settings), store, *more)

    def admitted(self, uploads: Sequence[Upload], settings: Settings) -> list[Upload]:
        """Return the uploads without statistics where the method needs none; BadInput for one without a part.

        Statistics are checked, too: wrong ones would show in the head alone. So is the noise that uploads
        declare (`check_noise`). Class histograms are missed by what reads them.
        """
        if self.needs_weights:
            check_weights(uploads)
            check_noise(uploads, "client", settings.client)
        if not self.needs_statistics_under(settings):
            return [u if u.statistics is None else u.without_statistics() for u in uploads]
        check_statistics(uploads)
        check_noise(uploads, "statistics", settings.statistics)
        return [upload.checked() for upload in uploads]

    def adapted(self, settings: Settings) -> Settings:
        """Return the settings that it works under."""
        return self.adapt(settings) if self.adapt else settings

    @property
    def is_shipped(self) -> bool:
        """Whether it is the package's own method of its name."""
        return getattr(self.run, "__module__", "") == f"{__package__}.{self.name}"

    @property
    def is_reference(self) -> bool:
        """Whether it is what methods are measured against, and no method itself."""
        return self.family == "reference"

    @property
    def distils(self) -> bool:
        """Whether it distils a student on synthetic images."""
        return self.family == "synthetic images"

    def work_under(self, settings: Settings) -> Work:
        """Return what its server computes under these settings."""
        settings = self.adapted(settings)
        if self.work:
            return self.work(settings)
        if self.distils:
            return Work(images=settings.inversion.images, student_steps=settings.distill.steps)
        return Work()

    def exchanges_under(self, settings: Settings) -> int:
        """Return how often clients and server exchange messages under these settings."""
        return self.exchanges if isinstance(self.exchanges, int) else dotted(settings, self.exchanges)

    def needs_counts_under(self, settings: Settings) -> bool:
        """Whether clients send their class histogram: the ensemble, inversion or the method needs it."""
        return self.needs_counts or (self.needs_weights and self.adapted(settings).uses_counts)

    def needs_statistics_under(self, settings: Settings) -> bool:
        """Whether clients send sums of features; for a method that distils also with `ensemble.anchor`."""
        needs, settings = self.needs_statistics, self.adapted(settings)
        own = bool(dotted(settings, needs)) if isinstance(needs, str) else needs
        return own or (self.distils and self.needs_weights and settings.ensemble.anchor)

    def sent_under(self, settings: Settings) -> list[str]:
        """List what clients send under these settings: weights, class histogram, statistics."""
        parts = {
            "weights": self.needs_weights,
            "class histogram": self.needs_counts_under(settings),
            "statistics": self.needs_statistics_under(settings) or self.given == "clients",
        }
        return [name for name, needed in parts.items() if needed and self.sends]


def dotted(settings: Settings, name: str) -> Any:
    """Return the value of a dotted setting."""
    block, leaf = name.split(".")
    return getattr(getattr(settings, block), leaf)


METHODS: dict[str, Method] = {}
TAKEN = frozenset(Settings.model_fields) | frozenset(dir(Settings))  # no name of a method's own block


def register(*methods: Method) -> None:
    """Make methods known to the whole package and its workers; an existing name is replaced.

    Raises BadInput, before any is known, for a record that cannot work: a name that is no Python name, or one
    that `Settings` uses already where the method has a block; a block without valid defaults; another value
    of a field than those allowed.
    """
    add(*methods)
    in_workers(add, *methods)


def add(*methods: Method) -> None:
    """Make methods known in this process, as `register` does."""
    for method in methods:
        _check(method)
    own = {f"{m.name}.{leaf}" for m in methods if m.settings for leaf in m.settings.model_fields}
    for method in methods:
        _check_dotted(method, own | set(defaults()))
    for method in methods:
        block, known = method.settings, Settings.model_fields.get(method.name)
        METHODS[method.name] = method
        if block and (known is None or known.annotation is not block):
            add_block(method.name, block)


def _check(method: Method) -> None:
    """Raise BadInput for a record that cannot work."""
    name, family = method.name, method.family
    if not name.isidentifier() or name.startswith("_"):
        raise BadInput(f"method={name!r} is no name: allowed are letters, digits and _, a letter first")
    if method.settings and name in TAKEN:
        raise BadInput(f"method={name!r} is a name that settings have already: choose another")
    if not callable(method.run):
        raise BadInput(f"run of method={name!r} is no function of uploads, settings and store")
    if method.settings:
        _check_block(name, method.settings)
    if method.given not in (allowed := get_args(Given)):
        raise BadInput(
            f"given={method.given!r} of method={name!r} is unknown: allowed are {', '.join(allowed)}"
        )
    if family not in FAMILIES:
        raise BadInput(f"family={family!r} of method={name!r} is unknown: allowed are {', '.join(FAMILIES)}")


def _check_dotted(method: Method, known: Collection[str]) -> None:
    """Raise BadInput where a field that depends on a setting names none of those known."""
    for field_name in ("exchanges", "needs_statistics"):
        value = getattr(method, field_name)
        if not isinstance(value, int) and value not in known:
            raise BadInput(
                f"{field_name}={value!r} of method={method.name!r} is neither a number nor a setting"
            )


def _check_block(name: str, block: type[SettingsBlock]) -> None:
    """Raise BadInput for what is no class of settings, or one without valid defaults."""
    if not (isinstance(block, type) and issubclass(block, SettingsBlock)):
        raise BadInput(f"settings of method={name!r} are no subclass of SettingsBlock")
    try:
        block.model_validate(block().model_dump())
    except ValidationError as failure:
        error = failure.errors()[0]
        where = ".".join(map(str, error["loc"]))
        raise BadInput(f"{name}.{where} has no valid default: {error['msg']}") from None


def find(name: str) -> Method:
    """Return the record of a method; BadInput for an unknown name."""
    if name not in METHODS:
        raise BadInput(f"method={name!r} is unknown: allowed are {', '.join(METHODS)}")
    return METHODS[name]


def described(name: str) -> Method:
    """Return the record of a method, or one with the defaults for a name in a table from elsewhere."""
    return METHODS.get(name) or Method(name, run=lambda *_: find(name))  # running it raises BadInput


def in_order(names: Iterable[str]) -> list[str]:
    """Sort methods as tables show them: family by family, each in the order of registration."""
    known = list(METHODS)

    def rank(name: str) -> tuple[int, int]:
        registered = known.index(name) if name in METHODS else len(known)
        return FAMILIES.index(described(name).family), registered

    return sorted(dict.fromkeys(names), key=rank)
