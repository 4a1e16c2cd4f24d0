"""bench.py and `fedmitr bench`: what is run, counted and reported. No times."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers import multiply_adds

import fedmitr as fm
from fedmitr.cli import main
from fedmitr.core.machine import device
from fedmitr.evaluation import bench, plain, timing
from fedmitr.settings.schema import InversionSettings

SPEED = {"seconds_per_iteration", "images_per_minute", "flops_per_iteration", "gflops", "share_of_peak"}
PLAIN_KEYS = {f"plain_{kind}_seconds_per_iteration" for kind in ("dense", "sparse")}
PLAIN_KEYS |= {"speedup_dense", "speedup_sparse"}
FAST = ["--batch", "2", "--iterations", "2", "--threads", "1"]


def fedmitr(*words):
    return CliRunner().invoke(main, ["bench", "inversion", *map(str, words)])


def report_of(*words):
    done = fedmitr(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module", autouse=True)
def small_peak():
    """The machine's peak from small matrices: a number all the same."""
    before, timing.SIDE = timing.SIDE, 128
    yield
    timing.SIDE = before


@pytest.fixture(scope="module")
def report():
    return report_of(*FAST, "--clients", 2, "--image-size", 32)


@pytest.fixture(scope="module")
def against():
    return report_of(*FAST, "--against", "plain")


# The report.


def test_the_report_says_what_was_measured(report):
    facts = {"model": "vit_micro", "image_size": 32, "batch": 2, "clients": 2, "precision": "fp32"}
    facts |= {"threads": 1, "patches": 64, "patches_left": 15}
    assert {name: report[name] for name in facts} == facts
    assert report["iterations_per_image"] == InversionSettings().iterations
    assert report["device"].startswith(device().type)
    assert report["peak_gflops"] > 0 and report["peak_memory_mb"] > 1
    assert not any(report[name] for name in PLAIN_KEYS)


def test_its_numbers_agree_with_each_other(report):
    dense, sparse = report["dense"], report["sparse"]
    for speed in (dense, sparse):
        assert set(speed) == SPEED and all(value > 0 for value in speed.values())
        seconds = speed["seconds_per_iteration"]
        assert speed["gflops"] == pytest.approx(speed["flops_per_iteration"] / seconds / 1e9)
        assert speed["share_of_peak"] == pytest.approx(speed["gflops"] / report["peak_gflops"])
        per_image = seconds * report["iterations_per_image"] / report["batch"]
        assert speed["images_per_minute"] == pytest.approx(60 / per_image)
    ratio = dense["seconds_per_iteration"] / sparse["seconds_per_iteration"]
    assert report["ratio"] == pytest.approx(ratio)
    assert report["flop_ratio"] == pytest.approx(dense["flops_per_iteration"] / sparse["flops_per_iteration"])
    assert report["flop_ratio"] > 64 / 15  # attention falls faster than the patches
    assert report["ratio_of_ceiling"] == pytest.approx(report["ratio"] / report["flop_ratio"])


def test_against_the_plain_loop_there_are_its_seconds_and_the_speedup(against):
    assert all(against[name] > 0 for name in PLAIN_KEYS)
    assert against["clients"] == 1 and against["patches_left"] == 9


def test_without_json_every_number_has_a_row(monkeypatch):
    speed = dict.fromkeys(SPEED, 2)
    numbers = {"batch": 2, "clients": 1, "image_size": 24, "threads": 1, "patches": 36, "patches_left": 9}
    numbers |= {"iterations_per_image": 80, "ratio": 3.25, "flop_ratio": 4.0, "ratio_of_ceiling": 0.8125}
    made = bench.Report(
        **numbers, model="m", precision="fp32", device="cpu", dense=speed, sparse=speed, peak_gflops=9.5,
        peak_memory_mb=None,
    )  # fmt: skip
    monkeypatch.setattr(bench, "bench_inversion", lambda **_: made)
    rows = dict(line.strip().split(": ") for line in fedmitr().stdout.splitlines())
    assert rows["ratio"] == "3.25" and rows["dense.gflops"] == "2" and rows["patches_left"] == "9"
    assert set(rows) == {*numbers, "model", "precision", "device", "peak_gflops"} | {
        f"{kind}.{name}" for kind in ("dense", "sparse") for name in SPEED
    }


def test_auto_is_resolved_and_bf16_counts_the_same_operations(monkeypatch):
    settings = dict(batch=2, iterations=1, threads=1)
    monkeypatch.setattr(bench, "native_bf16", lambda: True)
    half = bench.bench_inversion(precision="auto", **settings)
    monkeypatch.setattr(bench, "native_bf16", lambda: False)
    full = bench.bench_inversion(precision="auto", **settings)
    assert (half.precision, full.precision) == ("bf16", "fp32")
    assert half.dense.flops_per_iteration == full.dense.flops_per_iteration


# What is run.


@pytest.fixture
def calls(monkeypatch):
    """Every inversion that a measurement asks for, (settings, labels, threads); none of them works."""
    made = []

    def record(ensemble, labels, settings, seed, recorded, progress):
        made.append((settings, labels, torch.get_num_threads()))
        assert recorded == 0
        for _ in range(settings.iterations):
            progress(1)

    monkeypatch.setattr(bench, "invert", record)
    monkeypatch.setattr(bench, "peak_gflops", lambda _: [1.0])
    return made


def test_dense_and_sparse_inversions_alternate_with_the_published_settings(calls):
    bench.bench_inversion(batch=3, iterations=1, threads=2)
    settings = [s for s, _, _ in calls]
    assert [s.stop_at for s in settings] == [(), (1, 2, 3, 4)] * bench.ROUNDS
    for one in settings:
        assert one.stop_ratio == (0.3,) * len(one.stop_at)
        assert (one.tv, one.flip, one.jitter, one.keep_best) == (1e-4, True, 0.125, True)
        assert (one.teacher, one.augment) == ("ensemble", 0)
    assert all(len(labels) == 3 and threads == 2 for _, labels, threads in calls)


def test_threads_are_put_back(calls):
    before = torch.get_num_threads()
    bench.bench_inversion(batch=1, iterations=1, threads=before + 1)
    assert calls[0][2] == before + 1 and torch.get_num_threads() == before


def test_only_iterations_after_the_last_stop_and_the_warm_up_are_measured(monkeypatch, calls):
    """With a clock that counts the iterations of a run: step i takes i seconds."""
    kept, at = {}, [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: at[0])
    real = bench.stopwatch

    def stopwatch(loop, skip, update):
        steps = []

        def slower(tick):
            def tock(count):
                at[0] += len(steps)
                steps.append(count)
                tick(count)

            loop(tock)

        kept[len(kept)] = real(slower, skip, update)
        return kept[len(kept) - 1]

    monkeypatch.setattr(bench, "stopwatch", stopwatch)
    bench.bench_inversion(batch=1, iterations=3)
    assert kept[0] == [3, 4, 5]  # dense: after the first and two that warm up
    assert kept[1] == [7, 8, 9]  # sparse: the last stop is before step 4


def test_uploads_differ_from_client_to_client_and_are_the_same_again():
    one, other = bench.random_uploads("vit_micro", 12, 2)
    again = bench.random_uploads("vit_micro", 12, 1)[0]
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(one.weights[name], other.weights[name])
    assert torch.equal(one.weights[name], again.weights[name])
    assert one.shape == other.checked().shape and one.shape.image_size == 12


# Floating-point operations.


def test_the_report_counts_the_whole_batch_and_every_client(report):
    vit = fm.create_vit("vit_micro", bench.CLASSES, image_size=32)
    for kind, patches in (("dense", 64), ("sparse", 15)):
        linear, attention = multiply_adds(vit, patches)
        assert report[kind]["flops_per_iteration"] == 2 * 2 * 2 * (2 * linear + 3 * attention)


# Bad input.

BAD = [
    (["--model", "no_such_model"], "model.name='no_such_model'"),
    (["--model", "resnet18"], "model.name='resnet18'"),
    (["--image-size", "25"], "model.image_size=25"),
    (["--image-size", "0"], "--image-size"),
    (["--batch", "0"], "--batch"),
    (["--batch", "2.5"], "--batch"),
    (["--clients", "0"], "--clients"),
    (["--threads", "0"], "--threads"),
    (["--iterations", "0"], "--iterations"),
    (["--precision", "fp8"], "--precision"),
    (["--against", "smi"], "--against"),
    (["--against", "plain", "--clients", "2"], "clients=1"),
    (["--against", "plain", "--model", "deit_tiny_distilled_patch16_224", "--image-size", "32"], "distilled"),
    (["--against", "plain", "--model", "vit_small_patch14_reg4_dinov2", "--image-size", "28"], "dinov2"),
]


@pytest.fixture
def no_work(forbid):
    forbid(bench, "invert", "peak_gflops")


@pytest.mark.parametrize("words, name", BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_line_and_status_2_before_any_work(words, name, no_work):
    done = fedmitr(*words)
    assert done.exit_code == 2 and done.stdout == "", done.output
    assert len(done.stderr.strip().splitlines()) == 1 and name in done.stderr


def test_without_a_checkout_the_plain_loop_is_one_line(no_work, monkeypatch, tmp_path):
    monkeypatch.setattr(plain, "home", lambda: tmp_path)
    done = fedmitr("--against", "plain")
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "checkout" in done.stderr and "benchmarks/plain_loop.py" in done.stderr
