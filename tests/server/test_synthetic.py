"""synthetic.py: balanced labels, sets on disk, and sets that are joined."""

import torch
from helpers import inverted, same
from hypothesis import given
from hypothesis import strategies as st

import fedmitr as fm
from fedmitr.server.synthetic import balanced_labels, label_batches, load_synthetic, save_synthetic
from fedmitr.settings.schema import InversionSettings


@given(count=st.integers(1, 60), classes=st.integers(1, 12), seed=st.integers(0, 99))
def test_labels_are_balanced_and_shuffled(count, classes, seed):
    labels = balanced_labels(count, classes, torch.Generator().manual_seed(seed))
    counts = torch.bincount(labels, minlength=classes)
    assert len(labels) == count and len(counts) == classes and counts.max() - counts.min() <= 1


def test_label_batches_cover_the_images_of_the_settings():
    batches = label_batches(InversionSettings(images=70, batch_size=32), torch.arange(10), seed=1)
    assert [len(b) for b in batches] == [32, 32, 6]
    assert torch.bincount(torch.cat(batches)).tolist() == [7] * 10
    assert torch.cat(batches).tolist() != sorted(torch.cat(batches).tolist())
    again = label_batches(InversionSettings(images=70, batch_size=32), torch.arange(10), seed=2)
    assert not torch.equal(torch.cat(batches), torch.cat(again))
    some = label_batches(InversionSettings(images=6, batch_size=6), torch.tensor([2, 5, 7]), seed=1)
    assert sorted(some[0].tolist()) == [2, 2, 5, 5, 7, 7]


def test_a_synthetic_set_comes_back_from_disk(sparse, tmp_path):
    save_synthetic(sparse, tmp_path)
    assert same(load_synthetic(tmp_path), sparse)


def test_sets_join_in_order_and_average_their_curves(teacher, sparse):
    other = inverted(teacher, seed=1)
    joined = fm.SyntheticSet.concat([sparse, other])
    assert torch.equal(joined.pixels, torch.cat([sparse.pixels, other.pixels])) and len(joined) == 8
    assert torch.equal(joined.mask[4:], other.mask) and torch.equal(joined.labels[:4], sparse.labels)
    mean = (sparse.history["loss"] + other.history["loss"]) / 2
    torch.testing.assert_close(joined.history["loss"], mean)
    assert torch.equal(joined.history["frames"], sparse.history["frames"])
