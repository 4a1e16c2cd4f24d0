"""load.py: the ways to set settings, dotted names, profiles, and blocks that methods add."""

import pickle
import warnings

import pytest

from fedmitr.core.errors import BadInput
from fedmitr.settings import (
    PROFILES,
    Settings,
    SettingsBlock,
    add_block,
    defaults,
    fields,
    parse_assignment,
    read_profile,
    setting,
)


def value_of(settings, name):
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def test_dotted_names_lead_to_the_defaults():
    settings = Settings()
    for name, default in defaults().items():
        assert value_of(settings, name) == default, name


def test_settings_survive_a_round_trip_through_dotted_names():
    settings = Settings.load("paper", {"partition.alpha": 0.7, "seed": 3, "inversion.betas": [0.1, 0.2]})
    flat = {name: value_of(settings, name) for name in defaults()}
    assert Settings.load("smoke", flat) == settings


def test_settings_survive_a_round_trip_through_json():
    settings = Settings.load("smoke")
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_an_override_changes_that_setting_alone():
    plain, other = Settings.load("smoke"), Settings.load("smoke", {"distill.steps": 7})
    changed = [n for n in defaults() if value_of(plain, n) != value_of(other, n)]
    assert changed == ["distill.steps"] and other.distill.steps == 7


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValueError):
        Settings().seed = 3


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_and_says_what_its_file_says(profile):
    settings = Settings.load(profile)
    for name, value in flat(read_profile(profile)):
        found = value_of(settings, name)
        assert (list(found) if isinstance(found, tuple) else found) == value


def flat(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_the_paper_profile_has_the_published_inversion():
    inversion = Settings.load("paper").inversion
    assert (inversion.iterations, inversion.lr, inversion.betas) == (4000, 0.25, (0.5, 0.99))
    assert inversion.stop_at == (50, 100, 200, 300) and inversion.stop_ratio == (0.3,) * 4
    assert inversion.tv == 1e-4 and inversion.flip


# Changed settings.


CHANGES = [
    {},
    {"seed": 3},
    {"partition.alpha": 0.7, "distill.steps": 9},
    {"inversion.stop_at": [2], "inversion.stop_ratio": [0.5]},
    {"client.models": ["vit_micro", "vit_micro_deep"], "model.image_size": None},
    {"fusefl.stages": 3, "task.scale": (0.3, 0.6)},
]


@pytest.mark.parametrize("overrides", CHANGES, ids=str)
def test_changed_settings_are_those_that_were_loaded_so(overrides):
    start = {"partition.clients": 3, "distill.steps": 7}
    before = Settings.load("smoke", start)
    assert before.changed(overrides) == Settings.load("smoke", start | overrides)
    assert before == Settings.load("smoke", start)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("partition.beta", 1, ("'partition.beta'", "partition.alpha")),
        ("partition", {"alpha": 1}, ("'partition'",)),
        ("nothing", 1, ("'nothing'", "partition")),
        ("partition.alpha", -1, ("partition.alpha=-1",)),
        ("seed", "one", ("seed='one'",)),
        ("task.name", "imagenet", ("task.name='imagenet'", "digits")),
        ("inversion.iterations", 5, ("inversion", "iterations=5")),
        ("distill.per_class", 2, ("distill.per_class=2", "ensemble.mode='class'")),
    ],
)
def test_changes_that_are_unknown_or_out_of_range_are_one_line(name, value, words, one_line):
    with pytest.raises(BadInput) as error:
        Settings.load("smoke", {"ensemble.mode": "size"}).changed({name: value})
    one_line(error.value, *words)


# Blocks that methods add.


class Extra(SettingsBlock):
    """The settings of a method of your own."""

    depth: int = setting(2, "how deep", "a paper", ge=1)
    rates: tuple[float, float] = setting((0.5, 1.0), "two rates")


BEFORE = Settings.load("smoke", {"seed": 5})


@pytest.fixture
def extra():
    """The block `extra`, taken back after the test."""
    add_block("extra", Extra)
    yield
    del Settings.model_fields["extra"], Settings.__annotations__["extra"]
    delattr(Settings, "extra")
    Settings.model_rebuild(force=True)


def test_a_new_block_is_settable_and_listed(extra):
    assert defaults()["extra.depth"] == 2 and defaults()["extra.rates"] == (0.5, 1.0)
    (row,) = [row for row in fields() if row["setting"] == "extra.depth"]
    assert (row["allowed"], row["meaning"], row["source"]) == ("≥ 1", "how deep", "a paper")
    settings = Settings.load("smoke", {"extra.depth": 3})
    assert settings.extra == Extra(depth=3) and settings != Settings.load("smoke")
    assert settings.changed({"extra.rates": [0, 1]}).extra == Extra(depth=3, rates=(0, 1))


def test_values_of_a_new_block_are_checked(extra, one_line):
    for name, value in (("extra.depth", 0), ("extra.width", 1), ("extra.rates", [1])):
        with pytest.raises(BadInput) as error:
            Settings.load("smoke", {name: value})
        one_line(error.value, name)


def test_settings_with_a_new_block_can_be_sent(extra):
    settings = Settings.load("smoke", {"extra.depth": 3})
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_settings_from_before_a_new_block_have_its_defaults(extra):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settings in (BEFORE, pickle.loads(pickle.dumps(BEFORE)), BEFORE.model_copy(update={"seed": 5})):
            assert settings.extra == Extra() and settings.seed == 5
            assert settings.changed({}) == Settings.load("smoke", {"seed": 5})
            assert settings.changed({"extra.depth": 4}).extra.depth == 4


def test_a_block_of_a_known_name_takes_its_place(extra):
    class Other(SettingsBlock):
        depth: float = setting(0.25, "how deep")

    add_block("extra", Other)
    assert Settings.load("smoke").extra.depth == 0.25
    assert "extra.rates" not in defaults()


def test_blocks_are_taken_back():
    assert "extra.depth" not in defaults() and not hasattr(Settings(), "extra")


# Reading key=value.


@pytest.mark.parametrize(
    "text, expected",
    [
        ("client.lr=1e-3", ("client.lr", 0.001)),
        ("client.lr=0.5", ("client.lr", 0.5)),
        ("distill.steps=500", ("distill.steps", 500)),
        ("inversion.stop_at=[50,100]", ("inversion.stop_at", [50, 100])),
        ("inversion.stop_ratio=[3e-1, 0.3]", ("inversion.stop_ratio", [0.3, 0.3])),
        ("inversion.stop_at=[]", ("inversion.stop_at", [])),
        ("inversion.flip=true", ("inversion.flip", True)),
        ("model.checkpoint=null", ("model.checkpoint", None)),
        ("model.checkpoint=a=b.safetensors", ("model.checkpoint", "a=b.safetensors")),
        (" model.name = deit_tiny_patch16_224 ", ("model.name", "deit_tiny_patch16_224")),
    ],
)
def test_key_value_pairs_are_read_as_a_reader_means_them(text, expected):
    found = parse_assignment(text)
    assert found == expected and type(found[1]) is type(expected[1])


def test_exponents_reach_the_settings_as_numbers():
    settings = Settings.load("smoke", dict([parse_assignment("inversion.tv=1e-3")]))
    assert settings.inversion.tv == 1e-3


@pytest.mark.parametrize("text", ["distill.steps", "", "client.lr=[1,", "client.lr={a: ]"])
def test_what_is_no_key_value_pair_is_one_line(text, one_line):
    with pytest.raises(BadInput) as error:
        parse_assignment(text)
    one_line(error.value, "--set")


# Unknown names.


@pytest.mark.parametrize(
    "name", ["alpha", "partition.beta", "partition", "nothing.here", "", "seed.x", "partition.", "dense"]
)
def test_an_unknown_setting_is_one_line_that_lists_what_is_known(name, one_line):
    with pytest.raises(BadInput) as error:
        Settings.load("laptop", {name: 1})
    near = name.split(".")[0] if name.startswith(("seed", "dense")) else "partition"
    one_line(error.value, repr(name), near)


@pytest.mark.parametrize("profile", ["huge", "", "../laptop", "laptop.yaml"])
def test_an_unknown_profile_is_one_line(profile, one_line):
    with pytest.raises(BadInput) as error:
        Settings.load(profile)
    one_line(error.value, f"profile={profile!r}", *PROFILES)
