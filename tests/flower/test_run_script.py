"""tools/flower_run.py: both of its runs over Flower's real processes, at toy size."""

import pandas as pd
import pytest
from click.testing import CliRunner
from helpers import SMALL_RUN

pytest.importorskip("flwr")

import flower_run

SMALL = SMALL_RUN | {"partition.clients": 3, "partition.alpha": 1.0}


def test_both_runs_make_the_model_of_one_process(tmp_path, monkeypatch):
    """Whether the killed client's upload came before or not, the model is that of the uploads that did."""
    monkeypatch.setenv("TQDM_DISABLE", "1")  # put back afterwards; the script takes it away
    options = [
        word for name, value in SMALL.items() for word in ("--set", f"{name}={value}".replace(" ", ""))
    ]
    done = CliRunner().invoke(
        flower_run.main,
        [*options, "--seed", "5", "--out", str(tmp_path / "flower.csv")],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "flower.csv")
    assert table["killed"].tolist() == [0, 1] and table["usable_uploads"][0] == table["nodes"][0] == 3
    assert table["same_weights"].all()
    assert (table["accuracy_flower"] == table["accuracy_in_process"]).all()
    assert (table["upload_bytes"] > 0).all() and (table["profile"] == "smoke").all()
