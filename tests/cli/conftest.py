"""A run of FedMITR in a store that the pages about commands share."""

import importlib

import pytest
from helpers import SMALL_OPTIONS, read_cli

from fedmitr.experiments import clients

pipeline = importlib.import_module("fedmitr.methods.fedmitr")  # the package's name for it is the method


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def first(store):
    """One run of FedMITR, in a fresh store."""
    return read_cli("run", "--method", "fedmitr", "--seed", 3, "--json", *SMALL_OPTIONS, "--store", store)


@pytest.fixture
def no_work(forbid):
    """Every stage fails if it is run."""
    forbid(clients, "train_client", "sent_statistics")
    forbid(pipeline, "invert", "distill")
