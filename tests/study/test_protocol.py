"""protocol.py: what is run and under which settings, and what is refused."""

import pytest
import yaml
from helpers import SMALL_SETTINGS
from small_protocol import METHODS, PROTOCOL

from fedmitr.core.errors import BadInput
from fedmitr.settings import Settings
from fedmitr.study import protocol as module
from fedmitr.study.protocol import check_unchanged, freeze_settings, planned, read_protocol, settings_now


def test_every_run_of_the_protocol_is_planned_once_primary_grounds_first(protocol):
    plan = planned(protocol)
    assert list(dict.fromkeys(plan["part"])) == ["early", "heads", "later"]
    early = plan[plan["part"] == "early"]
    assert sorted(zip(early["seed"], early["method"], strict=True)) == sorted(
        (seed, method) for seed in (30, 31) for method in METHODS
    )
    heads = plan[plan["part"] == "heads"]
    assert heads["cell"].tolist() == ["λ = 1", "λ = 100", "means"] * 2
    assert heads["method"].tolist() == ["ridge", "ridge", "ncm"] * 2
    for run in plan.itertuples(index=False):
        s = run[-1]
        assert s.seed == run.seed and s.task.scenes == 2
        assert s.model.name == ("vit_micro_early" if run.part == "early" else "vit_micro")
        assert s.statistics.ridge == (100 if run.cell == "λ = 100" else 1)
        assert s.statistics.tokens == ("cls" if run.cell == "means" else "both")
        assert s.partition.alpha == (0.5 if run.part == "later" else SMALL_SETTINGS["partition.alpha"])


def test_a_run_is_under_the_values_that_were_tuned_for_its_start_and_a_cell_goes_before_them(
    file, monkeypatch
):
    import fedmitr.settings.load as load

    def tuned(profile, start, method):
        return (
            {"statistics.ridge": 7.0} if (profile, start, method) == ("smoke", "vit_micro", "ridge") else {}
        )

    monkeypatch.setattr(load, "tuned_values", tuned)
    monkeypatch.setattr(module, "tuned_values", tuned)
    freeze_settings(file)
    plan = planned(read_protocol(file))
    found = {(r.part, r.cell): r[-1].statistics.ridge for r in plan.itertuples(index=False)}
    assert found["heads", "λ = 1"] == 7 and found["heads", "λ = 100"] == 100
    assert found["early", "ridge"] == found["later", "ncm"] == 1
    assert read_protocol(file).tuned == {
        "vit_micro": {"ridge": {"statistics.ridge": 7.0}},
        "vit_micro_early": {},
    }


def test_settings_that_have_changed_are_refused_by_name(protocol, one_line):
    check_unchanged(protocol)
    other = protocol.model_copy(update={"defaults": protocol.defaults | {"distill.lr": 1.0}})
    with pytest.raises(BadInput) as error:
        check_unchanged(other)
    one_line(error.value, "distill.lr", "1.0", str(protocol.defaults["distill.lr"]))


def test_tuned_values_that_have_changed_are_refused_by_method(protocol, one_line):
    other = protocol.model_copy(update={"tuned": {"vit_micro": {"dense": {"dense.lr": 0.5}}}})
    with pytest.raises(BadInput) as error:
        check_unchanged(other)
    one_line(error.value, "'dense'", "vit_micro", "0.5")


CHANGES = {
    "level": lambda p: p.model_copy(update={"level": 0.5}),
    "size": lambda p: p.model_copy(update={"size": 0.2}),
    "a ground's seeds": lambda p: p.model_copy(
        update={"grounds": p.grounds | {"early": p.grounds["early"].model_copy(update={"seeds": "30-33"})}}
    ),
    "a claim": lambda p: p.model_copy(update={"claims": p.claims[1:]}),
    "a panel": lambda p: p.model_copy(update={"panels": {}}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_rules_that_have_changed_are_refused(case, protocol, one_line):
    with pytest.raises(BadInput) as error:
        check_unchanged(CHANGES[case](protocol))
    one_line(error.value, "changed after it was frozen")


def test_seeds_that_settings_were_chosen_on_are_refused(file, one_line):
    with pytest.raises(BadInput) as error:
        freeze_settings(file, tuned_on=[7, 31])
    one_line(error.value, "seed=31")


def test_two_cells_of_one_panel_that_would_run_the_same_are_refused(tmp_path, one_line):
    tree = yaml.safe_load(yaml.safe_dump(PROTOCOL))
    tree["panels"]["heads"]["cells"]["λ = 100"] = {"statistics.ridge": 1.0}
    path = tmp_path / "same.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    with pytest.raises(BadInput) as error:
        freeze_settings(path)
    one_line(error.value, "λ = 1", "λ = 100", "same settings")


def test_a_setting_that_is_new_since_then_is_passed_over(protocol):
    older = {name: value for name, value in protocol.defaults.items() if name != "distill.lr"}
    check_unchanged(protocol.model_copy(update={"defaults": older}))


def test_methods_that_came_later_are_no_part_of_the_protocol(file, monkeypatch):
    tree = yaml.safe_load(file.read_text())
    del tree["grounds"]["later"]["methods"]  # all that there are
    file.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    then = [name for name in module.shipped_methods() if name != "dense"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "shipped_methods", lambda: then)
        freeze_settings(file)
    protocol = read_protocol(file)
    assert set(planned(protocol).query("part == 'later'")["method"]) == set(then)
    tuned = {("vit_micro", "dense"): {"dense.rounds": 3}}
    monkeypatch.setattr(module, "tuned_values", lambda _, *where: tuned.get(where, {}))
    check_unchanged(protocol)
    tuned["vit_micro", "ridge"] = {"statistics.ridge": 3.0}
    with pytest.raises(BadInput, match="'ridge'"):
        check_unchanged(protocol)


def test_a_protocol_without_settings_does_not_run_and_one_with_them_is_not_written_again(file, one_line):
    with pytest.raises(BadInput, match="--freeze"):
        check_unchanged(read_protocol(file))
    freeze_settings(file)
    before = file.read_bytes()
    with pytest.raises(BadInput) as error:
        freeze_settings(file)
    one_line(error.value, "already")
    assert file.read_bytes() == before


def test_frozen_settings_are_all_settings_of_the_profile_as_yaml_reads_them_again(file):
    flat, _ = settings_now(read_protocol(file))
    freeze_settings(file)
    tree = yaml.safe_load(file.read_text())
    assert tree["defaults"] == flat == read_protocol(file).defaults
    assert Settings.load("laptop", flat).model_dump(mode="json") == Settings.load(
        "smoke", PROTOCOL["settings"]
    ).model_dump(mode="json")


BAD = {
    "not yaml": (lambda p: "[", "YAML"),
    "unknown field": (lambda p: p | {"colour": 1}, "colour"),
    "unknown method of a cell": (
        lambda p: p["panels"]["heads"]["cells"]["means"].update(method="nope") or p,
        "nope",
    ),
    "unknown method": (lambda p: p["grounds"]["later"].update(methods=["nope"]) or p, "nope"),
    "ground without FedMITR+": (lambda p: p["grounds"]["later"].update(methods=["ncm"]) or p, "fedmitr_plus"),
    "claim about another part": (lambda p: p["claims"][0].update(where=["nowhere"]) or p, "nowhere"),
    "claim about what is not run": (lambda p: p["claims"][2].update(than=["dense"]) or p, "dense"),
    "rivals on a panel": (lambda p: p["claims"][3].update(than="rivals") or p, "is a panel"),
    "a claim over nothing": (lambda p: p["claims"][2].update(than=[]) or p, "names nothing"),
    "one name twice": (lambda p: p["panels"].update(early=p["panels"]["heads"]) or p, "a ground and a panel"),
    "panel of one cell": (lambda p: p["panels"]["heads"].update(cells={"a": {}}) or p, "cells"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_protocol_that_cannot_be_used_is_refused_in_one_line(case, tmp_path, one_line):
    change, word = BAD[case]
    made = change(yaml.safe_load(yaml.safe_dump(PROTOCOL)))
    path = tmp_path / "bad.yaml"
    path.write_text(made if isinstance(made, str) else yaml.safe_dump(made))
    with pytest.raises(BadInput) as error:
        read_protocol(path)
    one_line(error.value, word)
