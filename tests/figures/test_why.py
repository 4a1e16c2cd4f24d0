"""why.py: the toy's points and models, and the bars of kinds of errors."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

from fedmitr import figures
from fedmitr.evaluation.metrics import ERRORS
from fedmitr.figures.why import toy_models, toy_points


def test_each_client_of_the_toy_holds_two_classes_and_all_points_are_distinct_draws():
    first, second = toy_points(30, seed=1)
    assert [np.bincount(y, minlength=4).tolist() for _, y in (first, second)] == [
        [30, 30, 0, 0],
        [0, 0, 30, 30],
    ]
    assert np.array_equal(toy_points(30, seed=1)[0][0], first[0])
    assert not np.array_equal(toy_points(30, seed=2)[0][0], first[0])
    for (x, y), centre in ((first, -1.6), (second, 1.6)):
        radius = np.hypot(x[:, 0] - centre, x[:, 1])
        assert radius[y % 2 == 0].mean() < 0.5 < 1 < radius[y % 2 == 1].mean()


@pytest.mark.parametrize("beta", [3.0, 10.0])
def test_the_toys_models_are_what_their_names_say(beta):
    clients = toy_points(60, seed=0)
    models, (x, y) = toy_models(clients, beta), clients[0]
    alone = [models["client 1"](x), models["client 2"](x)]
    assert (alone[0].argmax(1) == y).mean() > 0.9 and (alone[1].argmax(1) == y).mean() < 0.2
    mean = log_softmax((alone[0] + alone[1]) / 2, axis=1)
    assert np.allclose(models["ensemble A"](x), mean)
    everything, labels = (np.concatenate(part) for part in zip(*clients, strict=True))
    centred = everything - everything.mean(0)  # ridge by its normal equations, from sums alone
    onehot = np.eye(4)[labels]
    weight = np.linalg.solve(centred.T @ centred + np.eye(2), centred.T @ onehot)
    by_hand = (x - everything.mean(0)) @ weight + onehot.mean(0)
    assert np.allclose(models["ridge r"](x), by_hand)
    assert np.allclose(models["log A + β·r"](x), mean + beta * by_hand)


def test_in_the_toy_both_together_are_better_than_either_on_every_seed():
    for seed in range(3):
        models = toy_models(toy_points(200, seed))
        x, y = (np.concatenate(part) for part in zip(*toy_points(200, seed + 100), strict=True))
        ensemble, ridge, both = ((models[n](x).argmax(1) == y).mean() for n in list(models)[2:])
        assert both > ensemble > ridge


def test_the_toy_has_a_panel_for_each_model_with_its_accuracy():
    titles = [axis.get_title() for axis in figures.toy().axes]
    assert len(titles) == 5 and all(0 <= float(title.split("\n")[1]) <= 1 for title in titles)


def test_bars_of_errors_are_means_over_seeds_and_end_in_their_sum():
    shares = [(0.5, 0.2, 0.3), (0.7, 0.2, 0.1)]
    rows = [
        {"start": start, "seed": seed, "model": model} | dict(zip(ERRORS, shares[seed], strict=True))
        for start in ("a", "b")
        for seed in (0, 1)
        for model in ("one", "two")
    ]
    axes = figures.errors(pd.DataFrame(rows), {"a": "start a", "b": "start b"}).axes
    assert [axis.get_title() for axis in axes] == ["start a", "start b"]
    for axis in axes:
        widths = [[bar.get_width() for bar in container] for container in axis.containers]
        assert np.allclose(widths, [[0.2, 0.2], [0.2, 0.2]])
        assert [text.get_text() for text in axis.texts] == ["0.400", "0.400"]
