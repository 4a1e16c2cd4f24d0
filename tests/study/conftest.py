"""The small protocol as a file, and made-up runs of it."""

import numpy as np
import pandas as pd
import pytest
import yaml
from small_protocol import PROTOCOL

from fedmitr.experiments.compare import ACCOUNT, SECONDS
from fedmitr.study.protocol import freeze_settings, read_protocol


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "protocol.yaml"
    path.write_text(yaml.safe_dump(PROTOCOL, sort_keys=False, allow_unicode=True))
    return path


@pytest.fixture
def protocol(file):
    freeze_settings(file)
    return read_protocol(file)


@pytest.fixture
def made_up():
    """runs(part, {cell: accuracies on seeds 30, 31, …}) -> rows as the study has them."""

    def runs(part, accuracies):
        rows = [
            {"part": part, "cell": cell, "method": cell, "seed": 30 + i, "accuracy": value, "settings": "x"}
            for cell, values in accuracies.items()
            for i, value in enumerate(np.asarray(values))
        ]
        return pd.DataFrame(rows).assign(**dict.fromkeys(ACCOUNT, 1), **dict.fromkeys(SECONDS, 2.0))

    return runs
