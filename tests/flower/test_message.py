"""flower_app.py: an upload and an order as Flower's records, and what of them is refused."""

from dataclasses import replace

import pytest
import torch
from helpers import statistics_alone, with_statistics

pytest.importorskip("flwr")

from flwr.app import Array, ConfigRecord, Error, Message, RecordDict

from fedmitr.core.errors import BadInput
from fedmitr.flower_app import Order, accept, pack, unpack
from fedmitr.flower_message import flat, nested


@pytest.mark.parametrize("counted", [True, False])
def test_an_upload_survives_the_message_bit_for_bit(uploads, counted):
    upload = uploads[1] if counted else uploads[1].without_counts()
    again = unpack(pack(upload), 7, lambda client: upload.shape)
    assert again.digest == upload.digest and again.card == upload.card


def weight(name, change):
    def spoil(content):
        content["weights"][name] = Array(change(torch.from_numpy(content["weights"][name].numpy())))

    return spoil


def card(**fields):
    def spoil(content):
        for name, value in fields.items():
            name = name.replace("__", ".")
            content["card"].pop(name) if value is None else content["card"].__setitem__(name, value)

    return spoil


def cut(content):
    whole = content["weights"]["head.bias"]
    content["weights"]["head.bias"] = Array(whole.dtype, whole.shape, whole.stype, whole.data[:-9])


MALFORMED = {
    "shape": (weight("head.bias", lambda w: w[:3]), "client 1", "'head.bias'"),
    "type": (weight("head.bias", lambda w: w.double()), "client 1", "float64"),
    "nan": (weight("head.bias", lambda w: w * float("nan")), "client 1", "NaN"),
    "truncated": (cut, "client 1", "not readable"),
    "missing weight": (lambda c: c["weights"].pop("head.bias"), "client 1", "'head.bias' is missing"),
    "unknown weight": (lambda c: c["weights"].__setitem__("x", Array(torch.zeros(1))), "client 1", "unknown"),
    "no size": (card(size=None), "client 1", "size"),
    "size 0": (card(size=0), "client 1", "size"),
    "no client": (card(client=None), "node 7", "client"),
    "client -1": (card(client=-1), "client -1", "client"),
    "client by name": (card(client="me"), "node 7", "client"),
    "no shape": (card(shape__name=None), "client 1", "shape.name"),
    "another field": (card(images=3), "client 1", "images"),
    "another model": (card(shape__name="deit_tiny_patch16_224"), "client 1", "deit_tiny"),
    "a huge model": (card(shape__num_classes=10**12), "client 1", "num_classes"),
    "counts": (card(class_counts=[1, 2]), "client 1", "class_counts"),
    "counts of another size": (card(class_counts=[3] * 10), "client 1", "class_counts"),
    "no card": (lambda c: c.pop("card"), "node 7", "card"),
    "no weights": (lambda c: c.pop("weights"), "client 1", "declares card, weights"),
    "more than an upload": (lambda c: c.__setitem__("images", ConfigRecord()), "client 1", "images"),
    "weights that are no arrays": (
        lambda c: c.__setitem__("weights", ConfigRecord()),
        "client 1",
        "ConfigRecord",
    ),
    "statistics that no card declares": (
        lambda c: c.__setitem__("statistics", c["weights"]),
        "client 1",
        "holds card, statistics, weights",
    ),
    "nothing": (lambda c: c.clear(), "node 7", "nothing"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_upload_is_one_line_that_names_its_sender(case, uploads, one_line):
    spoil, *words = MALFORMED[case]
    content = pack(uploads[1])
    spoil(content)
    with pytest.raises(BadInput) as error:
        unpack(content, 7, lambda client: uploads[1].shape)
    one_line(error.value, *words)


def flip(content):
    """One bit of one weight, which stays finite."""
    bias = content["weights"]["head.bias"].numpy().copy()
    bias.view("uint8")[5] ^= 1
    content["weights"]["head.bias"] = Array(bias)


@pytest.mark.parametrize("spoil", [flip, card(size=31, class_counts=None)], ids=["weight", "card"])
def test_a_flipped_bit_is_one_line_that_names_the_client(spoil, uploads, one_line):
    content = pack(uploads[1])
    spoil(content)
    with pytest.raises(BadInput) as error:
        unpack(content, 7, lambda client: uploads[1].shape)
    one_line(error.value, "upload of client 1", "checksum")


def test_settings_survive_the_message(experiment):
    order = Order("dense", experiment.settings, ("a", "b"))
    assert Order.unpack(order.pack()) == order


@pytest.mark.parametrize(
    "change, word",
    [
        ({"client": 3}, "allowed are 0 to 2"),
        ({"class_counts": None}, "class_counts is missing"),
        ({"weights": None}, "weights are missing"),
        ({"statistics": None, "features": None}, "statistics are missing"),
    ],
)
def test_uploads_that_the_settings_do_not_ask_for_are_rejected(change, word, uploads, experiment, capfd):
    ask, order = Message(RecordDict(), 7, "train"), Order("fedmitr_plus", experiment.settings, ())
    whole = with_statistics(uploads[1], "regions", experiment.settings.model, views=8)
    (kept,) = accept({7: Message(pack(whole), reply_to=ask)}, order, order.shape)
    assert kept.digest == whole.digest
    content = pack(replace(whole, **change))
    assert accept({7: Message(content, reply_to=ask)}, order, order.shape) == []
    assert word in capfd.readouterr().err


def test_an_error_without_a_reason_is_one_line(uploads, experiment, capfd):
    ask = Message(RecordDict(), 7, "train")
    reasons = (None, "", "first\nsecond")
    replies = {node: Message(Error(0, reason), reply_to=ask) for node, reason in enumerate(reasons)}
    assert accept(replies, Order("fedmitr", experiment.settings, ()), uploads[0].shape) == []
    assert len(capfd.readouterr().err.splitlines()) == 3


# Statistics, beside weights and alone.


@pytest.fixture(params=["beside weights", "alone"])
def informed(request, uploads):
    upload = with_statistics(uploads[1])
    return upload if request.param == "beside weights" else statistics_alone(upload)


def test_statistics_survive_the_message_bit_for_bit(informed):
    content = pack(informed)
    parts = {"card", "statistics"} | ({"weights"} if informed.weights else set())
    assert set(content) == parts
    again = unpack(content, 7, lambda client: informed.shape, informed.features)
    assert again.digest == informed.digest and again.card == informed.card
    for name, value in vars(informed.statistics).items():
        assert torch.equal(getattr(again.statistics, name), value)


def sums(name, change):
    def spoil(content):
        array = torch.from_numpy(content["statistics"][name].numpy().copy())
        content["statistics"][name] = Array(change(array))

    return spoil


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


BAD_SUMS = {
    "a negative count": (sums("counts", put(0, -1)), "negative"),
    "other counts": (sums("counts", put(0, 3)), "size"),
    "NaN": (sums("sums", put((1, 0), float("nan"))), "sums holds NaN"),
    "a huge number": (sums("gram", put(0, 1e300)), "gram holds"),
    "no gram of images": (sums("gram", lambda gram: gram / 2), "no images have these sums"),
    "a gram of another width": (sums("gram", lambda gram: gram[:-1]), "'gram' is torch.float64 [4655]"),
    "single precision": (sums("sums", lambda array: array.float()), "float32"),
    "a missing array": (lambda c: c["statistics"].pop("sums"), "'sums' is missing"),
    "no statistics": (lambda c: c.pop("statistics"), "declares card, statistics"),
    "no arrays": (lambda c: c.__setitem__("statistics", ConfigRecord()), "ConfigRecord"),
    "other tokens": (card(features__tokens="both"), "allowed are those of tokens='cls'"),
    "another model": (card(features__shape__name="vit_micro_deep"), "allowed are those of"),
    "other weights": (card(features__weights="0" * 64), "allowed are those of"),
    "a huge model": (card(features__shape__num_classes=10**12), "features.shape.num_classes"),
    "features without tokens": (card(features__tokens=None), "features.tokens"),
    "a field of fields of fields": (lambda c: c["card"].__setitem__("a" + ".b" * 900, 1), "nested deeper"),
    "features of more": (card(features__images=3), "features.images"),
}


@pytest.mark.parametrize("case", BAD_SUMS)
def test_malformed_statistics_are_one_line_that_names_the_client(case, informed, one_line):
    spoil, word = BAD_SUMS[case]
    content = pack(informed)
    spoil(content)
    with pytest.raises(BadInput) as error:
        unpack(content, 7, lambda client: informed.shape, informed.features)
    one_line(error.value, "upload of client 1", word)


def test_another_bit_of_the_statistics_is_noticed(informed, one_line):
    content = pack(informed)
    sums("sums", lambda array: torch.nextafter(array, 2 * array))(content)
    with pytest.raises(BadInput) as error:
        unpack(content, 7, lambda client: informed.shape, informed.features)
    one_line(error.value, "client 1", "checksum")


def test_fields_of_fields_are_named_by_dots_and_come_back(informed):
    tree = informed.card.model_dump(exclude_none=True)
    names = flat(tree)
    assert {"shape.name", "features.tokens", "features.shape.in_chans"} <= set(names)
    assert not any(isinstance(value, dict) for value in names.values())
    again = nested(names)
    assert again["features"] == tree["features"] and again["shape"] == tree["shape"]
    hostile = nested({"shape": 1, "shape.name": "a", "shape.name.name": "b", "": 2})
    assert hostile["shape"] == {"name": {"name": "b"}}
