"""What the pages on figures share: an invented comparison, images with a history, and a canvas."""

import pytest
import torch
from helpers import comparison_table
from matplotlib.backends.backend_agg import FigureCanvasAgg

import fedmitr as fm


@pytest.fixture
def table():
    """Five seeds of every method."""
    return comparison_table()


@pytest.fixture
def drawn():
    """drawn(figure): the figure, laid out as it is when it is saved."""

    def draw(figure):
        FigureCanvasAgg(figure).draw()
        return figure

    return draw


@pytest.fixture(scope="session")
def recorded_set(synthetic):
    """The synthetic images with three pictures on their way: 36, 25 and 9 patches left."""
    masks = torch.stack([torch.arange(36) < left for left in (36, 25, 9)])  # (F, N)
    history = {
        "frames": torch.stack([0.1 * k * synthetic.pixels for k in range(3)]),
        "frame_masks": masks[:, None].expand(-1, len(synthetic), -1),
        "frame_at": torch.tensor([0, 10, 20]),
    }
    return fm.SyntheticSet(synthetic.pixels, synthetic.labels, synthetic.mask, synthetic.loss, history)
