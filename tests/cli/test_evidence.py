"""cli: `fedmitr tune` and `fedmitr study`, from options to files."""

import json

import pandas as pd
import pytest
import yaml
from helpers import SMALL_SETTINGS, call_cli
from small_protocol import PROTOCOL

SMALL = [word for name, value in SMALL_SETTINGS.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence")


def test_tune_writes_every_trial_and_what_won(folder):
    refused = call_cli("tune", "--methods", "ridge", "--trials", "3")
    assert refused.exit_code == 2 and "--out" in refused.stderr
    words = ["--methods", "ridge", "--starts", "vit_micro", "--trials", "3", "--seeds", "0-1"]
    files = ["--store", folder / "store", "--out", folder / "tuning.csv", "--tuned", folder / "tuned.yaml"]
    done = call_cli("tune", *words, "--profile", "smoke", *SMALL, *files)
    assert done.exit_code == 0, done.output
    trials = pd.read_csv(folder / "tuning.csv")
    assert trials["trial"].tolist() == [0, 1, 2]
    won = yaml.safe_load((folder / "tuned.yaml").read_text())["smoke"]["vit_micro"]["ridge"]
    done = trials[trials["state"] == "complete"]
    assert json.loads(done.loc[done["accuracy"].idxmax(), "values"]) == won


def test_study_runs_the_protocol_reports_and_runs_rows_again(folder):
    path, out = folder / "protocol.yaml", folder / "study.csv"
    grounds = {"early": PROTOCOL["grounds"]["early"] | {"methods": ["fedmitr_plus", "ncm"], "seeds": "30-31"}}
    path.write_text(yaml.safe_dump(PROTOCOL | {"grounds": grounds, "claims": []}))
    options = ["--protocol", path, "--store", folder / "store", "--out", out]
    alone = call_cli("study", "--protocol", path)
    assert alone.exit_code == 2 and "--out" in alone.stderr
    for words in (["--report", "--freeze"], ["--cell", "ncm"]):
        assert call_cli("study", *options, *words).exit_code == 2
    refused = call_cli("study", *options)
    assert refused.exit_code == 2 and "--freeze" in refused.stderr and not out.exists()
    assert call_cli("study", *options, "--freeze").exit_code == 0
    text = path.read_bytes()
    summary = call_cli("study", *options)
    assert summary.exit_code == 0, summary.output
    rows, report = out.read_bytes(), out.with_suffix(".json").read_bytes()
    assert set(json.loads(report)["parts"]) == {"early", "heads"}
    assert call_cli("study", *options, "--report").exit_code == 0
    again = call_cli("study", *options, "--again", "early", "--cell", "ncm", "--seeds", "31")
    assert again.exit_code == 0, again.output
    cells = again.stdout.strip().splitlines()[-1].split()
    assert cells[:4] == ["early", "ncm", "ncm", "31"] and cells[4] == cells[5]
    assert out.read_bytes() == rows and out.with_suffix(".json").read_bytes() == report
    assert path.read_bytes() == text
