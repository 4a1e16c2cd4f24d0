"""schema.py: what every setting means, and one line for every value out of range."""

import pytest
import yaml

from fedmitr.core.errors import BadInput
from fedmitr.methods import METHODS
from fedmitr.settings import Settings, defaults, fields

FIELDS = fields()


@pytest.mark.parametrize("row", FIELDS, ids=lambda r: r["setting"])
def test_every_setting_says_what_it_means_and_where_its_default_is_from(row):
    assert row["meaning"] and row["source"] and "\n" not in row["meaning"] + row["source"]


def test_every_block_is_there():
    blocks = {name.split(".")[0] for name in defaults()}
    stages = {"task", "partition", "model", "client", "statistics", "ensemble"}
    stages |= {"inversion", "relabel", "distill"}
    methods = {name for name, method in METHODS.items() if method.settings}
    assert blocks == {"seed", "threads", "budget", *stages, *methods}
    rivals = {"fdafl", "fadi", "dense", "co_boosting", "fedftg", "fusefl"}
    assert methods == rivals | {"lda", "fishermix", "fedmitr_plus", "calibrated_ensemble"}


def test_every_method_with_a_generator_has_its_settings():
    shared = {"rounds", "generator_steps", "lr", "latent", "width", "images", "student_steps"}
    shared |= {"student_lr", "kd_temperature", "ce_weight", "calibrate"}
    own = {
        "fdafl": {"batch_size", "one_hot", "activation", "entropy"},
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


def test_published_weights_of_the_other_methods():
    settings, paper = Settings(), Settings.load("paper")
    assert (settings.fdafl.activation, settings.fdafl.entropy) == (0.1, 5.0)
    assert (settings.dense.disagreement, settings.dense.temperature) == (1.0, 3.0)
    boosting = settings.co_boosting
    assert (boosting.hardness, boosting.perturbation, boosting.weight_decay) == (1, 8 / 255, 0.99)
    assert (paper.fedftg.classification, settings.fedftg.diversity, paper.co_boosting.weight_step) == (
        1,
        1,
        0.01,
    )


def test_the_table_of_settings_is_plain_data():
    assert yaml.safe_load(yaml.safe_dump([{k: str(v) for k, v in row.items()} for row in FIELDS]))
    choices = {row["setting"]: row["allowed"] for row in FIELDS}
    assert choices["ensemble.mode"] == "mean_probs, mean_logits, size, class"
    assert choices["budget"] == "equal, own" and choices["threads"] == "≥ 1"
    assert ">" in choices["partition.alpha"] and "≥ 1" in choices["partition.clients"]


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
