"""local, ensemble and central: what methods are measured against (the others: test_bounds.py)."""

import dataclasses

import pytest
import torch
from helpers import make_upload
from tiny_runs import small

import fedmitr as fm
from fedmitr.core.store import Store
from fedmitr.methods import METHODS
from fedmitr.methods._student import student_start
from fedmitr.methods.co_boosting import MODE
from fedmitr.methods.fedftg import class_ensemble
from fedmitr.server.ensemble import class_weights
from fedmitr.settings.schema import EnsembleSettings

CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(3))


def test_local_is_every_clients_own_model_and_costs_no_bytes_up(clients, pixels, tmp_path):
    outcome = METHODS["local"](clients, small(), Store(tmp_path))
    assert len(outcome.models) == len(clients)
    for upload, model in zip(clients, outcome.models, strict=True):
        assert torch.equal(model(pixels), upload.vit()(pixels)) and not model.training
    assert (METHODS["local"].sends, METHODS["local"].exchanges, outcome.downlink_bytes) == (False, 0, None)


@pytest.mark.parametrize("mode", ["mean_probs", "mean_logits", "size", "class"])
def test_the_ensemble_is_that_of_the_runs_settings(mode, clients, pixels, tmp_path):
    outcome = METHODS["ensemble"](clients, small({"ensemble.mode": mode}), Store(tmp_path))
    (found,), wanted = outcome.models, fm.Ensemble(clients, EnsembleSettings(mode=mode))
    assert torch.equal(found(pixels), wanted(pixels))
    assert (METHODS["ensemble"].exchanges, outcome.uplink_bytes) == (1, None)


def test_central_is_the_model_of_the_one_client_and_exchanges_nothing(clients, pixels, tmp_path):
    outcome = METHODS["central"](clients[:1], small(), Store(tmp_path))
    (model,) = outcome.models
    assert torch.equal(model(pixels), clients[0].vit()(pixels)) and not model.training
    assert (METHODS["central"].sends, METHODS["central"].exchanges, outcome.downlink_bytes) == (False, 0, 0)
    with pytest.raises(ValueError):
        METHODS["central"](clients, small(), Store(tmp_path))


def test_with_identical_uploads_every_aggregate_is_one_of_them(pixels, tmp_path):
    client = make_upload(1, (3, 0, 2, 0, 0, 1, 0, 0, 0, 1), side=12)
    copies = [dataclasses.replace(client, client=k) for k in range(3)]
    one = client.vit()(pixels).log_softmax(-1)
    (fedavg,) = METHODS["fedavg"](copies, small(), Store(tmp_path)).models
    torch.testing.assert_close(fedavg(pixels).log_softmax(-1), one, **CLOSE)
    for mode in ("mean_probs", "mean_logits", "size", "class"):
        ensemble = fm.Ensemble(copies, EnsembleSettings(mode=mode))
        torch.testing.assert_close(ensemble(pixels), one, **CLOSE)
        ensemble.mode = MODE  # as Co-Boosting combines them at first
        torch.testing.assert_close(ensemble(pixels), one, **CLOSE)
    known, labels = class_weights(copies), torch.tensor([0, 5, 8])  # nobody holds an 8
    torch.testing.assert_close(class_ensemble(ensemble.logits(pixels), labels, known), one, **CLOSE)
    for name, value in student_start(copies, small()).state_dict().items():
        torch.testing.assert_close(value, client.weights[name], rtol=1e-6, atol=1e-7)
