"""server/statistics.py: heads from sums against scikit-learn on the features, for any partition."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from helpers import make_upload, random_features, with_statistics
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import eigh
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

import fedmitr as fm
from fedmitr.server.statistics import (
    NEVER,
    class_gaussians,
    fisher_directions,
    lda,
    ncm,
    ridge,
    total_statistics,
)
from fedmitr.settings.schema import ModelSettings
from fedmitr.upload import Statistics, add_up

CLASSES = 5
HEADS = {
    "ridge": lambda s: ridge(s, 0.7),
    "lda": lambda s: lda(s, 0.1),
    "ncm": ncm,
}


def make(counts, width, seed=0):
    """Features (n, D), labels (n,), their sums, and other features to predict."""
    features, labels = random_features(counts, width, seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(9)).double()  # correlated
    features = features @ mix + 3
    fresh = random_features([3] * len(counts), width, seed + 50)[0] @ mix + 3
    return features, labels, Statistics.of(features, labels, len(counts)), fresh


CASES = {
    "more images than features": dict(counts=(20, 8, 13, 5, 9), width=6),
    "more features than images": dict(counts=(3, 2, 4, 2, 1), width=20),
    "an absent class": dict(counts=(20, 0, 13, 5, 9), width=6),
    "classes of one image": dict(counts=(1, 1, 1, 1, 1), width=6),
    "one class": dict(counts=(0, 12, 0, 0, 0), width=6),
    "one image": dict(counts=(0, 0, 0, 1, 0), width=6),
    "one feature": dict(counts=(20, 8, 13, 5, 9), width=1),
    "two classes": dict(counts=(20, 8, 0, 0, 0), width=6),
}


WIDE = [name for name in CASES if name != "one feature"]
SCATTERED = [name for name in CASES if name not in ("classes of one image", "one class", "one image")]


@pytest.fixture(params=CASES)
def case(request):
    return make(**CASES[request.param])


def constants(features, fresh):
    """Two features made constant, one of them zero."""
    for values in (features, fresh):
        values[:, 0], values[:, -1] = 4.2, 0.0
    return features, fresh


def scores(head, features):
    weight, bias = head
    assert weight.dtype == bias.dtype == torch.double
    return features @ weight.T + bias  # (n, C)


# Against scikit-learn, on the images.


def sklearn_ridge(features, labels, penalty):
    """Weights (C, D) and intercepts (C,) on the features as they are."""
    scaler = StandardScaler().fit(features)
    one_hot = torch.nn.functional.one_hot(labels, CLASSES).double()
    model = Ridge(alpha=penalty, solver="svd").fit(scaler.transform(features), one_hot)
    weight = model.coef_ / scaler.scale_
    return weight, model.intercept_ - weight @ scaler.mean_


def matches_ridge(features, labels, statistics, penalty):
    weight, bias = ridge(statistics, penalty)
    wanted, intercept = sklearn_ridge(features, labels, penalty)
    held = statistics.counts > 0
    np.testing.assert_allclose(weight[held], wanted[held], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(bias[held], intercept[held], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e3])
def test_ridge_is_scikit_learns_on_standardised_features(penalty, case):
    features, labels, statistics, _ = case
    matches_ridge(features, labels, statistics, penalty)


@pytest.mark.parametrize("case", WIDE, indirect=True)
def test_ridge_leaves_constant_features_unscaled_as_scikit_learn_does(case):
    features, labels, _, fresh = case
    constants(features, fresh)
    statistics = Statistics.of(features, labels, CLASSES)
    matches_ridge(features, labels, statistics, 1.0)
    weight, _ = ridge(statistics, 1.0)
    assert weight.isfinite().all() and weight[:, [0, -1]].abs().max() < 1e-9


@pytest.mark.parametrize("case", SCATTERED, indirect=True)  # scikit-learn needs scatter and two classes
@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
def test_lda_is_scikit_learns_with_as_much_shrinkage(shrinkage, case):
    features, labels, statistics, fresh = case
    held = (statistics.counts > 0).nonzero()[:, 0]
    found = scores(lda(statistics, shrinkage), fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes of one image
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features, labels)
    wanted, own = model.decision_function(fresh), found[:, held]
    own = own if len(held) > 2 else own[:, 1] - own[:, 0]  # as scikit-learn has it for two classes
    np.testing.assert_allclose(own, wanted, rtol=1e-6, atol=1e-6)
    assert (found.argmax(1).numpy() == model.predict(fresh.numpy())).all()


def test_ncm_goes_to_scikit_learns_nearest_centroid(case):
    features, labels, statistics, fresh = case
    found = scores(ncm(statistics), fresh)
    if len(labels.unique()) > 1:
        wanted = NearestCentroid().fit(features, labels).predict(fresh)
        assert found.argmax(1).tolist() == wanted.tolist()
    held = statistics.counts > 0
    means = statistics.sums[held] / statistics.counts[held, None]
    distances = torch.cdist(fresh, means).square()  # −2 W f − 2 b + |f|²
    torch.testing.assert_close(
        fresh.square().sum(1, keepdim=True) - 2 * found[:, held], distances, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", HEADS)
def test_a_class_without_images_is_never_predicted_and_all_is_finite(name, case):
    _, _, statistics, fresh = case
    weight, bias = HEADS[name](statistics)
    assert weight.isfinite().all() and bias.isfinite().all()
    absent = statistics.counts == 0
    assert not weight[absent].any() and (bias[absent] == NEVER).all()
    assert statistics.counts[scores((weight, bias), 1e3 * fresh).argmax(1)].min() > 0


@pytest.mark.parametrize("name", HEADS)
@given(
    owner=st.lists(st.integers(0, 8), min_size=30, max_size=30),
    seed=st.integers(0, 50),
)
def test_any_partition_gives_the_head_of_all_images(name, owner, seed):
    """Clients of one image and of one class among them; K up to nine."""
    features, labels, whole, _ = make((9, 6, 8, 1, 6), 7, seed)
    owner = torch.tensor(owner)
    held = [(owner == k).nonzero()[:, 0] for k in owner.unique()]
    total = add_up([Statistics.of(features[rows], labels[rows], CLASSES) for rows in held])
    for found, wanted in zip(HEADS[name](total), HEADS[name](whole), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", HEADS)
def test_images_in_another_order_and_clients_of_one_image_each_give_the_same_head(name):
    features, labels, whole, _ = make((9, 6, 8, 1, 6), 40)  # more features than images
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    total = add_up([Statistics.of(features[k : k + 1], labels[k : k + 1], CLASSES) for k in order])
    for found, wanted in zip(HEADS[name](total), HEADS[name](whole), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_lda_of_one_image_a_class_is_nearest_means():
    """There is no scatter, so no direction counts more than another."""
    _, _, statistics, fresh = make((1, 1, 1, 1, 1), 6)
    found, wanted = scores(lda(statistics, 0.01), fresh), scores(ncm(statistics), fresh)
    torch.testing.assert_close(found.log_softmax(1), wanted.log_softmax(1))


def test_ridge_does_not_depend_on_the_scale_of_a_feature():
    features, labels, statistics, fresh = make((20, 8, 13, 5, 9), 6)
    stretch = torch.tensor([1e-3, 1e3, 1.0, 7.0, 0.1, 1.0]).double()
    other = ridge(Statistics.of(features * stretch + 5, labels, CLASSES), 1.0)
    torch.testing.assert_close(
        scores(other, fresh * stretch + 5), scores(ridge(statistics, 1.0), fresh), rtol=1e-6, atol=1e-8
    )


# Fisher's directions.


def between(statistics):
    """Scatter of class means around the mean of all images, each by the share of its images: a loop."""
    n, total = statistics.size, statistics.sums.sum(0).numpy() / statistics.size
    found = 0.0
    for count, own in zip(statistics.counts.tolist(), statistics.sums.numpy(), strict=True):
        if count:
            found = found + count / n * np.outer(own / count - total, own / count - total)
    return found


def test_directions_solve_the_generalised_eigenproblem(case):
    """Against SciPy's, up to sign; all directions but those in which class means do not differ."""
    statistics, covariance = case[2], class_gaussians(case[2], 0.1)[1]
    values, vectors = eigh(between(statistics), covariance.numpy())
    found = fisher_directions(statistics, covariance, energy=1).numpy()
    count = min(found.shape[1], int((values > 1e-9 * max(values[-1], 1e-9)).sum()))
    np.testing.assert_allclose(found.T @ covariance.numpy() @ found, np.eye(found.shape[1]), atol=1e-8)
    for k in range(count):
        along = abs(vectors[:, -1 - k] @ covariance.numpy() @ found[:, k])
        assert along == pytest.approx(1, abs=1e-6), k


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.995])
def test_as_many_directions_are_kept_as_make_up_the_energy(energy):
    statistics = make((20, 8, 13, 5, 9), 6)[2]
    covariance = class_gaussians(statistics, 0.05)[1]
    values = eigh(between(statistics), covariance.numpy(), eigvals_only=True)[::-1]
    enough = next(k for k in range(1, 7) if values[:k].sum() >= energy * values.sum())
    assert fisher_directions(statistics, covariance, energy).shape == (6, enough)


def test_no_other_direction_tells_classes_better_apart():
    statistics = make((20, 8, 13, 5, 9), 6)[2]
    covariance = class_gaussians(statistics, 0.05)[1].numpy()
    first = fisher_directions(statistics, torch.from_numpy(covariance), 0.01)[:, 0].numpy()

    def apart(v):
        return v @ between(statistics) @ v / (v @ covariance @ v)

    rng = np.random.default_rng(0)
    others = [*rng.normal(size=(200, 6)), *(first + 0.01 * rng.normal(size=(200, 6)) * abs(first).max())]
    assert max(map(apart, others)) <= apart(first) * (1 + 1e-12)


@given(seed=st.integers(0, 500), width=st.integers(1, 12))
def test_all_of_the_energy_is_some_number_of_directions(seed, width):
    statistics = make((3, 2, 4, 2, 1), width, seed)[2]
    found = fisher_directions(statistics, class_gaussians(statistics, 0.05)[1], 1)
    assert 1 <= found.shape[1] <= min(width, 5) and found.isfinite().all()


# What cannot be solved.


@pytest.mark.parametrize("penalty", [0, 0.0, -1.0, float("nan")])
def test_ridge_without_a_penalty_is_one_line(penalty, one_line):
    with pytest.raises(fm.BadInput) as error:
        ridge(make((3, 4, 2, 2, 1), 4)[2], penalty)
    one_line(error.value, "statistics.ridge=", "greater than 0")


def nearly_definite():
    """Sums of images, less as much of one direction as the checks on arrival let pass."""
    features, labels, _, _ = make((20, 8, 13, 5, 9), 6)
    features = features * torch.tensor([1e6, 1.0, 1e-3, 1e-3, 1e-3, 1e-3]).double()
    good = Statistics.of(features, labels, CLASSES)
    gram = good.gram.clone()
    gram[5, 5] -= 5e-9 * good.gram.trace()
    return dataclasses.replace(good, gram=gram).checked("client 0", CLASSES, 6, 55)


@pytest.mark.parametrize(
    "solve, setting",
    [
        (lambda s: ridge(s, 1e-6), "statistics.ridge"),
        (lambda s: lda(s, 1e-12), "lda.shrinkage"),
        (lambda s: fisher_directions(s, class_gaussians(s, 1e-12)[1], 0.9), "fishermix.shrinkage"),
    ],
)
def test_sums_that_pass_the_checks_and_cannot_be_solved_are_one_line(solve, setting, one_line):
    with pytest.raises(fm.BadInput) as error:
        solve(nearly_definite())
    one_line(error.value, setting, "too small")


# The sums of several uploads.


@pytest.fixture(scope="module")
def sent():
    counts = [(9, 8, 7, 0, 0, 0, 0, 0, 0, 0), (0, 2, 0, 4, 6, 8, 0, 0, 0, 0)]
    return [with_statistics(make_upload(k, c, side=12)) for k, c in enumerate(counts)]


def test_the_total_is_that_of_all_uploads(sent):
    total = total_statistics(sent)
    assert total.counts.tolist() == [9, 10, 7, 4, 6, 8, 0, 0, 0, 0]
    assert torch.equal(total.gram, sent[0].statistics.gram + sent[1].statistics.gram)


def test_uploads_without_statistics_and_of_another_model_are_one_line(sent, one_line):
    deep = with_statistics(sent[1], model=ModelSettings(name="vit_micro_deep"))
    random = with_statistics(sent[1], model=ModelSettings(pretrained=False))
    both = with_statistics(sent[1], tokens="both")
    for wrong, words in (
        ([], ("uploads=[]",)),
        ([sent[0], sent[1].without_statistics()], ("client 1", "has no statistics")),
        ([sent[0], deep], ("client 1", "'vit_micro_deep'", "do not add")),
        ([sent[0], random], ("client 1", "'vit_micro, p", "do not add")),
        ([sent[0], both], ("client 1", "tokens='both'", "do not add")),
    ):
        with pytest.raises(fm.BadInput) as error:
            total_statistics(wrong)
        one_line(error.value, *words)
