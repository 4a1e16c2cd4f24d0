"""Small runs of every method, in a store that the pages about them share."""

import importlib

import pytest
from helpers import small_settings

import fedmitr as fm
from fedmitr.client.fusefl import FusionClient
from fedmitr.experiments import clients
from fedmitr.methods import METHODS


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def these(store):
    return fm.Experiment(small_settings(), store)


@pytest.fixture(scope="session")
def results(these):
    return {method: these.result(method) for method in METHODS}


@pytest.fixture
def no_work(forbid):
    """Whatever trains, sums features, inverts or distils for one exchange fails."""
    forbid(clients, "train_client", "sent_statistics")
    forbid(FusionClient, "_train")
    for method, name in [("fedmitr", "invert"), ("fedmitr", "distill"), ("fadi", "invert")]:
        forbid(importlib.import_module(f"fedmitr.methods.{method}"), name)
    for method, name in [("_generator", "take_step"), ("fdafl", "take_step"), ("fedftg", "client_logits")]:
        forbid(importlib.import_module(f"fedmitr.methods.{method}"), name)
    forbid(importlib.import_module("fedmitr.methods._student"), "train_student")
