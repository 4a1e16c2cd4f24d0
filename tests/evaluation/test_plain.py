"""plain.py and benchmarks/plain_loop.py: the plain loop against ours, and what it leaves behind."""

import ast
import random
from pathlib import Path

import pytest
import torch
from helpers import make_upload

import fedmitr as fm
from fedmitr.core.paths import home
from fedmitr.evaluation import bench, plain, timing
from fedmitr.server.inversion import invert, remaining
from fedmitr.settings.schema import EnsembleSettings, InversionSettings
from fedmitr.vision.patches import patchify

PACKAGE = Path(fm.__file__).parent
COUNTS = (1,) * 10
LABELS = torch.tensor([3, 0, 9, 3])


@pytest.fixture(scope="module", autouse=True)
def small_peak():
    """The machine's peak from small matrices: a number all the same."""
    before, timing.SIDE = timing.SIDE, 128
    yield
    timing.SIDE = before


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("stops, tv", [((), 0.0), ((), 0.003), ((2, 4), 0.0)])
@pytest.mark.parametrize("lr", [0.25, 1.0])
def test_the_plain_loop_makes_the_same_images_as_ours(stops, tv, lr, double, monkeypatch):
    """Without moves: the same start, Adam, total variation and clipping, and the same patches stop.

    Once patches have stopped there is no total variation: the published code goes on moving them by it.
    """
    teacher = fm.Ensemble([make_upload(0, COUNTS)], EnsembleSettings(mode="mean_logits")).double()
    ratios = (0.3,) * len(stops)
    settings = InversionSettings(
        teacher="ensemble", iterations=8, stop_at=stops, stop_ratio=ratios,
        lr=lr, betas=(0.5, 0.99), schedule="constant", tv_norm="norms", clip=True,
        ce=1 / len(LABELS), tv=tv / len(LABELS),  # a mean over images, as published, not our sum
        jitter=0.0, augment=0.0, flip=False, keep_best=False,
    )  # fmt: skip
    ours = invert(teacher, LABELS, settings, 0, recorded=4)
    start = ours.history["frames"][0].clone().requires_grad_()
    loop = plain.load_plain_loop()
    monkeypatch.setattr(loop.torch, "randn", lambda *_, **__: start)
    monkeypatch.setattr(loop.random, "random", lambda: 1.0)  # never mirrored
    found, keep = loop.invert_plainly(
        teacher.members[0], LABELS, 8, stops, plain.ratios_rounded_down(36, ratios), lr=lr, tv=tv, share=0.0
    )
    assert torch.equal(ours.mask, torch.zeros(4, 36, dtype=torch.bool).scatter(1, keep, True))
    one, other = (patchify(images, (4, 4))[ours.mask] for images in (ours.pixels, found))
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
    assert (other.abs() == 2).any()  # black and white in ViT-Micro's units
    assert (one - patchify(ours.history["frames"][0], (4, 4))[ours.mask]).abs().mean() > 0.3


def test_the_plain_loop_runs_in_float32_beside_ours_in_bfloat16(monkeypatch):
    loop, dtypes = plain.load_plain_loop(), set()
    real = loop.invert_plainly

    def record(vit, *args, **options):
        dtypes.update(p.dtype for p in vit.parameters())
        return real(vit, *args, **options)

    monkeypatch.setattr(loop, "invert_plainly", record)
    monkeypatch.setattr(bench, "load_plain_loop", lambda: loop)
    report = bench.bench_inversion(precision="bf16", batch=2, iterations=1, threads=1, against="plain")
    assert dtypes == {torch.float32} and report.precision == "bf16"
    assert report.speedup_dense > 0 and report.speedup_sparse > 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 36, 64, 196, 576])
def test_a_loop_that_rounds_down_keeps_as_many_patches_as_ours(count):
    ratios = (0.3,) * 4
    for stop, ratio in enumerate(plain.ratios_rounded_down(count, ratios)):
        count, before = int(count * (1 - ratio)), count
        assert count == remaining(before, ratios[:1]), stop


def test_the_plain_loop_runs_as_published_and_leaves_no_trace(monkeypatch):
    """Its teacher's parameters require gradients, and what it makes lies on the device that computes."""
    needs, states = [], (torch.get_rng_state(), random.getstate())
    loop = plain.load_plain_loop()
    real = loop.invert_plainly

    def record(vit, labels, iterations, stop_at, stop_ratio, **options):
        needs.append(all(p.requires_grad for p in vit.parameters()))
        images, keep = real(vit, labels, iterations, stop_at, stop_ratio, **options)
        assert keep.shape[1] == (9 if stop_at else 36) and options["tv"] == bench.TV
        assert all(p.grad is not None for p in vit.parameters())
        return images, keep

    monkeypatch.setattr(loop, "invert_plainly", record)
    uploads = bench.random_uploads("vit_micro", None, 1)
    teacher, vit = fm.Ensemble(uploads, EnsembleSettings(mode="mean_logits")), uploads[0].vit()
    runs = bench._Bench(teacher, vit, 2, 1, loop)._measure()[0]
    assert needs == [True] * (2 * bench.ROUNDS)
    assert {key: len(values) for key, values in runs.items()} == {
        (who, kind): bench.ROUNDS for who in ("ours", "plain") for kind in ("dense", "sparse")
    }
    for model in (teacher, vit):
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def imported(source):
    """Top-level names that a source imports anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_the_package_imports_nothing_from_benchmarks():
    sources = list(PACKAGE.rglob("*.py"))
    assert len(sources) > 20 and "torch" in set(imported((PACKAGE / "evaluation" / "plain.py").read_text()))
    for source in sources:
        assert "benchmarks" not in set(imported(source.read_text())), source
    for line in ("import benchmarks.plain_loop", "def f():\n    from benchmarks import plain_loop"):
        assert "benchmarks" in set(imported(line))


def test_the_plain_loop_stands_alone():
    names = set(imported((home() / plain.PLAIN).read_text()))
    assert names <= {"random", "torch", "timm"}
