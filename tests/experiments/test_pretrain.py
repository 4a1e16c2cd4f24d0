"""pretrain.py: what the shared model is shown before any client trains."""

import json

import torch
from click.testing import CliRunner

import fedmitr as fm
from fedmitr.data.letters import HELD_OUT
from fedmitr.experiments.pretrain import main


def test_weights_and_card_are_written_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmitr.experiments.pretrain.accuracy", lambda *_, **__: 0.5)
    out = tmp_path / "new" / "weights.safetensors"
    done = CliRunner().invoke(main, ["--steps", "2", "--batch", "4", "--out", str(out)])
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout[done.stdout.index("{") :])
    assert card["settings"]["steps"] == 2 and len(card["held-out fonts"]) == len(HELD_OUT)
    vit = fm.create_vit("vit_micro", 52, checkpoint=out)
    untrained = fm.create_vit("vit_micro", 52)
    assert not torch.equal(vit.head.weight, untrained.head.weight)
    text = out.with_suffix(".md").read_text()
    assert f"| bytes | {out.stat().st_size} |" in text and "sha256" in text
    assert "python -m fedmitr.experiments.pretrain" in text and "fedmitr/experiments/pretrain.py" in text
