"""fedmitr.py: clients distilled in groups (`distill.group`), and classes that nobody holds."""

import importlib

import pytest
import torch
from helpers import make_upload
from tiny_runs import tiny

from fedmitr.core.store import Store
from fedmitr.server.ensemble import held_classes

pipeline = importlib.import_module("fedmitr.methods.fedmitr")  # the package's name for it is the method


@pytest.fixture(scope="module")
def five():
    """Class 9 is nobody's; the first two hold 0 to 3, the next two 4 to 7, the last 8."""
    held = [(0, 1), (2, 3), (4, 5), (6, 7), (8,)]
    return [
        make_upload(k, tuple(3 if y in own else 0 for y in range(10)), side=12) for k, own in enumerate(held)
    ]


def test_images_are_made_of_held_classes_alone(five, tmp_path):
    assert held_classes(five).tolist() == list(range(9))
    assert held_classes([u.without_counts() for u in five]).tolist() == list(range(10))
    made = pipeline.synthetic_set(five[:2], tiny(), Store(tmp_path))
    assert set(made.labels.tolist()) <= {0, 1, 2, 3}
    assert torch.bincount(made.labels).max() <= 2


def test_a_group_is_one_client_that_holds_what_its_clients_hold(five, tmp_path):
    settings, store = tiny(distill__group=2), Store(tmp_path)
    made, seconds = pipeline.in_groups(five, settings, store)
    assert [u.client for u in made] == [0, 2, 4] and [u.size for u in made] == [12, 12, 3]
    assert made[0].class_counts == (3, 3, 3, 3, 0, 0, 0, 0, 0, 0)
    assert made[2] is five[4] and set(seconds) == {"inversion", "distillation"}
    alone = pipeline.fedmitr(five[:2], tiny(), store).models[0].state_dict()
    assert all(torch.equal(alone[name], value) for name, value in made[0].checked().weights.items())


def test_a_run_in_groups_is_a_run_on_the_groups(five, tmp_path):
    settings, store = tiny(distill__group=2), Store(tmp_path)
    whole = pipeline.fedmitr(five, settings, store)
    made, before = pipeline.in_groups(five, settings, store)
    second = pipeline.fedmitr(made, tiny(), store)
    for one, other in zip(whole.models[0].parameters(), second.models[0].parameters(), strict=True):
        assert torch.equal(one, other)
    for stage, value in second.seconds.items():
        assert whole.seconds[stage] == pytest.approx(before[stage] + value)


def test_no_more_clients_than_a_group_is_no_group(five, tmp_path):
    made, seconds = pipeline.in_groups(five, tiny(distill__group=5), Store(tmp_path))
    assert made == five and seconds == {}


def test_groups_without_histograms_are_uploads_without(five, tmp_path):
    bare = [u.without_counts() for u in five]
    settings = tiny(distill__group=3, ensemble__mode="mean_probs", inversion__teacher="ensemble")
    made, _ = pipeline.in_groups(bare, settings, Store(tmp_path))
    assert [u.class_counts for u in made] == [None, None] and [u.size for u in made] == [18, 9]
