"""FedAvg: the average of the uploads, weighted by shard size."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import small

import fedmitr as fm
from fedmitr.core.store import Store
from fedmitr.methods import METHODS
from fedmitr.methods.fedavg import average_weights
from fedmitr.upload import ModelShape


def test_the_average_weighs_clients_by_their_images(clients):
    sizes = np.array([24, 20, 12])
    assert [u.size for u in clients] == sizes.tolist()
    found = average_weights(clients)
    assert set(found) == set(clients[0].weights)
    for name, value in found.items():
        stacked = np.stack([u.weights[name].double().numpy() for u in clients])
        wanted = np.tensordot(sizes / sizes.sum(), stacked, axes=1)
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-7)
        assert value.dtype == clients[0].weights[name].dtype


def test_one_client_is_its_own_average(clients):
    assert all(torch.equal(v, clients[0].weights[n]) for n, v in average_weights(clients[:1]).items())


def test_one_model_is_left_in_evaluation_mode_after_one_exchange(clients, tmp_path):
    outcome = METHODS["fedavg"](clients, small(), Store(tmp_path))
    (model,), wanted = outcome.models, average_weights(clients)
    assert all(torch.equal(v, wanted[n]) for n, v in model.state_dict().items())
    assert not model.training and outcome.uplink_bytes is None
    assert outcome.synthetic is None and outcome.student_steps == 0


def test_no_uploads_and_several_architectures_are_one_line(clients, one_line):
    with pytest.raises(fm.BadInput) as error:
        average_weights([])
    one_line(error.value)
    other = fm.create_vit("vit_micro_deep", 10, image_size=12)
    deep = dataclasses.replace(
        clients[0], client=1, shape=ModelShape.of("vit_micro_deep", other), weights=other.state_dict()
    )
    with pytest.raises(fm.BadInput) as error:
        average_weights([clients[0], deep])
    one_line(error.value, "client 1")


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=4))
def test_identical_uploads_average_to_one_of_them(clients, sizes):
    copies = [dataclasses.replace(clients[0], client=k, size=n) for k, n in enumerate(sizes)]
    for name, value in average_weights(copies).items():
        torch.testing.assert_close(value, clients[0].weights[name], rtol=1e-6, atol=1e-8)


def test_a_client_that_holds_nearly_everything_is_nearly_the_average(clients):
    big = dataclasses.replace(clients[0], size=10**9)
    average = average_weights([clients[1], big])
    torch.testing.assert_close(average["pos_embed"], big.weights["pos_embed"], rtol=1e-4, atol=1e-6)


def test_the_average_does_not_depend_on_the_order(clients):
    one, two = average_weights(clients), average_weights(clients[::-1])
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)
