"""trends.py: speed over workers, work and memory over clients."""

from itertools import combinations

import numpy as np
import pandas as pd

from fedmitr import figures


def test_scaling_draws_points_beside_ideal_ones_and_no_lines(drawn):
    table = pd.DataFrame({"workers": [1, 2], "seconds": [4.0, 2.5], "speed-up": [1.0, 1.6]})
    time, gain = drawn(figures.scaling(table)).axes
    assert [line.get_ydata().tolist() for line in time.lines] == [[4, 2.5], [4, 2]]
    assert [line.get_ydata().tolist() for line in gain.lines] == [[1, 1.6], [1, 2]]
    assert {line.get_linestyle() for axis in (time, gain) for line in axis.lines} == {"None"}
    assert [text.get_text() for text in gain.texts] == ["1.00", "1.60"]


def curves(axis):
    """Label -> values of the lines over clients; the thin lines to labels are left out."""
    return {ln.get_label(): ln.get_ydata().tolist() for ln in axis.lines if ln.get_marker() != "None"}


def ends_are_joined(axis):
    """Whether each thin line to a name starts where a line of the picture ends."""
    lines = [line for line in axis.lines if line.get_marker() != "None"]
    ends = [axis.transData.transform(line.get_xydata()[-1]) for line in lines]
    thin = [line for line in axis.lines if line.get_marker() == "None"]
    starts = [axis.transAxes.transform(line.get_xydata()[0]) for line in thin]
    return bool(starts) and all(min(np.abs(end - start).max() for end in ends) < 1 for start in starts)


def test_the_projection_has_one_line_for_ways_that_cost_the_same(drawn):
    factors = {"all": 2.0, "groups": 3.0, "one a class": 1.0}
    rows = [(way, k, k * times, k * 0.5) for way, times in factors.items() for k in (5, 10)]
    table = pd.DataFrame(rows, columns=["way", "clients", "server, TFLOP", "memory, GB"])
    work, memory = drawn(figures.projection(table)).axes
    assert ends_are_joined(work) and ends_are_joined(memory)
    assert curves(work) == {way: [5 * times, 10 * times] for way, times in factors.items()}
    assert curves(memory) == {"all\ngroups\none a class": [2.5, 5.0]}
    assert [text.get_text() for text in memory.texts] == ["all\ngroups\none a class"]


def test_stage_costs_are_labelled_lines_whose_names_do_not_overlap(drawn):
    factors = {"clients": 1.0, "inversion": 1.01, "labels": 1.02, "student": 40.0}
    rows = [(k, stage, cost) for k in (5, 10, 100) for stage, cost in factors.items()]
    (axis,) = drawn(figures.stage_costs(pd.DataFrame(rows, columns=["clients", "stage", "TFLOP"]))).axes
    assert curves(axis) == {stage: [cost] * 3 for stage, cost in factors.items()}
    assert [text.get_text() for text in axis.texts] == list(factors) and ends_are_joined(axis)
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
