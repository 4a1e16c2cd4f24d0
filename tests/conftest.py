"""What every test shares: tiny models with large weights, uploads made of them, small settings."""

import os

import pytest
import torch
from hypothesis import settings as hypothesis_settings

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("FEDMITR_JOBS", "1")  # small work: starting processes would take longer

from helpers import CLASSES, loud, make_upload

import fedmitr as fm
from fedmitr.settings.schema import TaskSettings
from fedmitr.vision.vit import normalisation

hypothesis_settings.register_profile("suite", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis_settings.load_profile("suite")
torch.set_num_threads(1)  # as settings.threads, so that every test computes alike


@pytest.fixture
def block_passes():
    """How many images go through a transformer block together, one entry for each time that one runs."""
    from timm.layers import Mlp  # after fedmitr, which lets timm import torchvision

    seen = []

    def count(module, _, output):
        if isinstance(module, Mlp):  # one in every block
            seen.append(len(output))

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    yield seen
    hook.remove()


@pytest.fixture(scope="session")
def micro():
    """ViT-Micro with loud random weights."""
    return loud(fm.create_vit("vit_micro", CLASSES), seed=0).requires_grad_(False)


@pytest.fixture(scope="session")
def images():
    return torch.randn(3, 1, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def uploads():
    """Three clients of different size; class 9 is held by nobody."""
    return [
        make_upload(0, (9, 8, 7, 0, 0, 0, 0, 0, 0, 0)),
        make_upload(1, (0, 2, 0, 4, 6, 8, 0, 0, 0, 0)),
        make_upload(2, (1, 0, 0, 0, 0, 3, 5, 2, 1, 0)),
    ]


@pytest.fixture(scope="session")
def ensemble(uploads):
    return fm.Ensemble(uploads)


@pytest.fixture(scope="session")
def task(micro):
    return fm.load_task(TaskSettings(), 0, 24, normalisation(micro))


@pytest.fixture(scope="session")
def synthetic():
    """Ten random images with 9 of 36 patches kept in each."""
    rng = torch.Generator().manual_seed(2)
    mask = torch.rand(10, 36, generator=rng).argsort(dim=1) < 9
    pixels = torch.randn(10, 1, 24, 24, generator=rng)
    return fm.SyntheticSet(pixels, torch.arange(10), mask, torch.zeros(10))


@pytest.fixture
def one_line(capsys):
    """Asserts that an error is a single line that holds the given words."""

    def check(error: BaseException, *words: str) -> None:
        text = str(error)
        assert text and "\n" not in text
        for word in words:
            assert word in text, text

    return check


@pytest.fixture
def forbid(monkeypatch):
    """forbid(module, *names): whoever calls one of these, fails."""

    def fail(*_, **__):
        raise AssertionError("worked")

    def put(module, *names):
        for name in names:
            monkeypatch.setattr(module, name, fail)

    return put
