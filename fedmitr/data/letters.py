"""Pretraining of the shipped ViT-Micro: tell apart the 52 Latin letters (method step 0).

    python -m fedmitr.pretrain --model vit_micro    makes data/vit_micro_letters.safetensors and its card anew

Letters come from the fonts that matplotlib ships, bent, thickened and blurred as handwriting and
scanners do, then placed on the same scenes as the federated task. No digit is ever rendered. Some
fonts are held out: the card states the accuracy on them.
"""

import string
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..vision.augment import random_affine, texture
from ..vision.vit import VIT_MICRO
from .scenes import compose, place

LETTERS = string.ascii_letters
HELD_OUT = ("DejaVuSerif-Italic", "STIXGeneralBol", "cmss10", "DejaVuSansMono-Bold")
SYMBOLS = ("cmex10", "cmsy10")  # hold brackets and arrows under codes of letters: left out
GLYPH = 40  # side of a stored glyph, pixels


def font_files() -> list[Path]:
    """matplotlib's fonts that show all 52 letters, no mere display cuts, sorted by name."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [f for f in sorted(folder.glob("*.ttf")) if "Display" not in f.name and f.stem not in SYMBOLS]
    return [f for f in fonts if set(map(ord, LETTERS)) <= FT2Font(str(f)).get_charmap().keys()]


def render_letters(fonts: list[Path]) -> tuple[Tensor, Tensor]:
    """All letters in all fonts: glyphs (n, 1, 40, 40) in [0, 1], each filling its frame, and labels (n,)."""
    glyphs, labels = [], []
    for font in fonts:
        face = ImageFont.truetype(str(font), 96)
        for label, letter in enumerate(LETTERS):
            left, top, right, bottom = face.getbbox(letter)
            side = max(right - left, bottom - top)
            canvas = Image.new("L", (side, side))
            corner = ((side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top)
            ImageDraw.Draw(canvas).text(corner, letter, fill=255, font=face)
            glyphs.append(np.asarray(canvas.resize((GLYPH, GLYPH), Image.Resampling.BOX)) / 255)
            labels.append(label)
    return torch.tensor(np.stack(glyphs), dtype=torch.float32)[:, None], torch.tensor(labels)


def handwrite(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Glyphs (n, 1, h, h) with bent and thickened strokes at the resolution of a coarse scan."""
    n = len(glyphs)
    bend = torch.randn(n, 2, 4, 4, generator=generator) * 0.11
    bend = F.interpolate(bend, size=GLYPH, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    straight = F.affine_grid(torch.eye(2, 3).expand(n, -1, -1), list(glyphs.shape), align_corners=False)
    glyphs = F.grid_sample(glyphs, straight * 1.1 + bend, align_corners=False)
    thick = F.max_pool2d(glyphs, 5, stride=1, padding=2)
    blend = torch.rand(n, 1, 1, 1, generator=generator)
    glyphs = glyphs + blend * (thick - glyphs)
    coarse = F.interpolate(F.interpolate(glyphs, size=9, mode="area"), size=GLYPH, mode="bicubic")
    blur = (torch.rand(n, 1, 1, 1, generator=generator) < 0.5).float()
    return (glyphs + blur * (coarse - glyphs)).clamp(0, 1)


def letter_scenes(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Scenes (n, 1, 24, 24) in [0, 1] of glyphs at random scale, rotation, position and clutter."""
    n, size = len(glyphs), VIT_MICRO["img_size"]
    maps = random_affine(n, generator, scale=(0.42, 0.8), degrees=20, shift=0.35, shear=0.25)
    clutter = torch.rand(n, 1, 1, 1, generator=generator) * 0.7
    brightness = 0.75 + 0.25 * torch.rand(n, 1, 1, 1, generator=generator)
    return compose(place(glyphs, size, maps), clutter * texture(n, size, generator), brightness)
