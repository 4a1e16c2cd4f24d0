"""upload.py: what comes back from disk, what a message weighs, and what a hostile or damaged one says."""

import dataclasses
import hashlib
import json

import pytest
import torch
from helpers import loud, make_upload
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fedmitr as fm
from fedmitr.upload import CARD, CARD_BYTES, WEIGHTS, Card, ModelShape, check_arrays, check_same_images
from fedmitr.upload import message as module


def test_an_upload_comes_back_bit_for_bit(saved, uploads):
    again = fm.Upload.load(saved)
    assert again.card == uploads[1].card and (again.client, again.size) == (1, 20)
    assert again.weights.keys() == uploads[1].weights.keys()
    for name, value in uploads[1].weights.items():
        assert torch.equal(again.weights[name], value) and again.weights[name].dtype == value.dtype
    assert again.digest == uploads[1].digest


@given(
    client=st.integers(0, 10**6),
    counts=st.none() | st.lists(st.integers(0, 50), min_size=10, max_size=10).filter(any),
    size=st.integers(1, 2**53),
)
@settings(max_examples=10)
def test_any_client_and_counts_come_back(uploads, tmp_path_factory, client, counts, size):
    folder = tmp_path_factory.mktemp("upload")
    upload = fm.Upload(
        client,
        size if counts is None else sum(counts),
        uploads[0].shape,
        uploads[0].weights,
        None if counts is None else tuple(counts),
    )
    upload.save(folder)
    again = fm.Upload.load(folder, expected=upload.shape)
    assert again.card == upload.card and again.digest == upload.digest and again.bytes == upload.bytes


@pytest.mark.parametrize("with_counts", [True, False])
def test_bytes_are_the_sizes_of_the_files_without_the_checksum(uploads, tmp_path, with_counts):
    upload = uploads[1] if with_counts else uploads[1].without_counts()
    upload.save(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {WEIGHTS, CARD}
    card = json.loads((tmp_path / CARD).read_text())
    assert card.pop("sha256") == upload.digest
    card = json.dumps(card, separators=(",", ":")).encode()
    assert upload.bytes == (tmp_path / WEIGHTS).stat().st_size + len(card)
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


def test_weights_are_serialised_once_for_digest_and_bytes(uploads, monkeypatch):
    saves, save = [], module.save
    monkeypatch.setattr(module, "save", lambda weights: saves.append(1) or save(weights))
    upload = dataclasses.replace(uploads[0])
    for _ in range(3):
        assert upload.digest == uploads[0].digest and upload.bytes == uploads[0].bytes
    assert len(saves) == 1
    plain = upload.without_counts()
    assert plain.digest != upload.digest
    assert upload.bytes - plain.bytes == len("[9,8,7,0,0,0,0,0,0,0]") - len("null")
    assert len(saves) == 2


def test_the_model_is_frozen_and_predicts_as_the_clients_did(images):
    upload, vit = make_upload(4, (1,) * 10), loud(fm.create_vit("vit_micro", 10), seed=104)
    rebuilt = upload.vit()
    assert not rebuilt.training and not any(p.requires_grad for p in rebuilt.parameters())
    assert torch.equal(rebuilt(images), vit(images))


@pytest.mark.parametrize(
    "name, options", [("vit_micro", {"image_size": 32, "in_chans": 3}), ("test_vit", {})]
)
def test_a_shape_rebuilds_its_model(name, options):
    vit = fm.create_vit(name, 6, **options)
    wanted = {k: (v.shape, v.dtype) for k, v in vit.state_dict().items()}
    shape = ModelShape.of(name, vit)
    assert {k: (v.shape, v.dtype) for k, v in shape.build().state_dict().items()} == wanted
    listed = shape.arrays()
    assert {k: (v.shape, v.dtype) for k, v in listed.items()} == wanted
    assert all(v.is_meta for v in listed.values())


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


def sealed(spoil):
    """The same change by a client that knows what it does: the checksum is that of what it sends."""

    def spoil_and_seal(folder):
        spoil(folder)
        tree = json.loads((folder / CARD).read_text())
        del tree["sha256"]
        weights = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        tree["sha256"] = hashlib.sha256((weights + Card(**tree).model_dump_json()).encode()).hexdigest()
        (folder / CARD).write_text(json.dumps(tree))

    return spoil_and_seal


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def poison(value):
    def change(weights):
        weights["norm.bias"][3] = value

    return sealed(edit_weights(change))


def other_type(folder):
    """Declare other numbers of as many bytes; the rest of the file stays."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))


def other_weights(folder):
    make_upload(7, (1,) * 10).save(folder.parent / "client7")
    (folder / WEIGHTS).write_bytes((folder.parent / "client7" / WEIGHTS).read_bytes())


def sum_of(folder):
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


SPOILT = {
    "truncated": (truncate, "truncated"),
    "empty weights": (overwrite(WEIGHTS, b""), "corrupt"),
    "garbage weights": (overwrite(WEIGHTS, b"\xff" * 400), "corrupt"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "no card": (lambda folder: (folder / CARD).unlink(), CARD),
    "card not JSON": (overwrite(CARD, b"{client: 1"), CARD),
    "card not text": (overwrite(CARD, b"\xff\xfe\x00"), CARD),
    "card not an object": (overwrite(CARD, b"[1]"), CARD),
    "card nested deeply": (overwrite(CARD, b"[" * 10**5), CARD),
    "card too large": (edit_card(lambda c: c.update(name="n" * CARD_BYTES)), "larger"),
    "card of many faults": (edit_card(lambda c: c.update({str(i): 0 for i in range(80_000)})), "Extra"),
    "a key of two lines": (edit_card(lambda c: c.update({"a\nb": 0})), "Extra"),
    "card lacks size": (edit_card(lambda c: c.pop("size")), "size"),
    "card lacks checksum": (edit_card(lambda c: c.pop("sha256")), "sha256"),
    "size zero": (edit_card(lambda c: c.update(size=0)), "size"),
    "size not a number": (edit_card(lambda c: c.update(size="many")), "size"),
    "size no float holds": (edit_card(lambda c: c.update(size=10**400)), "size"),
    "negative client": (edit_card(lambda c: c.update(client=-1)), "client"),
    "unknown field": (edit_card(lambda c: c.update(images=[1, 2])), "images"),
    "unknown model": (edit_card(lambda c: c["shape"].update(name="resnet18")), "resnet18"),
    "a name of a book": (edit_card(lambda c: c["shape"].update(name="vit" * 50)), "shape.name"),
    "impossible size": (edit_card(lambda c: c["shape"].update(image_size=25)), "image_size=25"),
    "other classes": (sealed(edit_card(lambda c: c["shape"].update(num_classes=11))), "[11, 96]"),
    "counts too short": (sealed(edit_card(lambda c: c.update(class_counts=[20]))), "class_counts"),
    "other sum": (sealed(edit_card(lambda c: c.update(class_counts=[2] * 10, size=21))), "class_counts"),
    "negative": (sealed(edit_card(lambda c: c.update(class_counts=[-1, 21] + [0] * 8))), "class_counts"),
    "NaN": (poison(float("nan")), "NaN"),
    "Inf": (poison(float("-inf")), "NaN or Inf"),
    "missing weight": (edit_weights(lambda w: w.pop("norm.bias")), "missing"),
    "unknown weight": (edit_weights(lambda w: w.update(extra=torch.zeros(2))), "unknown"),
    "wrong shape": (edit_weights(lambda w: w.update({"norm.bias": torch.zeros(97)})), "[97]"),
    "wrong type": (edit_weights(lambda w: w.update({"norm.bias": torch.zeros(96).double()})), "float64"),
    "type that no model has": (other_type, "I32"),
    "other counts": (edit_card(lambda c: c.update(class_counts=[2] * 10)), "checksum"),
    "other client": (edit_card(lambda c: c.update(client=0)), "checksum"),
    "other weights": (other_weights, "checksum"),
    "checksum of the weights alone": (
        lambda f: edit_card(lambda c: c.update(sha256=sum_of(f)))(f),
        "checksum",
    ),
}


@pytest.mark.parametrize("spoil, word", SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_upload_is_one_line_naming_the_client(saved, spoil, word, one_line):
    spoil(saved)
    with pytest.raises(fm.BadInput) as error:
        fm.Upload.load(saved)
    one_line(error.value, "upload", word)
    told = ("client 1:", "client -1:", "client 0:", "'client1'")  # as far as the card says who
    assert any(who in str(error.value) for who in told), error.value
    assert len(str(error.value)) < 500


def test_a_model_that_was_not_expected_is_refused_before_the_weights_are_opened(saved, one_line):
    (saved / WEIGHTS).unlink()
    for change in (dict(name="test_vit"), dict(num_classes=9), dict(image_size=32), dict(in_chans=3)):
        shape = ModelShape(**{**dict(name="vit_micro", num_classes=10, image_size=24, in_chans=1), **change})
        with pytest.raises(fm.BadInput) as error:
            fm.Upload.load(saved, expected=shape)
        one_line(error.value, "client 1", "allowed is", str(next(iter(change.values()))))


def flipped(data, bit):
    """The same bytes but for one bit."""
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


@pytest.mark.parametrize("where, count", [("anywhere", 400), ("header", 100)])
def test_every_flipped_bit_of_the_weights_is_noticed(saved, where, count, one_line):
    data = (saved / WEIGHTS).read_bytes()
    end = len(data) if where == "anywhere" else 8 + int.from_bytes(data[:8], "little")
    rng = torch.Generator().manual_seed(0)
    for bit in torch.randint(8 * end, (count,), generator=rng).tolist():
        (saved / WEIGHTS).write_bytes(flipped(data, bit))
        with pytest.raises(fm.BadInput) as error:
            fm.Upload.load(saved)
        one_line(error.value, "client 1")


def test_a_flipped_bit_of_the_card_is_noticed_or_tells_the_same(saved, uploads, one_line):
    data = (saved / CARD).read_bytes()
    bits = torch.randperm(8 * len(data), generator=torch.Generator().manual_seed(0))[:400]
    for bit in bits.tolist():
        (saved / CARD).write_bytes(flipped(data, bit))
        try:
            assert fm.Upload.load(saved).card == uploads[1].card
        except fm.BadInput as error:
            one_line(error, "upload")


# Hostile cards: nothing is allocated for what they declare, and nothing is fetched for the names they give.

HOSTILE = [
    *(dict(num_classes=n) for n in (10**5, 10**9, 10**12, 10**30)),
    *(dict(image_size=n) for n in (32_768, 100_000, 10**9, 10**30)),
    *(dict(in_chans=n) for n in (4096, 10**6, 10**9, 10**30)),
    *(
        dict(name=n, image_size=224)
        for n in ("vit_gigantic_patch14_224", "vit_large_patch16_384.augreg_in21k")
    ),
    *(dict(name=n) for n in ("hf-hub:timm/vit_tiny_patch16_224", "local-dir:.", "../vit_micro", "", "a\nb")),
    dict(name="vit_huge_patch14_224", image_size=32_760, num_classes=10**5, in_chans=4096),
    *(dict(name=n, image_size=28_672) for n in ("swin_tiny_patch4_window7_224", "maxvit_tiny_tf_224")),
]


def test_a_hostile_card_makes_the_server_allocate_and_fetch_nothing(saved, refused_frugally):
    folders = []
    for number, change in enumerate(HOSTILE):
        folder = saved.parent / f"hostile{number}"
        folder.mkdir()
        (folder / WEIGHTS).hardlink_to(saved / WEIGHTS)
        card = json.loads((saved / CARD).read_text())
        card["shape"] |= change
        (folder / CARD).write_text(json.dumps(card))
        folders.append(str(folder))
    lines = refused_frugally(folders)
    assert len(lines) == len(HOSTILE) and all(line.startswith("upload of client 1: ") for line in lines)


def test_arrays_in_memory_are_checked_as_those_of_a_file(uploads, one_line):
    wanted = uploads[0].shape.arrays()
    check_arrays("stage 1", uploads[0].weights, wanted)
    for value, word in ((None, "NoneType"), (torch.zeros(3), "[3]"), (torch.full((96,), torch.nan), "NaN")):
        with pytest.raises(fm.BadInput) as error:
            check_arrays("stage 1", uploads[0].weights | {"norm.bias": value}, wanted)
        one_line(error.value, "stage 1", "norm.bias", word)


def test_members_of_one_ensemble_take_the_same_images(uploads, one_line):
    check_same_images(uploads)
    other = dataclasses.replace(uploads[1], shape=uploads[1].shape.model_copy(update={"image_size": 32}))
    for wrong, words in (([], ("uploads=[]",)), ([uploads[0], other], ("client 1", "32", "24"))):
        with pytest.raises(fm.BadInput) as error:
            check_same_images(wrong)
        one_line(error.value, *words)
