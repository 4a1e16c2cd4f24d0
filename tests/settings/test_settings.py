"""settings.py: names, ranges, profiles, and one line for everything that is wrong."""

import pytest
import yaml

import fedmitr.methods
from fedmitr.core.errors import BadInput
from fedmitr.methods import METHODS
from fedmitr.settings import PROFILES, Settings, defaults, fields, parse_assignment, read_profile

FIELDS = fields()


@pytest.mark.parametrize("row", FIELDS, ids=lambda r: r["setting"])
def test_every_setting_says_what_it_means_and_where_its_default_is_from(row):
    assert row["meaning"] and row["source"] and "\n" not in row["meaning"] + row["source"]


def test_every_block_of_the_rooms_is_there():
    blocks = {name.split(".")[0] for name in defaults()}
    rooms = {"task", "partition", "model", "client", "ensemble", "inversion", "relabel", "distill"}
    methods = {"fdafl", "fadi", "dense", "co_boosting", "fedftg", "fusefl"}
    assert blocks == {"seed", "threads", "budget", *rooms, *methods}
    assert methods < set(METHODS) and tuple(fedmitr.methods.METHODS) == METHODS


def test_every_method_with_a_generator_has_its_settings():
    shared = {"rounds", "generator_steps", "lr", "latent", "width", "images", "student_steps"}
    shared |= {"student_lr", "ce_weight", "calibrate"}
    own = {
        "fdafl": {"batch_size", "activation", "entropy"},
        "dense": {"disagreement", "temperature"},
        "co_boosting": {
            "disagreement",
            "temperature",
            "hardness",
            "perturbation",
            "weight_step",
            "weight_decay",
        },
        "fedftg": {"batch_size", "classification", "diversity"},
    }
    for block, names in own.items():
        found = {n.split(".")[1] for n in defaults() if n.split(".")[0] == block}
        assert found == shared | names


def test_published_weights_of_the_rivals():
    settings = Settings()
    assert (settings.fdafl.activation, settings.fdafl.entropy) == (0.1, 5.0)
    assert (settings.dense.disagreement, settings.dense.temperature) == (1.0, 3.0)
    ours = settings.co_boosting
    assert (ours.hardness, ours.perturbation, ours.weight_decay) == (1, 8 / 255, 0.99)
    assert (settings.fedftg.classification, settings.fedftg.diversity) == (1.0, 1.0)


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


# One line, naming the setting, for every wrong value.

WRONG = [
    ("partition.alpha", 0),
    ("partition.alpha", -0.1),
    ("partition.alpha", float("nan")),
    ("partition.alpha", float("inf")),
    ("partition.alpha", "wide"),
    ("partition.clients", 0),
    ("partition.clients", -3),
    ("partition.clients", 2.5),
    ("partition.clients", None),
    ("partition.scheme", "pathological"),
    ("partition.min_size", 0),
    ("task.name", "imagenet"),
    ("task.clutter", 1.5),
    ("task.test", 1.0),
    ("task.scale", [0.5]),
    ("model.image_size", 0),
    ("model.image_size", "large"),
    ("model.pretrained", "perhaps"),
    ("client.epochs", 0),
    ("client.lr", 0),
    ("client.lr", "fast\nslow"),
    ("client.label_smoothing", 1.0),
    ("client.optimizer", "lion"),
    ("ensemble.mode", "median"),
    ("inversion.images", 0),
    ("inversion.iterations", "many"),
    ("inversion.stop_at", 20),
    ("inversion.stop_at", ["a"]),
    ("inversion.stop_ratio", [0.3, 1.0, 0.3, 0.3]),
    ("inversion.stop_ratio", [0.3, 0.0, 0.3, 0.3]),
    ("inversion.stop_ratio", [0.3, -0.2, 0.3, 0.3]),
    ("inversion.betas", [0.5]),
    ("inversion.jitter", 0.5),
    ("inversion.tv", float("nan")),
    ("inversion.background", "blue"),
    ("relabel.mode", "hard"),
    ("relabel.temperature", 0),
    ("distill.steps", 0),
    ("distill.temperature", -1),
    ("distill.start", "random"),
    ("client.fedprox", -0.1),
    ("client.fedprox", float("nan")),
    ("fadi.rounds", 0),
    ("fadi.competition", -1),
    ("fdafl.batch_size", 0),
    ("dense.width", 0),
    ("dense.temperature", 0),
    ("dense.generator_steps", 1.5),
    ("co_boosting.hardness", -1),
    ("co_boosting.perturbation", -0.01),
    ("co_boosting.weight_decay", 1.1),
    ("fedftg.lr", 0),
    ("fedftg.diversity", float("inf")),
    ("fusefl.stages", 0),
    ("fusefl.adaptor", "max"),
    ("budget", "free"),
    ("budget", None),
    ("threads", 0),
    ("threads", "all"),
    ("seed", -1),
    ("seed", "one"),
]


@pytest.mark.parametrize("name, value", WRONG, ids=lambda v: repr(v).replace("\\n", ""))
def test_a_value_out_of_range_is_one_line_naming_the_setting(name, value, one_line):
    with pytest.raises(BadInput) as error:
        Settings.load("laptop", {name: value})
    one_line(error.value, name)


@pytest.mark.parametrize(
    "stops, words",
    [
        ({"inversion.stop_at": [20, 120, 130, 140]}, ("stop_at=[20, 120, 130, 140]", "iterations=120")),
        ({"inversion.stop_at": [20, 40, 60, 120]}, ("stop_at", "iterations=120")),
        ({"inversion.stop_at": [0, 40, 60, 80]}, ("stop_at=[0, 40, 60, 80]",)),
        ({"inversion.stop_at": [40, 20, 60, 80]}, ("stop_at=[40, 20, 60, 80]", "rise")),
        ({"inversion.stop_at": [40, 40, 60, 80]}, ("stop_at=[40, 40, 60, 80]", "rise")),
        ({"inversion.stop_at": [20, 40]}, ("stop_ratio", "4", "2")),
        ({"inversion.stop_ratio": []}, ("stop_ratio", "0", "4")),
    ],
)
def test_stops_that_do_not_fit_the_run_are_one_line(stops, words, one_line):
    fixed = {"inversion.iterations": 120, "inversion.stop_at": [20, 40, 60, 80]}
    with pytest.raises(BadInput) as error:
        Settings.load("laptop", fixed | {"inversion.stop_ratio": [0.3] * 4} | stops)
    one_line(error.value, "inversion", *words)


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


def test_the_table_of_settings_is_plain_data():
    assert yaml.safe_load(yaml.safe_dump([{k: str(v) for k, v in row.items()} for row in FIELDS]))
    choices = {row["setting"]: row["allowed"] for row in FIELDS}
    assert choices["ensemble.mode"] == "mean_probs, mean_logits, size, class"
    assert choices["budget"] == "equal, own" and choices["threads"] == "≥ 1"
    assert ">" in choices["partition.alpha"] and "≥ 1" in choices["partition.clients"]
