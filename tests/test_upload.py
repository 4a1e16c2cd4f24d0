"""upload.py: bytes on the wire, what a spoilt upload says, and the average of many."""

import dataclasses
import json

import pytest
import torch
from helpers import make_upload
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fedmitr as fm
from fedmitr.methods.fedavg import average_weights
from fedmitr.upload import CARD, WEIGHTS, ModelShape


@pytest.fixture
def saved(uploads, tmp_path):
    """The folder of client 1's upload."""
    uploads[1].save(tmp_path / "client1")
    return tmp_path / "client1"


def test_an_upload_comes_back_bit_for_bit(saved, uploads):
    again = fm.Upload.load(saved)
    assert (again.client, again.size, again.shape, again.class_counts) == (
        1,
        20,
        uploads[1].shape,
        uploads[1].class_counts,
    )
    assert again.weights.keys() == uploads[1].weights.keys()
    for name, value in uploads[1].weights.items():
        assert torch.equal(again.weights[name], value) and again.weights[name].dtype == value.dtype
    assert again.digest == uploads[1].digest


@pytest.mark.parametrize("with_counts", [True, False])
def test_bytes_are_the_sizes_of_the_files(uploads, tmp_path, with_counts):
    upload = uploads[1] if with_counts else uploads[1].without_counts()
    upload.save(tmp_path)
    files = list(tmp_path.iterdir())
    assert {f.name for f in files} == {WEIGHTS, CARD}
    assert upload.bytes == sum(f.stat().st_size for f in files)
    assert fm.Upload.load(tmp_path).class_counts == upload.class_counts


def test_the_digest_tells_apart_all_that_is_sent(uploads):
    upload = uploads[0]
    nudged = {k: v.clone() for k, v in upload.weights.items()}
    nudged["head.bias"][0] += 1e-6
    others = [
        upload.without_counts(),
        dataclasses.replace(upload, size=25),
        dataclasses.replace(upload, client=1),
        dataclasses.replace(upload, weights=nudged),
    ]
    assert len({u.digest for u in [upload, *others]}) == 5


def test_the_model_is_frozen_and_answers_as_the_clients_did(images):
    from helpers import loud

    upload, vit = make_upload(4, (1,) * 10), loud(fm.create_vit("vit_micro", 10), seed=104)
    rebuilt = upload.vit()
    assert not rebuilt.training and not any(p.requires_grad for p in rebuilt.parameters())
    assert torch.equal(rebuilt(images), vit(images))


@pytest.mark.parametrize(
    "name, options", [("vit_micro", {"image_size": 32, "in_chans": 3}), ("test_vit", {})]
)
def test_a_shape_rebuilds_its_model(name, options):
    vit = fm.create_vit(name, 6, **options)
    built = ModelShape.of(name, vit).build()
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in vit.state_dict().items()
    }


# Spoilt uploads: one line that names the client.


def edit_card(change):
    def spoil(folder):
        card = json.loads((folder / CARD).read_text())
        change(card)
        (folder / CARD).write_text(json.dumps(card))

    return spoil


def edit_weights(change):
    def spoil(folder):
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return spoil


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def poison(value):
    def change(weights):
        weights["norm.bias"][3] = value

    return edit_weights(change)


SPOILT = {
    "truncated": truncate,
    "empty weights": overwrite(WEIGHTS, b""),
    "garbage weights": overwrite(WEIGHTS, b"\xff" * 400),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no card": lambda folder: (folder / CARD).unlink(),
    "card not JSON": overwrite(CARD, b"{client: 1"),
    "card not text": overwrite(CARD, b"\xff\xfe\x00"),
    "card not an object": overwrite(CARD, b"[1]"),
    "card lacks size": edit_card(lambda c: c.pop("size")),
    "size zero": edit_card(lambda c: c.update(size=0)),
    "size not a number": edit_card(lambda c: c.update(size="many")),
    "negative client": edit_card(lambda c: c.update(client=-1)),
    "unknown field": edit_card(lambda c: c.update(images=[1, 2])),
    "unknown model": edit_card(lambda c: c["shape"].update(name="resnet18")),
    "impossible size": edit_card(lambda c: c["shape"].update(image_size=25)),
    "other classes": edit_card(lambda c: c["shape"].update(num_classes=11)),
    "counts too short": edit_card(lambda c: c.update(class_counts=[20])),
    "counts do not sum": edit_card(lambda c: c.update(class_counts=[2] * 10, size=21)),
    "negative counts": edit_card(lambda c: c.update(class_counts=[-1, 21] + [0] * 8)),
    "NaN": poison(float("nan")),
    "Inf": poison(float("-inf")),
    "missing weight": edit_weights(lambda w: w.pop("norm.bias")),
    "unknown weight": edit_weights(lambda w: w.update(extra=torch.zeros(2))),
    "wrong shape": edit_weights(lambda w: w.update({"norm.bias": torch.zeros(97)})),
    "wrong type": edit_weights(lambda w: w.update({"norm.bias": torch.zeros(96, dtype=torch.float64)})),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_upload_is_one_line_naming_the_client(saved, spoil, one_line):
    spoil(saved)
    with pytest.raises(fm.BadInput) as error:
        fm.Upload.load(saved)
    one_line(error.value, "upload")
    assert "client 1" in str(error.value) or "'client1'" in str(error.value), error.value


# The average.


def test_the_average_is_the_sum_weighted_by_size(uploads):
    average = average_weights(uploads)
    total = sum(u.size for u in uploads)
    for name in uploads[0].weights:
        closed = sum(u.weights[name].numpy().astype("float64") * u.size for u in uploads) / total
        torch.testing.assert_close(average[name], torch.from_numpy(closed).float(), rtol=1e-6, atol=1e-7)
        assert average[name].dtype == torch.float32


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=4))
def test_identical_uploads_average_to_one_of_them(uploads, sizes):
    copies = [dataclasses.replace(uploads[0], client=k, size=n) for k, n in enumerate(sizes)]
    for name, value in average_weights(copies).items():
        torch.testing.assert_close(value, uploads[0].weights[name], rtol=1e-6, atol=1e-8)


def test_a_client_that_holds_nearly_everything_is_nearly_the_average(uploads):
    big = dataclasses.replace(uploads[0], size=10**9)
    average = average_weights([uploads[1], big])
    torch.testing.assert_close(average["pos_embed"], big.weights["pos_embed"], rtol=1e-4, atol=1e-6)


def test_the_average_does_not_depend_on_the_order(uploads):
    one, two = average_weights(uploads), average_weights(uploads[::-1])
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)


def test_no_uploads_and_mixed_architectures_are_one_line(uploads, one_line):
    with pytest.raises(fm.BadInput) as error:
        average_weights([])
    one_line(error.value, "uploads")
    other = dataclasses.replace(
        uploads[1], shape=ModelShape(name="test_vit", num_classes=10, image_size=24, in_chans=1)
    )
    with pytest.raises(fm.BadInput) as error:
        average_weights([uploads[0], other])
    one_line(error.value, "client 1", "test_vit", "vit_micro")
