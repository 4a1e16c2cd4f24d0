"""Pretraining of the shipped ViT-Micro: tell apart the 52 Latin letters (method step 0).

    python -m fedmitr.experiments.pretrain --model vit_micro

writes data/vit_micro_letters.safetensors and its card anew.

Letters come from the fonts that matplotlib ships, bent, thickened and blurred as handwriting and
scanners do, then placed on the same scenes as the federated task. No digit is ever rendered. Some
fonts are held out: the card states the accuracy on them.
"""

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from tqdm.auto import trange

from ..data.letters import (
    HELD_OUT,
    LETTERS,
    font_files,
    handwrite,
    letter_scenes,
    render_letters,
)
from ..vision.vit import MICROS, create_vit, letter_weights, normalisation


def accuracy(
    model: VisionTransformer,
    glyphs: Tensor,
    labels: Tensor,
    stats: tuple[Tensor, Tensor],
    repeats: int = 8,
) -> float:
    """Return the share of letters, in [0, 1], that the model classifies correctly.

    glyphs (n, 1, H, W) are placed `repeats` times on scenes drawn with a fixed seed; stats: mean and std of
    the model's normalisation.
    """
    rng = torch.Generator().manual_seed(1)
    hits = []
    with torch.inference_mode():
        for _ in range(repeats):
            images = (letter_scenes(handwrite(glyphs, rng), rng) - stats[0]) / stats[1]
            hits.append((model(images).argmax(1) == labels).float())
    return torch.cat(hits).mean().item()


def pretrain(
    name: str, steps: int, batch: int, lr: float, seed: int
) -> tuple[VisionTransformer, dict[str, Any]]:
    """Train a ViT-Micro on letters; return the model and its card: what it was trained on, and how well."""
    fonts = font_files()
    held_out = [f for f in fonts if f.stem in HELD_OUT]
    glyphs, labels = render_letters([f for f in fonts if f not in held_out])
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = create_vit(name, len(LETTERS)).train()
    stats = normalisation(model)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    start, bar = time.perf_counter(), trange(steps, desc="letters", unit="step")
    for step in bar:
        pick = torch.randint(len(glyphs), (batch,), generator=rng)
        images = letter_scenes(handwrite(glyphs[pick], rng), rng)
        loss = F.cross_entropy(model((images - stats[0]) / stats[1]), labels[pick], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")
    model.eval()
    card = {
        "model": f"{name}: " + ", ".join(f"{k}={v}" for k, v in MICROS[name].items()),
        "data": f"{len(LETTERS)} Latin letters in {len(fonts) - len(held_out)} fonts, rendered on the fly",
        "fonts": [f.stem for f in fonts if f not in held_out],
        "held-out fonts": [f.stem for f in held_out],
        "settings": {
            "steps": steps,
            "batch": batch,
            "peak lr": lr,
            "seed": seed,
            "optimiser": "AdamW, one cycle",
        },
        "accuracy, training fonts": round(accuracy(model, glyphs, labels, stats), 4),
        "accuracy, held-out fonts": round(accuracy(model, *render_letters(held_out), stats, repeats=32), 4),
        "seconds": math.ceil(time.perf_counter() - start),
        "torch": torch.__version__,
    }
    return model, card


def write(model: VisionTransformer, card: dict[str, Any], path: Path) -> None:
    """Write weights as safetensors, and the card as Markdown beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    card = card | {"parameters": sum(p.numel() for p in model.parameters()), "bytes": size, "sha256": digest}
    rows = [f"| {k} | {v if isinstance(v, str) else json.dumps(v)} |" for k, v in card.items()]
    text = [
        f"# {path.stem.removesuffix('_letters')}, pretrained on letters",
        "",
        "Made by `python -m fedmitr.experiments.pretrain`; see `fedmitr/experiments/pretrain.py`.",
    ]
    text += ["Random scale, rotation, position, stroke and background; no digit is ever rendered.", ""]
    path.with_suffix(".md").write_text("\n".join([*text, "| | |", "|---|---|", *rows, ""]))


@click.command()
@click.option("--model", "name", default="vit_micro", show_default=True, type=click.Choice(list(MICROS)))
@click.option("--steps", default=3600, show_default=True, type=click.IntRange(1))
@click.option("--batch", default=256, show_default=True, type=click.IntRange(1))
@click.option("--lr", default=2e-3, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Default: the shipped weights.")
def main(name: str, steps: int, batch: int, lr: float, seed: int, out: Path | None) -> None:
    """Regenerate a letter-pretrained ViT-Micro and its card."""
    model, card = pretrain(name, steps, batch, lr, seed)
    write(model, card, out or letter_weights(name))
    click.echo(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
