"""Pretraining of the shipped ViT-Micros: tell apart the 52 Latin letters (method step 0).

    python -m fedmitr.experiments.pretrain --model vit_micro

writes data/vit_micro_letters.safetensors and its card anew: the same bytes on the same machine with the same
libraries, with any number of cores.

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

from ..core.progress import progress
from ..data.letters import (
    HELD_OUT,
    LETTERS,
    font_files,
    handwrite,
    letter_scenes,
    render_letters,
)
from ..vision.vit import MICROS, create_vit, letter_weights, normalisation

STEPS = {"vit_micro": 3600, "vit_micro_early": 400, "vit_micro_patch6": 1800, "vit_micro_deep": 1800}
BATCH, LR, SEED = 256, 2e-3, 0


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
    name: str, steps: int, batch: int = BATCH, lr: float = LR, seed: int = SEED
) -> VisionTransformer:
    """Train a ViT-Micro on letters, with one cycle of the learning rate over the steps, and return it."""
    glyphs, labels = render_letters(_fonts(held_out=False))
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = create_vit(name, len(LETTERS)).train()
    mean, std = normalisation(model)
    optimizer = torch.optim.AdamW(_decayed_and_plain(model), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    with progress(steps, "letters", "step") as bar:
        for step in range(steps):
            pick = torch.randint(len(glyphs), (batch,), generator=rng)
            images = (letter_scenes(handwrite(glyphs[pick], rng), rng) - mean) / std  # (batch, 1, H, W)
            loss = F.cross_entropy(model(images), labels[pick], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.2f}")
            bar.update(1)
    return model.eval()


def _fonts(held_out: bool) -> list[Path]:
    """Return the font files that are held out, or those to train on."""
    return [font for font in font_files() if (font.stem in HELD_OUT) == held_out]


def _decayed_and_plain(model: VisionTransformer) -> list[dict[str, Any]]:
    """Return the parameters as two groups: matrices with weight decay, vectors without."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]


def describe(name: str, model: VisionTransformer, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the card of a pretrained model: what it saw, how it was trained, how well it reads letters."""
    seen, held_out, stats = _fonts(held_out=False), _fonts(held_out=True), normalisation(model)
    return {
        "model": f"{name}: " + ", ".join(f"{k}={v}" for k, v in MICROS[name].items()),
        "data": f"{len(LETTERS)} Latin letters in {len(seen)} fonts, rendered on the fly",
        "fonts": [font.stem for font in seen],
        "held-out fonts": [font.stem for font in held_out],
        "settings": settings | {"optimiser": "AdamW, one cycle"},
        "accuracy, training fonts": round(accuracy(model, *render_letters(seen), stats), 4),
        "accuracy, held-out fonts": round(accuracy(model, *render_letters(held_out), stats, repeats=32), 4),
        "torch": torch.__version__,
    }


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
@click.option("--steps", type=click.IntRange(1), help=f"Default: {STEPS}.")
@click.option("--batch", default=BATCH, show_default=True, type=click.IntRange(1))
@click.option("--lr", default=LR, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--seed", default=SEED, show_default=True, type=int)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Default: the shipped weights.")
def main(name: str, steps: int | None, batch: int, lr: float, seed: int, out: Path | None) -> None:
    """Regenerate a letter-pretrained ViT-Micro and its card."""
    torch.set_num_threads(1)  # sums over another number of threads round differently
    steps = steps or STEPS[name]
    start = time.perf_counter()
    model = pretrain(name, steps, batch, lr, seed)
    card = describe(name, model, {"steps": steps, "batch": batch, "peak lr": lr, "seed": seed})
    card["seconds"] = math.ceil(time.perf_counter() - start)
    write(model, card, out or letter_weights(name))
    click.echo(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
