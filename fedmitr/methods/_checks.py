"""Whether methods can run under given settings: told in one line, before any work."""

from collections.abc import Iterable

from ..core.errors import BadInput
from ..settings import Settings
from ..upload.privacy import noise_multiplier
from ._method import Method, find


def check_methods(names: Iterable[str], settings: Settings) -> None:
    """Raise BadInput for an unknown method, and for one that cannot run under these settings.

    Some need one architecture where clients differ; some read settings otherwise (`adapt`), and those must
    fit, too.
    """
    methods = [find(name) for name in names]
    for method in methods:
        method.adapted(settings)  # BadInput where its own reading of the settings cannot work
        check_protection(method, settings)
    if not settings.mixed:
        return
    differ = f"client.models={list(settings.client.models)} differ from model.name={settings.model.name!r}"
    for method in methods:
        if method.averages:
            raise BadInput(f"method={method.name!r} needs clients of one architecture: {differ}")
        if method.work_under(settings).student_steps and settings.distill.start == "average":
            raise BadInput(
                f"distill.start='average' needs clients of one architecture: {differ}; allowed is 'initial'"
            )


def check_protection(method: Method, settings: Settings) -> None:
    """Raise BadInput where a protection that is on does not cover all that the method's clients send.

    Protections are those of one upload: DP-SGD of weights, noise on sums and counts, smallest counts.
    """
    weights, sums = (settings.client.dp_epsilon, settings.statistics.dp_epsilon)
    on = {"client.dp_epsilon": weights, "statistics.dp_epsilon": sums}
    on = {name: value for name, value in on.items() if value is not None}
    on |= {"statistics.smallest": settings.statistics.smallest} if settings.statistics.smallest else {}
    if not on:
        return
    if sums is not None:
        noise_multiplier("statistics.dp_epsilon", sums, settings.statistics.dp_delta)  # BadInput out of reach
    named = f"{next(iter(on))}={next(iter(on.values()))}"
    if method.given in ("clients", "stages", "images"):
        raise BadInput(f"{named} protects one upload: method={method.name!r} sends more than that")
    if weights is None and sums is None:
        return
    sends = {
        "client.dp_epsilon": method.needs_weights,
        "statistics.dp_epsilon": method.needs_statistics_under(settings),
    }
    for name in (name for name, sent in sends.items() if sent and name not in on):
        raise BadInput(
            f"{named} is not enough: method={method.name!r} needs {name} too, for what else it sends"
        )
    if not method.needs_weights or method.given == "central":
        return
    if settings.uses_counts or (method.needs_counts_under(settings) and not sends["statistics.dp_epsilon"]):
        raise BadInput(
            f"{named} does not protect the class histogram that method={method.name!r} needs under these "
            "settings: allowed are ensemble.mode and inversion.teacher without it"
        )
    if settings.distill.group:
        raise BadInput(f"{named} knows no groups of clients: allowed is distill.group=none")
