"""Images of the 52 Latin letters, on which the shipped ViT-Micros are pretrained (method step 0).

The letters are drawn with the fonts that matplotlib ships, bent, thickened and blurred as handwriting and
scanners do, then placed on the same kind of scenes as the digits of the federated task. No digit is ever
drawn. Some fonts are held out for validation. `experiments/pretrain.py` does the training.
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
SYMBOLS = ("cmex10", "cmsy10")  # have brackets and arrows in place of letters: left out
GLYPH = 40  # side of a stored glyph, pixels


def font_files() -> list[Path]:
    """List matplotlib's fonts that have all 52 letters, without display variants, sorted by name."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [f for f in sorted(folder.glob("*.ttf")) if "Display" not in f.name and f.stem not in SYMBOLS]
    return [f for f in fonts if set(map(ord, LETTERS)) <= FT2Font(str(f)).get_charmap().keys()]


def render_letters(fonts: list[Path]) -> tuple[Tensor, Tensor]:
    """Draw all letters in all fonts: glyphs (n, 1, 40, 40) in [0, 1] that fill the frame; labels (n,)."""
    glyphs, labels = [], []
    for font in fonts:
        face = ImageFont.truetype(str(font), 96)
        for label, letter in enumerate(LETTERS):
            left, top, right, bottom = face.getbbox(letter)
            side = max(right - left, bottom - top)
            frame = Image.new("L", (side, side))
            corner = ((side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top)
            ImageDraw.Draw(frame).text(corner, letter, fill=255, font=face)
            glyphs.append(np.asarray(frame.resize((GLYPH, GLYPH), Image.Resampling.BOX)) / 255)
            labels.append(label)
    return torch.tensor(np.stack(glyphs), dtype=torch.float32)[:, None], torch.tensor(labels)


def handwrite(glyphs: Tensor, rng: torch.Generator) -> Tensor:
    """Bend and thicken the strokes of glyphs (n, 1, 40, 40), and blur half of them as a coarse scan does."""
    n = len(glyphs)
    bend = torch.randn(n, 2, 4, 4, generator=rng) * 0.11  # shifts (x, y), smooth over the glyph
    bend = F.interpolate(bend, size=GLYPH, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)  # to last
    straight = F.affine_grid(torch.eye(2, 3).expand(n, -1, -1), list(glyphs.shape), align_corners=False)
    glyphs = F.grid_sample(glyphs, straight * 1.1 + bend, align_corners=False)
    thick = F.max_pool2d(glyphs, 5, stride=1, padding=2)
    blend = torch.rand(n, 1, 1, 1, generator=rng)
    glyphs = glyphs + blend * (thick - glyphs)
    coarse = F.interpolate(F.interpolate(glyphs, size=9, mode="area"), size=GLYPH, mode="bicubic")
    blur = (torch.rand(n, 1, 1, 1, generator=rng) < 0.5).float()
    return (glyphs + blur * (coarse - glyphs)).clamp(0, 1)


def letter_scenes(glyphs: Tensor, rng: torch.Generator) -> Tensor:
    """Place glyphs (n, 1, 40, 40) at random in scenes (n, 1, 24, 24) in [0, 1] with random clutter."""
    n, size = len(glyphs), VIT_MICRO["img_size"]
    maps = random_affine(n, rng, scale=(0.42, 0.8), degrees=20, shift=0.35, shear=0.25)
    clutter = torch.rand(n, 1, 1, 1, generator=rng) * 0.7
    brightness = 0.75 + 0.25 * torch.rand(n, 1, 1, 1, generator=rng)
    return compose(place(glyphs, size, maps), clutter * texture(n, size, rng), brightness)
