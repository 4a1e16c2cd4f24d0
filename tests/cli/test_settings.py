"""cli.py, what lists: `fedmitr info | methods | settings | --help`."""

import json

import torch
from helpers import call_cli, read_cli

from fedmitr.methods import METHODS
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


def test_help_names_methods_and_profiles():
    told = " ".join(call_cli("run", "--help").stdout.split())
    assert all(word in told for word in (*METHODS, *PROFILES, "--set", "--json", "--store", "--jobs"))
    commands = call_cli("--help").stdout
    assert all(word in commands for word in ("run", "compare", "reproduce", "info", "settings"))
    assert call_cli("--version").stdout.strip().endswith("0.1.0")
