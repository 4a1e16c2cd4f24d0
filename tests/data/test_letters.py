"""letters.py: glyphs of the 52 letters, and the scenes on which the shipped models are pretrained."""

import pytest
import torch

from fedmitr.data.letters import HELD_OUT, LETTERS, font_files, handwrite, letter_scenes, render_letters


@pytest.fixture(scope="module")
def fonts():
    return font_files()


@pytest.fixture(scope="module")
def rendered(fonts):
    """Glyphs (fonts, 52, 40, 40)."""
    glyphs, labels = render_letters(fonts)
    assert labels.tolist() == list(range(52)) * len(fonts)
    return glyphs.view(len(fonts), 52, 40, 40)


def test_letters_are_the_52_and_held_out_fonts_are_among_the_fonts(fonts):
    assert len(LETTERS) == 52 and not any(c.isdigit() for c in LETTERS)
    stems = [f.stem for f in fonts]
    assert set(HELD_OUT) < set(stems) and len(stems) == len(set(stems)) >= 10


def test_glyphs_fill_their_frame(rendered):
    assert rendered.min() >= 0 and rendered.max() <= 1
    tall = (rendered.amax(dim=3) > 0.1).double().mean(dim=2)
    wide = (rendered.amax(dim=2) > 0.1).double().mean(dim=2)
    filled = torch.maximum(tall, wide)
    assert filled.min() > 0.5 and filled.mean() > 0.95


def test_every_font_shows_the_letters_that_its_labels_say(fonts, rendered):
    """A symbol font would hold other signs under the letters' codes: none there looks like the others'."""
    flat = rendered.flatten(2)
    flat = flat - flat.mean(dim=2, keepdim=True)
    strange = []
    for i, font in enumerate(fonts):
        others = torch.cat([flat[:i], flat[i + 1 :]]).mean(dim=0)
        alike = torch.cosine_similarity(flat[i], others, dim=1)
        if alike[:26].mean() < 0.4 or alike[26:].mean() < 0.4:
            strange.append(font.stem)
    assert not strange


def test_scenes_are_drawn_by_their_generator_alone(rendered):
    glyphs = rendered[0, :8, None]

    def draw(seed):
        rng = torch.Generator().manual_seed(seed)
        return letter_scenes(handwrite(glyphs, rng), rng)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).shape == (8, 1, 24, 24)
    assert draw(0).min() >= 0 and draw(0).max() <= 1 + 1e-6
