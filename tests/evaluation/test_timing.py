"""timing.py: what is timed and averaged. No times."""

import pytest
import torch

from fedmitr.evaluation import timing


def test_speedup_is_the_median_over_neighbouring_runs():
    slow, fast = [[4.0, 4.0, 100.0], [9.0], [8.0]], [[2.0], [3.0], [1.0, 1.0, 0.1]]
    assert timing.speedup(slow, fast) == 3.0  # of 2, 3 and 8


def test_threads_are_put_back_after_an_error_too():
    before = torch.get_num_threads()
    with timing.torch_threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError), timing.torch_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_the_stopwatch_leaves_out_the_first_iterations(monkeypatch):
    """With a clock that the loop sets: iteration i takes i seconds."""
    now, told = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def loop(tick):
        for step in range(5):
            now[0] += step
            tick(step)

    assert timing.stopwatch(loop, 2, told.append) == [2, 3, 4]
    assert told == [1] * 5 and timing.median([[2.0, 9.0], [4.0]]) == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_a_few_positive_numbers(precision, monkeypatch):
    monkeypatch.setattr(timing, "SIDE", 64)
    assert len(timing.peak_gflops(precision)) == 3 and min(timing.peak_gflops(precision)) > 0
