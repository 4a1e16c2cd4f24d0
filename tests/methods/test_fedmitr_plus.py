"""fedmitr_plus.py: FedMITR with each addition a switch; with all of them off it is FedMITR bit for bit."""

import importlib

import pytest
import torch
from helpers import make_upload, same, with_statistics
from tiny_runs import given, run, tiny

import fedmitr as fm
from fedmitr.core.store import Store
from fedmitr.methods import METHODS
from fedmitr.methods._statistics import ridge_classifier
from fedmitr.methods.fedmitr_plus import FedmitrPlusSettings, with_additions
from fedmitr.server.joint import EnsembleWithStatistics
from fedmitr.settings import PROFILES, Settings
from fedmitr.vision.features import FeatureClassifier

pipeline = importlib.import_module("fedmitr.methods.fedmitr")  # the package's name for it is the method
OFF = {
    "owners": False,
    "class_weights": False,
    "statistics": False,
    "affine": 0.0,
    "textures": False,
    "offsets": 0.0,
    "label_ce": 0.0,
    "half_soft": 0.0,
    "regions": False,
    "views": 0,
    "closed_form": False,
    "start_share": 0.0,
    "whole_images": False,
}
SWITCHES = {  # switch and its value: the one setting that it changes, and what to
    ("owners", True): ("inversion.teacher", "owners"),
    ("class_weights", True): ("ensemble.mode", "class"),
    ("affine", 0.35): ("inversion.augment", 0.35),
    ("textures", True): ("distill.background", "texture"),
    ("offsets", 0.1): ("distill.calibrate", 0.1),
    ("label_ce", 0.4): ("distill.ce_weight", 0.4),
    ("half_soft", 0.25): ("relabel.foreground_soft", 0.25),
    ("regions", True): ("statistics.tokens", "regions"),
    ("views", 3): ("statistics.views", 3),
    ("whole_images", True): ("relabel.mode", "none"),
}
PUBLISHED = {
    "ensemble.mode": "mean_logits",
    "inversion.teacher": "ensemble",
    "inversion.augment": 0.0,
    "distill.background": "keep",
    "distill.calibrate": 0.0,
    "distill.ce_weight": 0.0,
    "relabel.foreground_soft": 0.0,
    "statistics.tokens": "both",
    "statistics.views": 0,
    "relabel.mode": "relabel",
}
DEFAULT_OFF = {"textures", "offsets", "label_ce", "half_soft"}


def plus(base=None, **switches):
    """A tiny run's settings with these switches, all others off."""
    own = {f"fedmitr_plus.{name}": value for name, value in (OFF | switches).items()}
    return (base or tiny()).changed(own)


def flat(settings):
    return {
        f"{block}.{name}": value
        for block, values in settings.model_dump().items()
        if isinstance(values, dict)
        for name, value in values.items()
    }


def equal(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.fixture(scope="module")
def two():
    """Clients that share class 2 alone; nobody holds a 9."""
    counts = [(9, 8, 7, 0, 0, 0, 0, 0, 0, 0), (0, 0, 2, 4, 6, 8, 3, 1, 1, 0)]
    return [make_upload(k, c, side=12) for k, c in enumerate(counts)]


def test_every_addition_has_a_switch():
    assert set(OFF) | {"student_lr"} == set(FedmitrPlusSettings.model_fields)
    assert {name for name, _ in SWITCHES} == set(OFF) - {"statistics", "closed_form", "start_share"}
    assert {name for name, _ in SWITCHES.values()} == set(PUBLISHED)


@pytest.mark.parametrize("profile", PROFILES)
def test_fedmitr_has_none_of_the_additions_in_any_profile(profile):
    settings = Settings.load(profile)
    assert METHODS["fedmitr"].adapted(settings) is settings
    assert {name: flat(settings)[name] for name in PUBLISHED} == PUBLISHED
    assert METHODS["fedmitr"].sent_under(settings) == ["weights"]
    assert METHODS["fedmitr_plus"].sent_under(settings) == ["weights", "class histogram", "statistics"]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch[0])
def test_a_switch_changes_the_setting_that_it_names_and_no_other(switch):
    (name, value), (setting, wanted) = switch, SWITCHES[switch]
    before = plus(**{name: value})
    after = with_additions(before)
    changed = {k: v for k, v in flat(after).items() if flat(before)[k] != v}
    assert changed == {setting: wanted}


def test_with_all_switches_off_settings_are_those_of_the_run():
    assert with_additions(plus()) == plus()
    own = tiny(distill__ce_weight=0.7, ensemble__mode="size", relabel__foreground_soft=0.2)
    assert with_additions(plus(own)) == plus(own)  # what the run itself says stays


def test_by_default_all_are_on_but_those_for_students_that_start_from_the_average():
    found = flat(with_additions(Settings()))
    defaults = FedmitrPlusSettings()
    assert {name for name in OFF if not getattr(defaults, name)} == DEFAULT_OFF
    for (name, _), (setting, value) in SWITCHES.items():
        own = getattr(defaults, name)
        assert found[setting] == (
            PUBLISHED[setting] if name in DEFAULT_OFF else value if own is True else own
        )


def test_with_all_switches_off_it_is_fedmitr_bit_for_bit_and_nothing_is_made_anew(two, tmp_path, monkeypatch):
    store, settings = Store(tmp_path), plus()
    theirs = run("fedmitr", two, settings, store)
    ours = run("fedmitr_plus", two, settings, Store(tmp_path / "another"))
    assert equal(ours.models[0], theirs.models[0]) and same(ours.synthetic, theirs.synthetic)
    for name in ("invert", "distill"):
        monkeypatch.setattr(pipeline, name, lambda *_, **__: pytest.fail("made anew"))
    assert equal(run("fedmitr_plus", two, settings, store).models[0], theirs.models[0])


ALONE = [switch for switch in SWITCHES if switch[0] not in ("regions", "views")]  # these two are of sums


@pytest.mark.parametrize("switch", [*ALONE, ("statistics", True)], ids=lambda switch: switch[0])
def test_every_switch_alone_gives_another_model(switch, two, tmp_path):
    name, value = switch
    theirs = run("fedmitr", two, tiny(), Store(tmp_path))
    ours = run("fedmitr_plus", two, plus(**{name: value}), Store(tmp_path))
    assert not equal(ours.models[0], theirs.models[0])
    anew = name in ("owners", "class_weights", "affine")  # the others come after inversion
    assert same(ours.synthetic, theirs.synthetic) != anew


@pytest.mark.parametrize("switch", [("regions", True), ("closed_form", True)], ids=str)
def test_switches_of_the_sums_give_another_model_where_sums_are_sent(switch, two, tmp_path):
    settings = plus(statistics=True)
    name, value = switch
    before = run("fedmitr_plus", two, settings, Store(tmp_path))
    after = run("fedmitr_plus", two, plus(statistics=True, **{name: value}), Store(tmp_path))
    assert same(after.synthetic, before.synthetic)
    state = after.models[0].state_dict()
    if name == "closed_form":
        assert isinstance(after.models[0], FeatureClassifier) and state["head.weight"].shape == (10, 192)
    else:
        assert not equal(after.models[0], before.models[0])
    without = run("fedmitr_plus", two, plus(**{name: value}), Store(tmp_path)).models[0]
    assert equal(without, run("fedmitr", two, tiny(), Store(tmp_path)).models[0])


def test_the_student_of_the_closed_form_has_a_rate_of_its_own():
    settings = plus(statistics=True, closed_form=True, student_lr=3e-5)
    found, before = flat(with_additions(settings)), flat(with_additions(plus(statistics=True)))
    changed = {name: value for name, value in found.items() if before[name] != value}
    own = ("fedmitr_plus.closed_form", "fedmitr_plus.student_lr")
    assert {k: v for k, v in changed.items() if k not in own} == {
        "distill.start": "statistics",
        "distill.lr": 3e-5,
    }


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("method", ["fedmitr_plus", "textures", "real_images"])
def test_the_finished_student_lies_between_its_start_and_where_training_led(share, method, two, tmp_path):
    def model(**more):
        switches = {"statistics": True, "closed_form": True, "whole_images": True} | more
        return run(method, two, plus(**switches), Store(tmp_path)).models[0].state_dict()

    trained, found = model(), model(start_share=share)
    start = ridge_classifier(given(method, two, plus(statistics=True)), plus()).state_dict()
    start |= {name: 10 * value for name, value in start.items() if name.startswith("head")}
    moved = 0
    for name, value in found.items():
        wanted = share * start[name].double() + (1 - share) * trained[name].double()
        assert torch.allclose(value.double(), wanted, rtol=1e-5, atol=1e-6), name
        moved += not torch.equal(trained[name], start[name])
    assert moved > 10


def test_a_student_that_starts_from_the_average_is_not_moved_back(two, tmp_path):
    whole = run("fedmitr_plus", two, plus(statistics=True), Store(tmp_path)).models[0]
    other = run("fedmitr_plus", two, plus(statistics=True, start_share=0.5), Store(tmp_path)).models[0]
    assert equal(whole, other)


# What clients send.


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("counted", [{}, {"owners": True}, {"class_weights": True}])
def test_what_clients_send_follows_the_switches(counted, statistics):
    settings, record = plus(statistics=statistics, **counted), METHODS["fedmitr_plus"]
    sent = ["weights", *["class histogram"] * bool(counted), *["statistics"] * statistics]
    assert record.sent_under(settings) == sent
    assert record.needs_counts_under(settings) == bool(counted)
    assert record.needs_statistics_under(settings) == statistics
    for other in ("textures", "real_images"):
        assert METHODS[other].needs_statistics_under(settings) == statistics


def test_without_the_switch_statistics_that_came_anyhow_are_not_used(two, tmp_path):
    informed = [with_statistics(u, "both") for u in two]
    plain = METHODS["fedmitr_plus"](two, plus(), Store(tmp_path)).models[0]
    assert equal(METHODS["fedmitr_plus"](informed, plus(), Store(tmp_path)).models[0], plain)


@pytest.mark.parametrize("some", [[0], [1], [0, 1]])
def test_with_the_switch_uploads_without_statistics_are_one_line(some, two, tmp_path, one_line):
    informed = [with_statistics(u, "both") for u in two]
    spoilt = [u.without_statistics() if k in some else u for k, u in enumerate(informed)]
    with pytest.raises(fm.BadInput) as error:
        METHODS["fedmitr_plus"](spoilt, plus(statistics=True), Store(tmp_path))
    one_line(error.value, f"client {some[0]}", "has no statistics")


# Statistics and the store.


def stored(store, stage):
    return {path.name for path in (store.root / stage).iterdir()}


def test_images_are_the_same_with_and_without_statistics_and_are_made_once(two, tmp_path, monkeypatch):
    store = Store(tmp_path)
    without = run("fedmitr_plus", two, plus(owners=True), store)
    kept = stored(store, "synthetic")
    monkeypatch.setattr(pipeline, "invert", lambda *_, **__: pytest.fail("inverted anew"))
    having = run("fedmitr_plus", two, plus(owners=True, statistics=True), store)
    assert same(having.synthetic, without.synthetic) and stored(store, "synthetic") == kept
    assert len(stored(store, "global")) == 2 and not equal(having.models[0], without.models[0])


@pytest.mark.parametrize(
    "change, anew",
    [
        ({}, False),
        ({"statistics.weight": 3.0}, True),
        ({"statistics.ridge": 3.0}, True),
        ({"statistics.tokens": "cls"}, True),
        ({"lda.shrinkage": 0.3}, False),
    ],
    ids=str,
)
def test_a_student_of_other_statistics_is_another_student(change, anew, two, tmp_path):
    settings, record = plus(statistics=True), METHODS["fedmitr_plus"]
    keys = [
        pipeline.distill_key(given("fedmitr_plus", two, s), record.adapted(s))
        for s in (settings, settings.changed(change))
    ]
    assert (keys[0] != keys[1]) == anew
    assert pipeline.distill_key(two, plus()) == pipeline.distill_key(two, plus().changed(change))


def test_the_teacher_joins_the_ensemble_of_the_runs_mode_and_ridge(two, tmp_path):
    settings = with_additions(plus(statistics=True, class_weights=True, base=tiny(statistics__weight=4.0)))
    teacher = pipeline.build_teacher([with_statistics(u, "both") for u in two], settings)
    assert isinstance(teacher, EnsembleWithStatistics) and teacher.weight == 4.0
    assert teacher.ensemble.mode == "class" and teacher.classifier.tokens == settings.statistics.tokens
    assert pipeline.build_teacher(two, with_additions(plus(class_weights=True))).mode == "class"


# In groups.


def test_groups_of_clients_add_up_their_statistics(two, tmp_path):
    third = make_upload(2, (1, 0, 0, 0, 0, 3, 5, 2, 1, 0), side=12)
    settings = plus(tiny(distill__group=2), statistics=True, owners=True)
    informed = given("fedmitr_plus", [*two, third], settings)
    adapted = METHODS["fedmitr_plus"].adapted(settings)
    made, _ = pipeline.in_groups(informed, adapted, Store(tmp_path))
    assert [u.checked().size for u in made] == [49, 12] and made[1] is informed[2]
    total = informed[0].statistics + informed[1].statistics
    assert torch.equal(made[0].statistics.gram, total.gram) and made[0].features == informed[0].features
    assert made[0].statistics.counts.tolist() == list(made[0].class_counts)
    whole = METHODS["fedmitr_plus"](informed, settings, Store(tmp_path))
    second = METHODS["fedmitr_plus"](made, settings.changed({"distill.group": None}), Store(tmp_path))
    assert equal(whole.models[0], second.models[0])
