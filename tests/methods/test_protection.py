"""_checks.py: a protection that does not cover all that clients send is refused before any work."""

import pytest

import fedmitr as fm
from fedmitr.methods import METHODS, check_methods

WEIGHTS, SUMS, SMALL = {"client.dp_epsilon": 3.0}, {"statistics.dp_epsilon": 2.0}, {"statistics.smallest": 5}
BOTH = WEIGHTS | SUMS


@pytest.mark.parametrize("method", METHODS)
def test_without_protection_nothing_is_refused(method):
    check_methods([method], fm.Settings.load("smoke", method=method))


@pytest.mark.parametrize(
    "method, changes",
    [
        ("ridge", SUMS),
        ("ridge", BOTH),
        ("fedmitr", WEIGHTS),
        ("fedmitr", BOTH | SMALL),
        ("fedmitr_plus", BOTH),
        ("central", WEIGHTS),
        ("central_ridge", SUMS),
        ("fedftg", SMALL),
    ],
)
def test_what_is_covered_runs(method, changes):
    check_methods([method], fm.Settings.load("smoke", changes, method))


@pytest.mark.parametrize(
    "method, changes, words",
    [
        ("ridge", WEIGHTS, ("client.dp_epsilon=3", "statistics.dp_epsilon")),
        ("fedmitr", SUMS, ("statistics.dp_epsilon=2", "client.dp_epsilon")),
        ("fedmitr_plus", WEIGHTS, ("needs statistics.dp_epsilon",)),
        ("fedmitr_plus", SUMS, ("needs client.dp_epsilon",)),
        ("fedftg", WEIGHTS, ("class histogram", "'fedftg'")),
        ("fedmitr", WEIGHTS | {"ensemble.mode": "class"}, ("class histogram", "ensemble.mode")),
        ("fusefl", WEIGHTS, ("protects one upload", "'fusefl'")),
        ("fusefl", SMALL, ("statistics.smallest=5", "'fusefl'")),
        ("stacking", BOTH, ("protects one upload",)),
        ("fedavg_ridge", SMALL, ("protects one upload",)),
        ("real_images", BOTH, ("protects one upload",)),
        ("fedmitr", WEIGHTS | {"distill.group": 2}, ("distill.group",)),
    ],
)
def test_what_is_not_covered_is_one_line(method, changes, words, one_line):
    with pytest.raises(fm.BadInput) as error:
        check_methods([method], fm.Settings.load("smoke", changes, method))
    one_line(error.value, *words)


@pytest.mark.parametrize("name", ["client.dp_epsilon", "client.dp_clip", "statistics.dp_clip"])
@pytest.mark.parametrize("value", [0, -1, "much"])
def test_values_out_of_range_are_one_line(name, value, one_line):
    with pytest.raises(fm.BadInput) as error:
        fm.Settings.load("smoke", {name: value})
    one_line(error.value, f"{name}={value!r}")


@pytest.mark.parametrize(
    "name, value",
    [("client.dp_delta", 1.0), ("statistics.dp_delta", 0.0), ("statistics.smallest", -1)],
)
def test_limits_are_not_reached(name, value, one_line):
    with pytest.raises(fm.BadInput) as error:
        fm.Settings.load("smoke", {name: value})
    one_line(error.value, name)
