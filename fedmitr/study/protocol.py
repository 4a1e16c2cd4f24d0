"""The protocol: what the study runs and how it is judged, in a file that is committed before the first run.

results/protocol.yaml names grounds (a start and a skew, with seeds and methods), panels (cells of one method,
on a ground), claims, the test, and all settings, so that a study under other ones is refused.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import BadInput
from ..core.paths import shipped
from ..core.store import digest, write_text
from ..experiments.compare import parse_seeds
from ..experiments.differences import REFERENCE
from ..methods import METHODS, described, find, in_order
from ..settings import Settings, tuned_values

PROTOCOL = "results/protocol.yaml"
Overrides = dict[str, Any]  # dotted setting -> value


class Part(BaseModel):
    """A part of the study: its seeds, such as 30-49, and the settings that its runs share."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seeds: str
    settings: Overrides = {}


class Ground(Part):
    """A start and a skew, on which methods are compared; methods: all, unless some are named."""

    role: Literal["primary", "secondary"]
    methods: tuple[str, ...] = ()


class Panel(Part):
    """Cells: name -> settings; the first is the one that the others are compared with.

    A cell runs the panel's method, or the one that it names beside its settings, as `method`.
    """

    method: str
    cells: dict[str, Overrides] = Field(min_length=2)

    def method_of(self, cell: str) -> str:
        """Return the method that a cell runs."""
        return self.cells[cell].get("method", self.method)


class Claim(BaseModel):
    """A claim that one method, or cell, is more accurate than others.

    where: grounds, or one panel; better: a method or cell; than: methods or cells, or "rivals": all that take
    one exchange and leave one model, or "images": those of them that make synthetic images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    claim: str
    source: str
    where: tuple[str, ...]
    better: str
    than: tuple[str, ...] | Literal["rivals", "images"]


class Protocol(BaseModel):
    """The protocol of a study.

    level: of the test, two-sided. size: a lead in accuracy that is worth a claim. `freeze_settings` adds the
    rest: methods, all that there are; defaults, every setting of the profile, dotted; tuned, start -> method
    -> settings; rules, a hash of all else, so that nothing is changed once runs are there. Methods and
    settings that come later are no part of the protocol.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    profile: str
    settings: Overrides
    level: float = Field(gt=0, lt=1)
    size: float = Field(ge=0, lt=1)
    grounds: dict[str, Ground]
    panels: dict[str, Panel]
    claims: tuple[Claim, ...]
    methods: tuple[str, ...] = ()
    defaults: Overrides = {}
    tuned: dict[str, dict[str, Overrides]] = {}
    rules: str = ""

    @property
    def parts(self) -> dict[str, Ground | Panel]:
        """Grounds and panels by name."""
        return {**self.grounds, **self.panels}

    def part(self, name: str) -> Ground | Panel:
        """Return a ground or a panel by its name; BadInput for another name."""
        if name not in self.parts:
            raise BadInput(f"part={name!r} is not in the protocol: allowed are {', '.join(self.parts)}")
        return self.parts[name]

    @property
    def primary(self) -> list[str]:
        """Names of the primary grounds, in order."""
        return [name for name, ground in self.grounds.items() if ground.role == "primary"]

    def methods_of(self, ground: Ground) -> list[str]:
        """List the methods of a ground in the order of tables."""
        return in_order(ground.methods or self.methods or shipped_methods())

    def runs_of(self, name: str) -> int:
        """Count the runs of a ground or a panel."""
        part = self.part(name)
        cells = part.cells if isinstance(part, Panel) else self.methods_of(part)
        return len(cells) * len(parse_seeds(part.seeds))


def shipped_methods() -> list[str]:
    """List the methods that come with the package."""
    return [name for name, method in METHODS.items() if method.is_shipped]


def read_protocol(path: Path | None = None) -> Protocol:
    """Read a protocol, by default the one that ships; BadInput, one line, for one that cannot be used."""
    path = path or shipped(PROTOCOL)
    try:
        protocol = Protocol.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"protocol={str(path)!r} cannot be read as YAML") from error
    except ValidationError as failure:
        error = failure.errors()[0]
        where = ".".join(map(str, error["loc"]))
        raise BadInput(f"protocol={str(path)!r}: {where}: {error['msg']}") from None
    _check_names(protocol)
    return protocol


def _check_names(protocol: Protocol) -> None:
    """Raise BadInput for an unknown method, a ground without FedMITR+, a claim about what is not run."""
    if twice := set(protocol.grounds) & set(protocol.panels):
        raise BadInput(f"part={min(twice)!r} is a ground and a panel: allowed is one of them")
    for where, ground in protocol.grounds.items():
        for name in ground.methods:
            find(name)
        if REFERENCE not in protocol.methods_of(ground):
            raise BadInput(f"ground {where!r} lacks {REFERENCE!r}, with which all methods are compared")
    for panel in protocol.panels.values():
        for cell in panel.cells:
            find(panel.method_of(cell))
    for claim in protocol.claims:
        for where in claim.where:
            part = protocol.part(where)
            if isinstance(claim.than, str) and isinstance(part, Panel):
                raise BadInput(
                    f"claim {claim.claim!r}: than={claim.than!r} is for grounds, {where!r} is a panel"
                )
            known = list(part.cells) if isinstance(part, Panel) else protocol.methods_of(part)
            others = others_of(protocol, claim, where)
            if not others:
                raise BadInput(f"claim {claim.claim!r}: than={claim.than!r} names nothing on {where!r}")
            for name in (claim.better, *others):
                if name not in known:
                    raise BadInput(f"claim {claim.claim!r}: {name!r} is not run on {where!r}")


def others_of(protocol: Protocol, claim: Claim, where: str) -> list[str]:
    """Return the methods or cells that a claim says its method or cell to be above, on a ground or panel."""
    if not isinstance(claim.than, str):
        return list(claim.than)
    names = protocol.methods_of(protocol.part(where))
    return rivals(names, claim.better, images=claim.than == "images")


def rivals(names: Sequence[str], but: str, images: bool = False) -> list[str]:
    """Return the methods that a one-shot method is to be above, in the order of tables.

    They take one exchange, leave one model and are no reference; images: and they make synthetic images.
    """
    records = [described(name) for name in in_order(names) if name != but]
    chosen = [r for r in records if r.single_model and r.exchanges == 1 and not r.is_reference]
    return [r.name for r in chosen if not images or r.distils]


def planned(protocol: Protocol) -> pd.DataFrame:
    """List every run of a study, a row each: part, cell, method, seed, and its `Settings`.

    Primary grounds come first, then panels, then secondary grounds; in each, seed by seed. The cell of a
    ground is the method's name.
    """
    rows = []
    for name in dict.fromkeys(chain(protocol.primary, protocol.panels, protocol.grounds)):
        part = protocol.part(name)
        if isinstance(part, Panel):
            cells = [
                (cell, part.method_of(cell), {name: v for name, v in own.items() if name != "method"})
                for cell, own in part.cells.items()
            ]
        else:
            cells = [(method, method, {}) for method in protocol.methods_of(part)]
        shared = protocol.settings | part.settings
        under = [Settings.load(protocol.profile, shared | changes, method) for _, method, changes in cells]
        for seed in parse_seeds(part.seeds):
            for (cell, method, _), settings in zip(cells, under, strict=True):
                rows.append((name, cell, method, seed, settings.model_copy(update={"seed": seed})))
    return pd.DataFrame(rows, columns=["part", "cell", "method", "seed", "run under"])


def flatten(settings: Settings) -> Overrides:
    """Return every setting by its dotted name."""
    flat: Overrides = {}
    for block, values in settings.model_dump(mode="json").items():
        flat |= (
            {f"{block}.{k}": v for k, v in values.items()} if isinstance(values, dict) else {block: values}
        )
    return flat


def settings_now(protocol: Protocol) -> tuple[Overrides, dict[str, dict[str, Overrides]]]:
    """Return what `defaults` and `tuned` of the protocol would be if it was frozen now."""
    flat = flatten(Settings.load(protocol.profile, protocol.settings))
    chosen = [part.settings for part in protocol.parts.values()]
    chosen += [cell for panel in protocol.panels.values() for cell in panel.cells.values()]
    starts = sorted({overrides.get("model.name", flat["model.name"]) for overrides in chosen})
    methods = protocol.methods or shipped_methods()
    found = {s: {m: tuned_values(protocol.profile, s, m) for m in methods} for s in starts}
    return flat, {s: {m: v for m, v in values.items() if v} for s, values in found.items()}


def rules_of(protocol: Protocol) -> str:
    """Return a hash of all but the settings: seeds, grounds, panels, claims, level, size."""
    return digest(protocol.model_dump(mode="json", exclude={"defaults", "tuned", "rules"}))


def check_unchanged(protocol: Protocol) -> None:
    """Raise BadInput, naming the first setting, where the protocol is not, or no more, as it was frozen.

    Settings and methods that did not exist then are passed over.
    """
    if not protocol.rules:
        raise BadInput("protocol has no settings yet: `fedmitr study --freeze` writes them, before any run")
    if rules_of(protocol) != protocol.rules:
        raise BadInput(
            "protocol was changed after it was frozen: allowed are its seeds, parts and claims of then"
        )
    flat, tuned = settings_now(protocol)
    for name, value in protocol.defaults.items():
        if flat.get(name) != value:
            raise BadInput(f"{name}={flat.get(name)!r} is not what the protocol was written with, {value!r}")
    for start in dict.fromkeys([*protocol.tuned, *tuned]):
        was, now = protocol.tuned.get(start, {}), tuned.get(start, {})
        for method in dict.fromkeys([*was, *now]):
            if was.get(method) != now.get(method):
                raise BadInput(
                    f"tuned settings of method={method!r} from {start!r} are {now.get(method)!r}, not what "
                    f"the protocol was written with, {was.get(method)!r}"
                )


def freeze_settings(path: Path, tuned_on: Sequence[int] = ()) -> None:
    """Write all settings of now, and a hash of the rules, into a protocol.

    Raises BadInput where it has them already, for a seed that settings were chosen on (`tuned_on`), and for
    two cells of a panel that would run the same.
    """
    protocol = read_protocol(path)
    if protocol.rules:
        raise BadInput(f"protocol={str(path)!r} has its settings already: it is not changed any more")
    runs = planned(protocol)
    if seen := sorted(set(runs["seed"]) & set(tuned_on)):
        raise BadInput(f"seed={seen[0]} is one that settings were chosen on: allowed are others")
    for part, some in runs.drop_duplicates(["part", "cell"]).groupby("part", sort=False):
        first: dict[tuple[str, Settings], str] = {}
        for cell, method, settings in zip(some["cell"], some["method"], some["run under"], strict=True):
            same = first.setdefault((method, find(method).adapted(settings)), cell)
            if same != cell:
                raise BadInput(f"cells {same!r} and {cell!r} of {part!r} have the same settings")
    flat, tuned = settings_now(protocol)
    text = (
        path.read_text().rstrip() + "\n\n# Written by `fedmitr study --freeze`: every setting of all runs.\n"
    )
    methods = shipped_methods()
    rules = rules_of(protocol.model_copy(update={"methods": tuple(methods)}))
    added = {"rules": rules, "methods": methods, "defaults": flat, "tuned": tuned}
    write_text(text + yaml.safe_dump(added, sort_keys=False, allow_unicode=True), path)
