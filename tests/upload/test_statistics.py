"""statistics.py: sums against loops over images, any partition, and sums that no images have."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedmitr as fm
from fedmitr.upload import Statistics, add_up, expected_arrays, wire_bytes

CLASSES, WIDTH = 4, 5


def draw(images: int, width: int = WIDTH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, D) and labels (n,) that leave class 3 without images."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(images, width, generator=rng).double() * 3 + 1
    return features, torch.randint(CLASSES - 1, (images,), generator=rng)


def of(features, labels) -> Statistics:
    return Statistics.of(features, labels, CLASSES)


def close(one: Statistics, other: Statistics) -> None:
    assert torch.equal(one.counts, other.counts)
    for name in ("sums", "gram"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-12)


def test_sums_are_those_of_a_loop_over_images():
    features, labels = draw(23)
    counts, sums, gram = [0] * CLASSES, np.zeros((CLASSES, WIDTH)), np.zeros((WIDTH, WIDTH))
    for f, y in zip(features.numpy(), labels.tolist(), strict=True):
        counts[y] += 1
        sums[y] += f
        gram += np.outer(f, f)
    found = of(features, labels)
    assert found.counts.tolist() == counts and found.counts.dtype == torch.int64
    np.testing.assert_allclose(found.sums, sums, rtol=1e-13)
    np.testing.assert_allclose(found.gram, gram, rtol=1e-13)
    assert (found.size, found.width) == (23, WIDTH)


def test_the_scatter_is_that_of_images_around_their_class_mean():
    features, labels = draw(23)
    wanted = np.zeros((WIDTH, WIDTH))
    for y in range(CLASSES - 1):
        own = features[labels == y].numpy()
        wanted += (own - own.mean(0)).T @ (own - own.mean(0))
    np.testing.assert_allclose(of(features, labels).scatter, wanted, rtol=1e-10, atol=1e-10)


@given(owner=st.lists(st.integers(0, 6), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_clients_add_up_to_all_images_however_these_are_dealt(owner, seed):
    """Clients of one image and clients of none among them."""
    (features, labels), owner = draw(len(owner), seed=seed), torch.tensor(owner)
    parts = [of(features[owner == k], labels[owner == k]) for k in range(7)]
    close(add_up(parts), of(features, labels))
    close(add_up(parts[::-1]), of(features, labels))


def test_what_is_sent_comes_back_bit_for_bit_and_is_half_the_gram_matrix():
    found = of(*draw(23))
    sent = found.to_arrays()
    again = Statistics.from_arrays(sent)
    assert all(torch.equal(getattr(again, n), getattr(found, n)) for n in ("counts", "sums", "gram"))
    numbers = CLASSES + CLASSES * WIDTH + WIDTH * (WIDTH + 1) // 2
    assert 8 * numbers < wire_bytes(sent) < 8 * numbers + 400  # and a header
    expected = expected_arrays(CLASSES, WIDTH)
    assert {n: (v.dtype, v.shape) for n, v in sent.items()} == {
        n: (v.dtype, v.shape) for n, v in expected.items()
    }
    assert all(v.is_meta for v in expected.values())


@given(
    images=st.integers(1, 12),
    width=st.integers(1, 9),
    scale=st.floats(1e-6, 1e6),
    offset=st.floats(-1e3, 1e3),
    constant=st.booleans(),
    copies=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sums_of_real_images_are_never_refused(images, width, scale, offset, constant, copies, seed):
    """Fewer images than features, features that are constant or equal, any scale."""
    features, labels = draw(images, width, seed)
    features = features * scale + offset * scale
    if constant:
        features[:, 0] = offset
    if copies:
        features[:, -1] = features[:, 0]
    found = of(features, labels)
    assert found.checked("client", CLASSES, width, images) is found


# Sums that no images have.


def with_gram(change):
    def spoil(s):
        gram = s.gram.clone()
        change(gram)
        return dataclasses.replace(s, gram=gram)

    return spoil


def with_sums(row, column, value):
    def spoil(s):
        sums = s.sums.clone()
        sums[row, column] = value
        return dataclasses.replace(s, sums=sums)

    return spoil


def with_counts(change):
    return lambda s: dataclasses.replace(s, counts=torch.tensor(change(s.counts.tolist())))


def set_gram(row, column, value):
    def change(gram):
        gram[row, column] = gram[column, row] = value

    return with_gram(change)


IMPOSSIBLE = {
    "a negative count": (with_counts(lambda c: [-1, c[0] + c[1] + c[2] + 1, 0, 0]), "negative"),
    "counts of more images": (with_counts(lambda c: [c[0] + 1, *c[1:]]), "size is 23"),
    "counts that wrap around": (
        with_counts(lambda c: [c[0] + 2**62, c[1] + 2**62, c[2] + 2**62, 2**62]),
        "counts",
    ),
    "counts of another length": (with_counts(lambda c: [*c, 0]), "[4]"),
    "counts that are no integers": (lambda s: dataclasses.replace(s, counts=s.counts.double()), "int64"),
    "sums with NaN": (with_sums(0, 0, float("nan")), "sums holds NaN"),
    "sums with Inf": (with_sums(0, 0, float("inf")), "sums holds NaN"),
    "sums beyond all numbers": (with_sums(0, 0, 1e300), "sums holds"),
    "sums of an absent class": (with_sums(3, 1, 1e-3), "without images"),
    "sums in single precision": (lambda s: dataclasses.replace(s, sums=s.sums.float()), "float32"),
    "sums of another width": (lambda s: dataclasses.replace(s, sums=s.sums[:, :4]), "[4, 4]"),
    "a gram with NaN": (set_gram(1, 1, float("nan")), "gram holds NaN"),
    "a gram beyond all numbers": (set_gram(1, 1, 1e308), "gram holds"),
    "a gram of another width": (lambda s: dataclasses.replace(s, gram=s.gram[:4, :4]), "[4, 4]"),
    "a gram that is a list": (lambda s: dataclasses.replace(s, gram=s.gram[0]), "gram is"),
    "a gram that is not symmetric": (
        with_gram(lambda g: g[0].__setitem__(1, g[0, 1] + 1e-6)),
        "not symmetric",
    ),
    "a negative square": (set_gram(2, 2, -1.0), "not positive semi-definite"),
    "an indefinite gram": (set_gram(0, 1, 1e4), "not positive semi-definite"),
    "no square at all": (lambda s: dataclasses.replace(s, gram=torch.zeros_like(s.gram)), "definite"),
    "a definite gram smaller than the means' share": (
        lambda s: dataclasses.replace(s, gram=s.gram / 2),
        "not positive semi-definite",
    ),
    "sums too large for the gram": (with_sums(0, 0, 500.0), "not positive semi-definite"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_sums_that_no_images_have_are_one_line_naming_the_sender(name, one_line):
    spoil, word = IMPOSSIBLE[name]
    good = of(*draw(23))
    if "definite gram smaller" in name:
        assert torch.linalg.eigvalsh(good.gram / 2).min() > 0  # a Gram matrix, if not this one
    with pytest.raises(fm.BadInput) as error:
        spoil(good).checked("upload of client 7", CLASSES, WIDTH, 23)
    one_line(error.value, "upload of client 7: statistics: ", word)
    assert len(str(error.value)) < 300


@given(seed=st.integers(0, 200), share=st.floats(1.001, 5))
def test_a_gram_that_lacks_more_than_a_direction_has_is_refused(seed, share):
    """Whatever the direction: less than nothing would be left of it."""
    good = of(*draw(23, seed=seed))
    values, vectors = torch.linalg.eigh(good.scatter)
    k = seed % WIDTH
    gram = good.gram - share * values[k] * vectors[:, [k]] @ vectors[:, [k]].T
    bad = dataclasses.replace(good, gram=(gram + gram.T) / 2)
    with pytest.raises(fm.BadInput, match="definite"):
        bad.checked("client", CLASSES, WIDTH, 23)
