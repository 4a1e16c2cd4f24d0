"""cli.py, what lists: `fedmitr info | methods | settings | --help`."""

import json

import torch
from helpers import call_cli, read_cli, registrations_taken_back

from fedmitr.methods import METHODS, Method, register
from fedmitr.settings import PROFILES, fields


def test_info_says_what_is_installed():
    facts = read_cli("info", "--json")
    assert facts["torch"] == torch.__version__ or facts["torch"] == torch.__version__.split("+")[0]
    assert {"python", "timm", "device", "threads", "dask", "ray", "flwr"} <= set(facts)
    told = call_cli("info")
    assert told.exit_code == 0 and facts["timm"] in told.stdout


def test_settings_lists_every_setting_with_meaning_and_source():
    listed = call_cli("settings").stdout
    rows = [json.loads(line) for line in call_cli("settings", "--json").stdout.splitlines()]
    assert [row["setting"] for row in rows] == [row["setting"] for row in fields()]
    for row in rows:
        assert f"{row['setting']} = " in listed and row["meaning"] in listed and row["source"] in listed


def test_methods_lists_every_record_one_line_each():
    with registrations_taken_back():
        register(Method("mine", METHODS["fedavg"].run, label="Mine", family="average"))
        header, *lines, last = call_cli("methods").stdout.splitlines()
        rows = [json.loads(line) for line in call_cli("methods", "--json").stdout.splitlines()]
        records = list(METHODS.values())
    assert [row["name"] for row in rows] == [line.split()[0] for line in lines] == [r.name for r in records]
    for line, row, record in zip(lines, rows, records, strict=True):
        assert all(text in line for text in (record.label, record.family, record.citation))
        assert (row["label"], row["family"], row["citation"]) == (
            record.label,
            record.family,
            record.citation,
        )
    found = {row["name"]: (row["sends"], row["exchanges"], row["models"]) for row in rows}
    everything = ["weights", "class histogram", "statistics"]
    assert found["mine"] == found["fedmitr"] == (["weights"], 1, 1)
    assert found["fedftg"] == (everything[:2], 1, 1) and found["fedmitr_plus"] == (everything, 1, 1)
    assert found["fusefl"] == (["weights"], "fusefl.stages", "K")
    assert found["ridge"] == (["statistics"], 1, 1) and found["central_ridge"] == ([], 0, 1)
    assert found["fedavg_ridge"] == (["weights", "statistics"], 2, 1)
    assert found["stacking"] == (["weights", "statistics"], 2, "K")
    assert found["local"] == ([], 0, 1) and found["ensemble"] == (["weights"], 1, "K")
    assert header.split()[:5] == ["name", "label", "family", "clients", "send"]
    (ridge,) = (line for line in lines if line.startswith("ridge "))
    (local,) = (line for line in lines if line.startswith("local "))
    assert " statistics " in ridge and " nothing " in local and last.startswith("models:")


def test_help_names_methods_and_profiles():
    told = " ".join(call_cli("run", "--help").stdout.split())
    assert all(word in told for word in (*METHODS, *PROFILES, "--set", "--json", "--store", "--jobs"))
    commands = call_cli("--help").stdout
    assert all(word in commands for word in ("run", "compare", "reproduce", "info", "methods", "settings"))
    assert call_cli("--version").stdout.strip().endswith("0.1.0")
