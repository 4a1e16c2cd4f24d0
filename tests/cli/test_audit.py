"""fedmitr audit: another audit than the shipped one needs a file; bad input is one line."""

import pandas as pd
import pytest
from helpers import SMALL_SETTINGS, call_cli

SET = [f"--set={name}={value}" for name, value in SMALL_SETTINGS.items() if name.split(".")[0] != "fishermix"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--runs", "16"], "--out"),
        (["--targets", "gram"], "--out"),
        (["--set", "client.epochs=1"], "--out"),
        (["--runs", "7", "--out", "x.csv"], "runs=7"),
        (["--targets", "weights", "--out", "x.csv"], "target='weights'"),
    ],
)
def test_what_cannot_work_is_one_line(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call_cli("audit", *options, "--store", tmp_path / "store")
    assert done.exit_code == 2 and said in done.output and done.output.count("\n") == 1


def test_a_small_audit_under_any_settings_is_written(tmp_path):
    out = tmp_path / "mine.csv"
    options = ["--profile", "smoke", "--targets", "class_sums,gram", "--runs", 16, "--canaries", 4]
    done = call_cli("audit", *options, *SET, "--store", tmp_path / "store", "--out", out)
    assert done.exit_code == 0, done.output
    table = pd.read_csv(out)
    assert set(table["target"]) == {"class_sums", "gram"} and "gram" in done.output
    assert (tmp_path / "mine_roc.csv").exists() and (tmp_path / "mine_seconds.csv").exists()
