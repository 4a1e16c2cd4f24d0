"""Methods on sums of features, from images to predictions, against scikit-learn on all images together."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_runs import small

import fedmitr as fm
from fedmitr.client.statistics import feature_statistics, view_maps
from fedmitr.core.store import Store
from fedmitr.data.tasks import Split
from fedmitr.methods import METHODS
from fedmitr.settings.schema import ModelSettings
from fedmitr.upload import Features, ModelShape, Upload
from fedmitr.vision.augment import warp
from fedmitr.vision.features import image_features, largest_feature
from fedmitr.vision.vit import create_vit, weights_digest

IMAGES = 60
MODEL = ModelSettings(image_size=12)  # the letters' weights, at half their size
CLOSED = ("ncm", "ridge", "lda", "central_ridge")


@pytest.fixture(scope="module")
def vit():
    return create_vit("vit_micro", 10, pretrained=True, image_size=12).eval()


def draw(images, seed):
    """Images of bars whose place tells the class; no 9 among them."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(9, (images,), generator=rng)
    pixels = torch.randn(images, 1, 12, 12, generator=rng) / 2
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[0, label + 1 : label + 3] += 2
    return Split(pixels, labels)


@pytest.fixture(scope="module")
def everything():
    return draw(IMAGES, seed=1)


@pytest.fixture(scope="module")
def fresh():
    return draw(40, seed=2)


def options(tokens="both", **more):
    changes = {f"model.{name}": value for name, value in MODEL.model_dump().items()}
    changes |= {name.replace("__", "."): value for name, value in more.items()}
    return small(changes | {"statistics.tokens": tokens})


def upload_of(client, vit, shard, tokens="both", model=MODEL):
    """What a client sends: the sums of its images' features, and nothing else."""
    shape = ModelShape.of("vit_micro", vit)
    features = Features(shape=shape, weights=weights_digest(model), tokens=tokens)
    sums = feature_statistics([vit], shard, tokens)
    return Upload(client, len(shard), shape, None).with_statistics(sums, features).checked()


def dealt(vit, everything, owner, tokens="both"):
    """The uploads of the clients that hold images by `owner` (n,)."""
    shards = [everything.subset((owner == k).nonzero()[:, 0]) for k in owner.unique()]
    return [upload_of(k, vit, shard, tokens) for k, shard in enumerate(shards)]


def model_of(method, uploads, run, store):
    (model,) = METHODS[method](uploads, run, store).models
    return model


def timm_features(vit, images, tokens):
    with torch.no_grad():
        out = vit.double().forward_features(images.double())
    vit.float()
    parts = {"cls": [out[:, 0]], "patches": [out[:, 1:].mean(1)]}
    parts["both"] = parts["cls"] + parts["patches"]
    return torch.cat(parts[tokens], 1).numpy()


class OneHotRidge:
    """The class whose score is largest."""

    def fit(self, features, labels):
        self.ridge = make_pipeline(StandardScaler(), Ridge(alpha=0.5)).fit(features, np.eye(10)[labels])
        return self

    def predict(self, features):
        return self.ridge.predict(features).argmax(1)


SKLEARN = {
    "ncm": NearestCentroid,
    "ridge": OneHotRidge,
    "central_ridge": OneHotRidge,
    "lda": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.05),
}


@pytest.mark.parametrize("tokens", ["cls", "patches", "both"])
@pytest.mark.parametrize("method", CLOSED)
def test_predictions_are_scikit_learns_on_timms_features(method, tokens, vit, everything, fresh, tmp_path):
    owner = torch.arange(IMAGES) % (1 if method == "central_ridge" else 4)
    run = options(tokens, statistics__ridge=0.5, lda__shrinkage=0.05)
    model = model_of(method, dealt(vit, everything, owner, tokens), run, Store(tmp_path))
    by_hand = SKLEARN[method]().fit(timm_features(vit, everything.images, tokens), everything.labels.numpy())
    wanted = by_hand.predict(timm_features(vit, fresh.images, tokens))
    assert model(fresh.images).argmax(1).tolist() == wanted.tolist()
    assert len(set(wanted.tolist())) > 3  # it is no constant


@pytest.mark.parametrize("method", ["ncm", "ridge", "lda"])
@given(owner=st.lists(st.integers(0, 7), min_size=IMAGES, max_size=IMAGES))
@settings(max_examples=4)
def test_any_partition_gives_the_model_of_one_client_with_everything(
    method, owner, vit, everything, tmp_path_factory
):
    store = Store(tmp_path_factory.getbasetemp() / "partitions")
    one = model_of(method, [upload_of(0, vit, everything)], options(), store)
    other = model_of(method, dealt(vit, everything, torch.tensor(owner)), options(), store)
    torch.testing.assert_close(other.head.weight, one.head.weight, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(other.head.bias, one.head.bias, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", [*CLOSED[:3], "fishermix"])
def test_every_image_may_be_a_client_of_its_own(method, vit, everything, fresh, tmp_path):
    uploads = dealt(vit, everything, torch.arange(IMAGES))
    assert {u.size for u in uploads} == {1} and len(uploads) == IMAGES
    one = model_of(method, [upload_of(0, vit, everything)], options(), Store(tmp_path))
    other = model_of(method, uploads, options(), Store(tmp_path))
    torch.testing.assert_close(other(fresh.images), one(fresh.images), rtol=1e-4, atol=1e-4)


def test_ridge_on_all_images_is_ridge_on_clients_sums(vit, everything, fresh, tmp_path):
    central = model_of("central_ridge", [upload_of(0, vit, everything)], options(), Store(tmp_path))
    owner = torch.randint(5, (IMAGES,), generator=torch.Generator().manual_seed(3))
    ridge = model_of("ridge", dealt(vit, everything, owner), options(), Store(tmp_path))
    torch.testing.assert_close(ridge(fresh.images), central(fresh.images))
    with pytest.raises(ValueError):  # it is given one client
        METHODS["central_ridge"](dealt(vit, everything, owner), options(), Store(tmp_path))


@pytest.mark.parametrize("method", CLOSED)
def test_what_is_left_is_one_frozen_model_and_seconds_of_solving(method, vit, everything, tmp_path):
    outcome = METHODS[method]([upload_of(0, vit, everything)], options(), Store(tmp_path))
    (model,) = outcome.models
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert len(model.vits) == 1 and set(outcome.seconds) == {"solving"}
    for name, value in model.vits[0].state_dict().items():  # the shared model, as it was
        assert torch.equal(value, vit.state_dict()[name])
    assert (outcome.synthetic, outcome.student_steps, outcome.uplink_bytes) == (None, 0, None)
    assert outcome.downlink_bytes == (0 if method == "central_ridge" else None)


# Bad input.


@pytest.mark.parametrize("method", [*CLOSED, "fishermix"])
def test_statistics_of_another_checkpoint_are_one_line(method, vit, everything, tmp_path, one_line):
    other = ModelSettings(image_size=12, pretrained=False)
    with pytest.raises(fm.BadInput) as error:
        METHODS[method]([upload_of(0, vit, everything, model=other)], options(), Store(tmp_path))
    one_line(error.value, "client 0", "'vit_micro, p", weights_digest(MODEL)[:12], "shared model")


def spoilt(upload, **changes):
    """The upload with some of its sums, or its size, replaced."""
    size = changes.pop("size", upload.size)
    return dataclasses.replace(
        upload, size=size, statistics=dataclasses.replace(upload.statistics, **changes)
    )


def wrong(upload):
    """Uploads with sums that no images have, and a word of what is said of each."""
    sums = upload.statistics
    negative = sums.counts.clone()
    negative[0] -= 2 * negative[0] + 1
    nan = sums.sums.clone()
    nan[0, 0] = float("nan")
    return {
        "negative": spoilt(upload, counts=negative),
        "size": spoilt(upload, counts=sums.counts + 1),
        "sums holds NaN": spoilt(upload, sums=nan),
        "gram holds NaN": spoilt(upload, gram=sums.gram * float("nan")),
        "not symmetric": spoilt(upload, gram=sums.gram.triu()),
        "no images have these sums": spoilt(upload, gram=-sums.gram),
        "gram is torch.float64 [9, 9]": spoilt(upload, gram=sums.gram[:9, :9]),
        "size=0": spoilt(upload, size=0, counts=torch.zeros_like(sums.counts)),
        "mean |f|²": spoilt(upload, sums=sums.sums * 1e3, gram=sums.gram * 1e6),
    }


@pytest.mark.parametrize(
    "method, alone",
    [(m, True) for m in (*CLOSED, "fishermix")] + [(m, False) for m in ("ncm", "ridge", "lda", "fishermix")],
)
def test_sums_that_no_images_have_are_one_line_before_anything_is_solved(
    method, alone, vit, everything, tmp_path, one_line
):
    good = upload_of(0, vit, everything)
    for word, bad in wrong(upload_of(3, vit, everything)).items():
        with pytest.raises(fm.BadInput) as error:
            METHODS[method]([bad] if alone else [good, bad], options(), Store(tmp_path))
        one_line(error.value, "upload of client 3", word)


def test_statistics_of_another_architecture_under_the_shared_digest_are_one_line(
    vit, everything, tmp_path, one_line
):
    deep = create_vit("vit_micro_deep", 10, image_size=12).eval()
    upload = upload_of(0, vit, everything)
    features = upload.features.model_copy(update={"shape": ModelShape.of("vit_micro_deep", deep)})
    sums = feature_statistics([deep], everything, features.tokens)
    with pytest.raises(fm.BadInput) as error:
        METHODS["ridge"]([upload.with_statistics(sums, features)], options(), Store(tmp_path))
    one_line(error.value, "client 0", "'vit_micro_deep'", "shared model is 'vit_micro'")


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-3, 3), seed=st.integers(0, 99))
@pytest.mark.parametrize("tokens", ["cls", "patches", "both", "regions"])
def test_no_image_has_longer_features_than_the_bound(tokens, vit, scale, shift, seed):
    images = scale * torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(seed)) + shift
    found = image_features(vit, images, tokens).square().sum(1)
    assert found.max() <= largest_feature(vit, tokens) * 1.001
    assert largest_feature(vit, tokens) < 100 * found.max()  # it is worth something


def test_a_shard_without_images_is_one_line(vit, everything, one_line):
    with pytest.raises(fm.BadInput) as error:
        feature_statistics([vit], everything.subset(torch.arange(0)), "cls")
    one_line(error.value, "0 images")


@pytest.mark.parametrize(
    "name, values",
    [
        ("statistics.ridge", (0, -1, "inf", "nan", "much")),
        ("statistics.weight", (-0.1,)),
        ("statistics.tokens", ("all", 3)),
        ("lda.shrinkage", (0, -0.1, 1.1)),
        ("fishermix.shrinkage", (0, 1.5)),
        ("fishermix.energy", (0, 1.1)),
        ("fishermix.per_class", (0, 1.5)),
        ("fishermix.spread", (0,)),
    ],
)
def test_settings_out_of_range_are_one_line(name, values, one_line):
    for value in values:
        with pytest.raises(fm.BadInput) as error:
            fm.Settings.load("smoke", {name: value})
        one_line(error.value, f"{name}={value!r}")


def test_a_single_class_is_always_predicted(vit, fresh, tmp_path):
    shard = dataclasses.replace(draw(5, seed=1), labels=torch.full((5,), 4))
    for method in [*CLOSED, "fishermix"]:
        model = model_of(method, [upload_of(0, vit, shard)], options(), Store(tmp_path))
        found = model(fresh.images)
        assert found.isfinite().all() and set(found.argmax(1).tolist()) == {4}, method


# Regions and moved copies.


@pytest.mark.parametrize("views", [0, 2])
def test_ridge_on_regions_of_images_and_their_copies_is_scikit_learns(
    views, vit, everything, fresh, tmp_path
):
    """An image and its copies weigh as one together: sample weights of 1 / (1 + views)."""
    run_settings = options("regions", statistics__views=views, statistics__ridge=2.0)
    features = Features(
        shape=ModelShape.of("vit_micro", vit), weights=weights_digest(MODEL), tokens="regions", views=views
    )
    sent = []
    for k in range(4):
        shard = everything.subset(torch.arange(k, IMAGES, 4))
        sums = feature_statistics([vit], shard, "regions", views)
        sent.append(Upload(k, len(shard), features.shape, None).with_statistics(sums, features))
    model = model_of("ridge", sent, run_settings, Store(tmp_path))

    exact = copy.deepcopy(vit).double().requires_grad_(False)
    images = everything.images.double()
    shown = [images, *(warp(images, m.expand(IMAGES, -1, -1)) for m in view_maps(views))]
    f = torch.cat([image_features(exact, x, "regions") for x in shown]).numpy()
    y = np.eye(10)[np.tile(everything.labels.numpy(), len(shown))]
    weight = np.full(len(f), 1 / len(shown))
    scaler = StandardScaler().fit(f, sample_weight=weight)
    wanted = Ridge(alpha=2.0).fit(scaler.transform(f), y, sample_weight=weight)
    f = image_features(exact, fresh.images.double(), "regions").numpy()
    with torch.no_grad():
        found = model(fresh.images).numpy()
    np.testing.assert_allclose(found[:, :9], wanted.predict(scaler.transform(f))[:, :9], rtol=1e-3, atol=2e-3)
