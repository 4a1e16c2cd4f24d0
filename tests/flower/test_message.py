"""flower_app.py: an upload and an order as Flower's records, and what of them is refused."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ConfigRecord, Error, Message, RecordDict

from fedmitr.core.errors import BadInput
from fedmitr.flower_app import Order, accept, pack, unpack


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
    "no weights": (lambda c: c.pop("weights"), "node 7", "weights"),
    "more than an upload": (lambda c: c.__setitem__("images", ConfigRecord()), "node 7", "images"),
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
    [({"client": 3}, "allowed are 0 to 2"), ({"class_counts": None}, "class_counts is missing")],
)
def test_uploads_that_the_settings_do_not_ask_for_are_rejected(change, word, uploads, experiment, capfd):
    content = pack(replace(uploads[1], **change))
    ask = Message(RecordDict(), 7, "train")
    order = Order("fedmitr", experiment.settings, ())
    assert accept({7: Message(content, reply_to=ask)}, order, order.shape) == []
    assert word in capfd.readouterr().err


def test_an_error_without_a_reason_is_one_line(uploads, experiment, capfd):
    ask = Message(RecordDict(), 7, "train")
    reasons = (None, "", "first\nsecond")
    replies = {node: Message(Error(0, reason), reply_to=ask) for node, reason in enumerate(reasons)}
    assert accept(replies, Order("fedmitr", experiment.settings, ()), uploads[0].shape) == []
    assert len(capfd.readouterr().err.splitlines()) == 3
