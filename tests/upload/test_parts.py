"""message.py: uploads with sums of features, beside the weights or alone, and what of them is refused."""

import contextlib
import dataclasses
import json

import pytest
import torch
from helpers import make_upload, with_statistics
from safetensors.torch import load_file, save_file

import fedmitr as fm
from fedmitr.settings.schema import ModelSettings
from fedmitr.upload import CARD, STATISTICS, WEIGHTS, Statistics, Upload, check_weights


@pytest.fixture(params=["whole", "alone"])
def upload(request):
    return request.getfixturevalue(request.param)


def test_an_upload_comes_back_bit_for_bit(upload, tmp_path):
    upload.save(tmp_path)
    again = Upload.load(tmp_path, upload.shape, upload.features)
    assert again.card == upload.card and again.digest == upload.digest and again.bytes == upload.bytes
    for name, value in vars(upload.statistics).items():
        assert torch.equal(getattr(again.statistics, name), value)
    assert (again.weights is None) == (upload.weights is None)
    for name, value in (upload.weights or {}).items():
        assert torch.equal(again.weights[name], value)
    assert again.checked() is again


def test_bytes_are_the_sizes_of_the_files_without_the_checksum(upload, tmp_path):
    upload.save(tmp_path)
    sent = {WEIGHTS, STATISTICS, CARD} if upload.weights else {STATISTICS, CARD}
    assert {f.name for f in tmp_path.iterdir()} == sent
    card = json.loads((tmp_path / CARD).read_text())
    assert card.pop("sha256") == upload.digest
    arrays = sum((tmp_path / name).stat().st_size for name in sent - {CARD})
    assert upload.bytes == arrays + len(json.dumps(card, separators=(",", ":")).encode())


def test_a_card_of_weights_alone_mentions_no_statistics(whole, alone):
    """So uploads that were stored before there were any stay as they are."""
    fields = {"client", "size", "shape", "class_counts"}
    assert set(json.loads(whole.without_statistics().card.model_dump_json())) == fields
    assert set(json.loads(whole.card.model_dump_json())) == fields | {"features"}
    assert set(json.loads(alone.card.model_dump_json())) == fields | {"weights", "features"}


def test_statistics_alone_are_a_fraction_of_the_weights(whole, alone):
    gram = 8 * (96 * 97 // 2 + 96 * 10 + 10)  # the counts, the sums and half the Gram matrix
    assert gram < alone.bytes < gram + 1000
    assert whole.bytes == whole.without_statistics().bytes + alone.bytes + (
        whole.card.bytes - whole.without_statistics().card.bytes - alone.card.bytes
    )


@pytest.mark.parametrize("name", ["counts", "sums", "gram"])
def test_the_digest_changes_with_every_array(upload, name):
    nudged = getattr(upload.statistics, name).clone()
    nudged.view(-1)[0] += 1
    other = dataclasses.replace(upload, statistics=dataclasses.replace(upload.statistics, **{name: nudged}))
    assert other.digest != upload.digest


def test_the_digest_tells_apart_what_is_sent_and_what_it_is_said_to_be(whole, alone):
    named = dataclasses.replace(whole, features=whole.features.model_copy(update={"weights": "others"}))
    uploads = [whole, alone, named, whole.without_counts(), whole.without_statistics()]
    assert len({u.digest for u in uploads}) == 5
    again = whole.without_statistics().with_statistics(whole.statistics, whole.features)
    assert again.digest == whole.digest and whole.without_statistics().statistics is None


def test_without_weights_there_is_no_model(alone, one_line):
    for ask in (alone.vit, lambda: check_weights([alone])):
        with pytest.raises(fm.BadInput) as error:
            ask()
        one_line(error.value, "client 1", "has no weights")


# In memory.

WRONG = {
    "neither weights nor statistics": (
        lambda u: dataclasses.replace(u.without_statistics(), weights=None),
        "neither weights nor statistics",
    ),
    "statistics of nothing": (lambda u: dataclasses.replace(u, features=None), "features"),
    "features without statistics": (lambda u: dataclasses.replace(u, statistics=None), "features"),
    "other counts than the histogram": (
        lambda u: dataclasses.replace(u, class_counts=(2,) * 10),
        "counts differ from class_counts",
    ),
    "statistics of fewer images": (
        lambda u: dataclasses.replace(u, class_counts=None, size=u.size + 1),
        "its size is 21",
    ),
    "features of other images": (
        lambda u: dataclasses.replace(
            u, features=u.features.model_copy(update={"shape": u.shape.model_copy(update={"image_size": 28})})
        ),
        "28",
    ),
    "features of more tokens": (
        lambda u: dataclasses.replace(u, features=u.features.model_copy(update={"tokens": "both"})),
        "192",
    ),
    "statistics in single precision": (
        lambda u: dataclasses.replace(
            u, statistics=Statistics(u.statistics.counts, u.statistics.sums.float(), u.statistics.gram)
        ),
        "float32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_client_can_send_is_one_line(name, whole, one_line):
    spoil, word = WRONG[name]
    with pytest.raises(fm.BadInput) as error:
        spoil(whole).checked()
    one_line(error.value, "upload of client 1: ", word)


# On disk.


def edit_arrays(change):
    def spoil(folder):
        arrays = load_file(folder / STATISTICS)
        change(arrays)
        save_file(arrays, folder / STATISTICS)

    return spoil


def edit_card(change):
    def spoil(folder):
        card = json.loads((folder / CARD).read_text())
        change(card)
        (folder / CARD).write_text(json.dumps(card))

    return spoil


def put(name, index, value):
    return edit_arrays(lambda arrays: arrays[name].__setitem__(index, value))


def widened(arrays):
    arrays["gram"] = torch.zeros(193 * 96, dtype=torch.double)


def declare(**change):
    return edit_card(lambda card: card["features"]["shape"].update(change))


SPOILT = {
    "no file": (lambda folder: (folder / STATISTICS).unlink(), STATISTICS),
    "empty": (lambda folder: (folder / STATISTICS).write_bytes(b""), "corrupt"),
    "truncated": (
        lambda folder: (folder / STATISTICS).write_bytes((folder / STATISTICS).read_bytes()[:-8]),
        "corrupt or truncated",
    ),
    "a negative count": (put("counts", 0, -1), "negative"),
    "other counts": (put("counts", 0, 3), "size"),
    "NaN": (put("sums", (1, 3), float("nan")), "sums holds NaN"),
    "Inf": (put("gram", 5, float("inf")), "gram holds NaN"),
    "negative squares": (put("gram", 0, -1.0), "definite"),
    "a gram that no images have": (edit_arrays(lambda a: a["gram"].mul_(0.5)), "no images have"),
    "a gram of another width": (edit_arrays(widened), "'gram'"),
    "a whole gram": (
        edit_arrays(lambda a: a.update(gram=torch.eye(96, dtype=torch.double))),
        "allowed is torch.float64 [4656]",
    ),
    "single precision": (edit_arrays(lambda a: a.update(gram=a["gram"].float())), "float32"),
    "counts that are no integers": (
        edit_arrays(lambda a: a.update(counts=a["counts"].double())),
        "'counts'",
    ),
    "a missing array": (edit_arrays(lambda a: a.pop("sums")), "'sums' is missing"),
    "one array more": (edit_arrays(lambda a: a.update(images=torch.zeros(9))), "'images' is unknown"),
    "statistics of both tokens": (edit_card(lambda c: c["features"].update(tokens="both")), "[10, 192]"),
    "tokens that are none": (edit_card(lambda c: c["features"].update(tokens="all")), "tokens"),
    "features of no model": (declare(name="resnet18"), "resnet18"),
    "features of other classes": (declare(num_classes=11), "num_classes=11"),
    "features of more": (edit_card(lambda c: c["features"].update(images=3)), "images"),
    "a name of a book": (edit_card(lambda c: c["features"].update(weights="w" * 300)), "weights"),
    "nothing that is sent": (edit_card(lambda c: (c.update(weights=False), c.pop("features"))), "neither"),
    "weights that may be": (edit_card(lambda c: c.update(weights="perhaps")), "weights"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_upload_is_one_line_naming_the_client(name, upload, tmp_path, seal, one_line):
    """Even where its checksum is that of what was sent."""
    spoil, word = SPOILT[name]
    upload.save(tmp_path / "client1")
    spoil(tmp_path / "client1")
    with contextlib.suppress(OSError, ValueError):  # a file that is gone, a card that is none
        seal(tmp_path / "client1")
    with pytest.raises(fm.BadInput) as error:
        Upload.load(tmp_path / "client1")
    one_line(error.value, "upload of client 1: ", word)
    assert len(str(error.value)) < 500


OTHERS = [
    (dict(model=ModelSettings(name="vit_micro_deep")), "vit_micro_deep"),
    (dict(model=ModelSettings(pretrained=False)), "'vit_micro, p'"),
    (dict(tokens="patches"), "'patches'"),
]


@pytest.mark.parametrize("change, word", OTHERS, ids=["model", "weights", "tokens"])
def test_statistics_of_another_model_than_the_shared_one_are_refused_unread(
    change, word, whole, tmp_path, one_line
):
    with_statistics(whole, **change).save(tmp_path)
    (tmp_path / STATISTICS).unlink()
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(fm.BadInput) as error:
        Upload.load(tmp_path, whole.shape, whole.features)
    one_line(error.value, "client 1", word, "allowed are those of tokens='cls' of 'vit_micro'")


def test_a_flipped_bit_of_the_statistics_is_noticed(alone, tmp_path, one_line):
    alone.save(tmp_path)
    data = (tmp_path / STATISTICS).read_bytes()
    rng = torch.Generator().manual_seed(0)
    for bit in torch.randint(8 * len(data), (150,), generator=rng).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / STATISTICS).write_bytes(bytes(flipped))
        with pytest.raises(fm.BadInput) as error:
            Upload.load(tmp_path)
        one_line(error.value, "client 1")


HUGE = [
    *(dict(num_classes=n) for n in (10**5, 10**9, 10**30)),
    *(dict(image_size=n) for n in (32_768, 10**9)),
    dict(name="vit_gigantic_patch14_224", image_size=224),
    dict(name="vit_giant_patch14_224", image_size=224, num_classes=10**5),
    dict(name="hf-hub:timm/vit_tiny_patch16_224"),
]


def test_statistics_of_a_huge_model_are_refused_before_memory_is_taken(alone, tmp_path, refused_frugally):
    folders = []
    for number, change in enumerate(HUGE):
        folders.append(folder := tmp_path / f"hostile{number}")
        alone.save(folder)
        card = json.loads((folder / CARD).read_text())
        for shape in (card["shape"], card["features"]["shape"]):
            shape |= change
        (folder / CARD).write_text(json.dumps(card))
    lines = refused_frugally(folders)
    assert len(lines) == len(HUGE) and all(line.startswith("upload of client 1: ") for line in lines)


def test_weights_of_another_architecture_go_with_statistics_of_the_shared_model(tmp_path):
    """The statistics are always the shared model's, so that those of clients whose ViTs differ add."""
    client = make_upload(1, (0, 2, 0, 4, 6, 8, 0, 0, 0, 0))
    deep = with_statistics(client, model=ModelSettings(name="vit_micro_deep"))
    deep.save(tmp_path)
    again = Upload.load(tmp_path)
    assert (again.shape.name, again.features.shape.name) == ("vit_micro", "vit_micro_deep")
    assert again.statistics.width == again.features.width == 64
