"""pretrain.py: what the shared model is shown before any client trains."""

import json

import pytest
import torch
from click.testing import CliRunner

import fedmitr as fm
from fedmitr.core.paths import shipped
from fedmitr.data.letters import HELD_OUT
from fedmitr.experiments.pretrain import STEPS, main, pretrain
from fedmitr.vision.vit import MICROS


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


def test_a_model_is_trained_for_its_own_number_of_steps(monkeypatch, tmp_path):
    asked = []

    def record(name, steps, *_):
        asked.append((name, steps))
        return fm.create_vit(name, 52)

    monkeypatch.setattr("fedmitr.experiments.pretrain.pretrain", record)
    monkeypatch.setattr("fedmitr.experiments.pretrain.accuracy", lambda *_, **__: 0.5)
    for name in MICROS:
        done = CliRunner().invoke(main, ["--model", name, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
    assert asked == [(name, STEPS[name]) for name in MICROS] and STEPS.keys() == MICROS.keys()


@pytest.mark.parametrize("name", MICROS)
def test_a_card_says_how_its_weights_were_made(name):
    card = shipped(f"data/{name}_letters.safetensors").with_suffix(".md").read_text()
    rows = [line.strip("| ").split(" | ", 1) for line in card.splitlines() if line.startswith("| ")]
    made = json.loads(dict(row for row in rows if len(row) == 2)["settings"])
    assert made["steps"] == STEPS[name]
    assert (made["batch"], made["peak lr"], made["seed"]) == (256, 0.002, 0)


def test_training_is_the_same_bytes_whatever_was_drawn_before():
    torch.manual_seed(5)
    first = pretrain("vit_micro", 2, batch=8).state_dict()
    torch.rand(3)
    again, other = (pretrain("vit_micro", 2, batch=8, seed=s).state_dict() for s in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_the_learning_rate_makes_one_cycle_over_the_steps(monkeypatch):
    """Up by a cosine in the first tenth, from a 25th of the peak, then down to a 10,000th of that."""
    seen, step = [], torch.optim.AdamW.step

    def record(self, *args):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    pretrain("vit_micro", 21, batch=2, lr=0.5)
    rates, same = torch.tensor(seen, dtype=torch.double).T  # (21,) each: of matrices, of vectors
    rise = 0.1 * 21 - 1  # step of the peak
    at = torch.arange(21, dtype=torch.double)
    up = 0.02 + (0.5 - 0.02) * (1 - torch.cos(torch.pi * at / rise)) / 2
    down = 2e-6 + (0.5 - 2e-6) * (1 + torch.cos(torch.pi * (at - rise) / (20 - rise))) / 2
    torch.testing.assert_close(rates, torch.where(at <= rise, up, down), rtol=1e-6, atol=1e-9)
    assert torch.equal(rates, same)
