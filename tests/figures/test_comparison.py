"""The comparison's table and figures: every seed is drawn, no label covers another, and what is left out."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fedmitr import figures as plots
from fedmitr.experiments.compare import ACCOUNT, seconds_file, write_table
from fedmitr.experiments.statistics import NAMES, SEVERAL, account_table, summarise
from fedmitr.figures.methods import spread
from fedmitr.figures.style import BLACK
from fedmitr.methods import METHODS

ONCE = 24_000_000  # operations of one model on one image


@pytest.fixture
def table():
    """Five seeds of every method; all one-shot methods exchange the same bytes, as real ones do."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(5):
        for place, method in enumerate(METHODS):
            where = {"method": method, "task": "digits", "alpha": 0.1, "clients": 5, "seed": seed}
            account = dict.fromkeys(ACCOUNT, 0) | {"exchanges": 1, "upload_bytes": 6_000_000}
            account |= {"download_bytes": 0 if method == "central" else 6_000_000}
            account |= {"inference_flops": ONCE * (5 if method in SEVERAL else 1)}
            times = {"client_seconds": 30.0, "server_seconds": 20.0 * place}
            rows.append(where | {"accuracy": rng.uniform(0.6, 0.9)} | account | times)
    return pd.DataFrame(rows)


@pytest.fixture
def files(table, tmp_path):
    """The two files as `compare` writes them."""
    out = tmp_path / "runs.csv"
    write_table(table, out)
    return pd.read_csv(out), pd.read_csv(seconds_file(out))


def test_every_method_has_a_name():
    assert set(NAMES) == set(METHODS)


def test_the_table_tells_what_the_files_hold(files):
    runs, seconds = files
    told, scores = account_table(runs, seconds), summarise(runs)
    assert [name.removesuffix(" *") for name in told.index] == list(NAMES.values())
    assert [name for name in told.index if name.endswith("*")] == ["FuseFL *", "ensemble *"]
    dense = told.loc["DENSE"]
    assert dense["accuracy"] == f"{scores.loc['dense', 'mean']:.3f} ± {scores.loc['dense', 'std']:.3f}"
    assert dense["minus FedMITR [95 %]"].startswith(f"{scores.loc['dense', 'minus fedmitr']:+.3f} [")
    assert told.loc["FedMITR", "minus FedMITR [95 %]"] == ""
    assert (dense["MB up"], dense["MB down"]) == ("6.00", "6.00")
    assert (dense["MFLOP an answer"], told.loc["FuseFL *", "MFLOP an answer"]) == ("24", "120 (5.0×)")
    assert dense["server seconds"] == f"{20 * list(METHODS).index('dense'):.1f}"


def test_with_one_seed_the_table_claims_no_spread(files):
    runs, seconds = (part[part["seed"] == 0] for part in files)
    told = account_table(runs, seconds)
    assert not told.astype(str).apply(lambda column: column.str.contains("nan|±")).any(axis=None)


def test_a_table_of_some_methods_is_made_too(files):
    runs, seconds = (part[part["method"] != "fedmitr"] for part in files)
    assert account_table(runs, seconds)["minus FedMITR [95 %]"].eq("").all()


def drawn(figure):
    FigureCanvasAgg(figure).draw()
    return figure


def markers(figure, shape):
    """(face, x, y) of every marker of a shape in the axes."""
    lines = [line for axis in figure.axes for line in axis.lines if line.get_marker() == shape]
    return [(ln.get_markerfacecolor(), *xy) for ln in lines for xy in ln.get_xydata()]


def test_every_seed_is_a_dot_of_its_own_and_several_models_are_open(table):
    tied = table.assign(accuracy=table["accuracy"].round(1))  # many seeds agree
    figure = drawn(plots.comparison(tied))
    dots = markers(figure, "o")
    assert sorted(x for _, x, _ in dots) == sorted(tied["accuracy"])
    assert len({(x, y) for _, x, y in dots}) == len(tied)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    faces = {names[round(y)]: face for shape in "Ds" for face, _, y in markers(figure, shape)}
    assert {name for name, face in faces.items() if face == "white"} == {"FuseFL", "ensemble"}
    assert faces["DENSE"] == BLACK


def test_the_comparison_is_drawn_of_older_files_and_of_methods_without_a_name(table):
    few = table.loc[
        table["method"].isin(["fedmitr", "local"]), ["method", "task", "alpha", "clients", "seed"]
    ]
    few = pd.concat([few, few.assign(method="mine")]).assign(accuracy=0.5)
    names = [label.get_text() for label in plots.comparison(few).axes[0].get_yticklabels()]
    assert sorted(names) == ["FedMITR", "local", "mine"]


@pytest.mark.parametrize("seeds", [1, 5])
def test_costs_name_every_method_and_nothing_covers_a_name(table, seeds):
    table = table[table["seed"] < seeds]
    figure = drawn(plots.costs(table, table))
    for axis in figure.axes:
        texts = [t for t in axis.texts if not t.get_text().endswith("each")]
        assert sorted(t.get_text() for t in texts) == sorted(NAMES.values())
        boxes = [t.get_window_extent() for t in axis.texts]
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        points = [ln for ln in axis.lines if ln.get_marker() in "Ds"]
        at = np.array([ln.get_transform().transform(ln.get_xydata())[0] for ln in points])  # pixels
        assert not [(b, xy) for b in boxes for xy in at if b.contains(*xy)]
        gaps = np.linalg.norm(at[:, None] - at[None], axis=2) + 1e3 * np.eye(len(at))
        assert gaps.min() > 5 * figure.dpi / 72  # a marker is five points wide


def test_costs_bracket_the_methods_of_one_cost(table):
    left, right = drawn(plots.costs(table, table)).axes
    assert not [t for t in left.texts if t.get_text().endswith("each")]
    assert [t.get_text() for t in right.texts if t.get_text().endswith("each")] == ["12 each"]


@given(
    st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=12),
    st.floats(0.0, 0.05),
)
def test_spread_keeps_order_gap_and_limits(values, gap):
    moved = spread(values, gap, 0.0, 1.0)
    order = np.argsort(values, kind="stable")
    assert (np.diff(moved[order]) >= gap - 1e-9).all()
    assert moved.min() >= -1e-9 and moved.max() <= 1 + 1e-9


def test_spread_moves_nothing_that_is_apart_already():
    assert spread([0.9, 0.1, 0.5], 0.1, 0, 1).tolist() == pytest.approx([0.9, 0.1, 0.5])
    assert spread([0.5, 0.5], 0.1, 0, 1).tolist() == pytest.approx([0.45, 0.55])


def test_generated_shows_one_image_of_each_class_and_a_dash_where_there_is_none(synthetic, task):
    without = synthetic.pixels[:9], synthetic.labels[:9], synthetic.mask[:9], synthetic.loss[:9]
    sets = {"all": synthetic, "no nine": type(synthetic)(*without)}
    figure = drawn(plots.generated(sets, task.test, task.stats))
    rows = np.array(figure.axes).reshape(3, 10)
    assert [len(axis.images) for axis in rows[1]] == [1] * 9 + [0]
    assert [t.get_text() for t in rows[1, 9].texts] == ["–"]
    assert all(axis.images and axis.collections for axis in rows[0])  # with the survivors' outline
    assert all(axis.images and not axis.collections for axis in rows[2])
    assert [axis.get_ylabel() for axis in rows[:, 0]] == ["all", "no nine", "true scene"]


def test_generated_shows_the_image_of_the_class_it_names(synthetic, task):
    backwards = type(synthetic)(synthetic.pixels, synthetic.labels.flip(0), synthetic.mask, synthetic.loss)
    figure = plots.generated({"backwards": backwards}, task.test, task.stats)
    mean, std = task.stats
    wanted = (synthetic.pixels[9] * std + mean).clamp(0, 1)[0]
    assert np.allclose(figure.axes[0].images[0].get_array(), wanted)


def test_weights_are_written_as_per_cent():
    shares = torch.tensor([[0.25, 1.0, 0.0], [0.75, 0.0, 1.0]])
    figure = drawn(plots.weights({"shares": shares, "others": shares.flip(0)}, ["a", "b", "c"]))
    told = [t.get_text() for t in figure.axes[0].texts]
    assert told == ["25", "100", "0", "75", "0", "100"]
    assert [t.get_text() for t in figure.axes[1].texts] == told[3:] + told[:3]


def test_no_text_is_below_nine_points(table, synthetic, task):
    figures = [
        plots.comparison(table),
        plots.costs(table, table),
        plots.generated({"all": synthetic}, task.test, task.stats),
        plots.weights({"shares": torch.eye(3)}, ["a", "b", "c"]),
    ]
    for figure in figures:
        texts = drawn(figure).findobj(lambda artist: hasattr(artist, "get_fontsize"))
        assert min(t.get_fontsize() for t in texts if t.get_text()) >= 9
