"""What the pages on privacy share: scores of invented Gaussian records, and a small audit."""

import numpy as np
import pytest
from helpers import SMALL_SETTINGS

from fedmitr.privacy.shadows import Audit, memberships


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def audit():
    """Two clients of about ninety 12×12 images; sixteen runs."""
    return Audit("smoke", SMALL_SETTINGS, runs=16, canaries=8, population=40)


@pytest.fixture
def gaussian():
    """gaussian(apart, runs, records, queries): scores, and who is a member.

    A member's scores are N(m + apart, 1), another's N(m, 1), with an m for each record.
    """

    def make(apart, runs=64, records=200, queries=1, seed=0):
        rng = np.random.default_rng(seed)
        member = memberships(runs, records, seed).numpy()
        level = 3 * rng.standard_normal((1, records, 1))
        noise = rng.standard_normal((runs, records, queries))
        return level + apart * member[..., None] + noise, member

    return make
