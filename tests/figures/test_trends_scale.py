"""trends.py: speed over workers, work and memory over clients."""

import pandas as pd

from fedmitr import figures


def test_scaling_draws_seconds_and_speed_up_beside_a_perfect_one(drawn):
    table = pd.DataFrame({"workers": [1, 2], "seconds": [4.0, 2.5], "speed-up": [1.0, 1.6]})
    time, gain = drawn(figures.scaling(table)).axes
    assert time.lines[0].get_ydata().tolist() == [4, 2.5]
    assert [line.get_ydata().tolist() for line in gain.lines] == [[1, 2], [1, 1.6]]


def test_the_projection_has_a_line_for_each_way_to_label(drawn):
    rows = [(way, k, k * 2.0, k * 0.5) for way in ("all", "groups", "one a class") for k in (5, 10)]
    table = pd.DataFrame(rows, columns=["way", "clients", "server, TFLOP", "memory, GB"])
    for axis, factor in zip(drawn(figures.projection(table)).axes, (2, 0.5), strict=True):
        assert [line.get_label() for line in axis.lines] == ["all", "groups", "one a class"]
        assert axis.lines[0].get_ydata().tolist() == [5 * factor, 10 * factor]
