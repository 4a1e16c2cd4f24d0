"""experiment.py and students.py: rows of small runs, against what the package trains and by hand."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from helpers import SMALL_SETTINGS

import fedmitr.theory.experiment as module
from fedmitr.core.errors import BadInput
from fedmitr.core.rng import make_rng
from fedmitr.experiments.run import Experiment
from fedmitr.methods._start import build_ensemble
from fedmitr.methods._student import student_start
from fedmitr.server.inversion import remaining
from fedmitr.theory.experiment import (
    COLUMNS,
    PATCH_COLUMNS,
    Cell,
    held_out_settings,
    inversion_file,
    main,
    settings_of,
    theory,
)
from fedmitr.theory.stability import distance
from fedmitr.theory.students import RATE, labelled_pool, loss_of, masked, prepare, students, subset

CELLS = [Cell("sparse", "relabel", "sgd"), Cell("dense", "relabel", "adamw")]
CELLS.append(Cell("sparse", "relabel", "sgd", divided=4))
START = "vit_micro_early"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("theory")


@pytest.fixture(scope="module")
def tables(folder):
    return theory(SMALL_SETTINGS, "smoke", [START], [0], CELLS, folder / "store", folder / "out" / "a.csv")


@pytest.fixture(scope="module")
def settings():
    return settings_of(START, 0, "smoke", SMALL_SETTINGS)


@pytest.fixture(scope="module")
def made(tables, folder, settings):
    """Experiment, start of the student, ensemble, training and held-out images of sparse inversion."""
    experiment = Experiment(settings, folder / "store")
    uploads = experiment.uploads_for("fedmitr")
    sets = [
        module.synthetic_set(uploads, s, experiment.store) for s in (settings, held_out_settings(settings))
    ]
    return experiment, student_start(uploads, settings), build_ensemble(uploads, settings), *sets


@pytest.fixture(scope="module")
def material(made, settings):
    experiment, start, ensemble, train, held = made
    test = experiment.task.test.images, experiment.task.test.labels
    parts = subset(held, torch.arange(2)), subset(held, torch.arange(2, len(held)))
    return prepare(start, ensemble, train, *parts, test, settings)


def test_rows_are_those_of_the_plan(tables):
    rows, inversions = tables
    assert list(rows.columns) == list(COLUMNS) and list(inversions.columns) == list(PATCH_COLUMNS)
    steps = rows["step"].unique().tolist()
    assert rows["step"].tolist() == steps * 3 and (steps[0], steps[-1]) == (0, 6)
    assert rows["images"].tolist() == [20] * len(steps) + [5] * len(steps) + [20] * len(steps)
    sgd = rows["optimizer"] == "sgd"
    assert (rows.loc[sgd & (rows["step"] == 0), ["distance", "loss_distance"]] == 0).all().all()
    assert (rows.loc[sgd & (rows["step"] == 6), "distance"] > 0).all()
    twins = ["rate", "curvature", "distance", "loss_distance", "loss_distance_max"]
    assert (rows.loc[sgd, "rate"] == RATE).all() and rows.loc[~sgd, twins].isna().all().all()
    assert rows.loc[sgd].notna().all().all() and rows.drop(columns=twins).notna().all().all()
    assert (rows["variance_error"] > 0).all() and (rows["variance_error"] < rows["variance"]).all()
    assert len(inversions) == 2 * 5 * 2  # inversions, iterations, groups


def test_sparse_and_dense_inversion_are_the_same_until_the_first_stop(tables):
    inversions = tables[1].drop(columns="inversion")
    sparse, dense = (
        inversions[tables[1]["inversion"] == name].reset_index(drop=True) for name in module.INVERSIONS
    )
    assert sparse[sparse["iteration"] < 1].equals(dense[dense["iteration"] < 1])
    assert not sparse["norm"].equals(dense["norm"])


def test_the_same_call_goes_on_from_the_store_and_writes_the_same_bytes(tables, folder, forbid):
    forbid(module, "student_rows", "patch_rows", "invert")
    file = folder / "out" / "b.csv"
    again = theory(SMALL_SETTINGS, "smoke", [START], [0], CELLS, folder / "store", file)
    for one, other in zip(again, tables, strict=True):
        pd.testing.assert_frame_equal(one, other)
    for path in (file, inversion_file(file)):
        assert path.read_bytes() == path.with_name(path.name.replace("b", "a", 1)).read_bytes()


def test_sgd_is_a_loop_over_the_pool(made, material, settings):
    _, start, *_ = made
    loss = loss_of(settings.distill, settings.relabel)
    found = [copy.deepcopy(s) for s in students(copy.deepcopy(start), material.pool, [0, 2], settings, "sgd")]
    assert distance(found[0], start) == 0.0
    by_hand = copy.deepcopy(start).train()
    order = torch.randperm(40, generator=make_rng(settings.seed, "theory", "order")).split(
        settings.distill.batch_size
    )
    for pick in order[:2]:
        by_hand.zero_grad()
        loss(by_hand, *(column[pick] for column in material.pool)).backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= RATE * p.grad
    assert distance(found[1], by_hand) < 1e-5 * distance(found[1], start)


def test_other_pools_differ_in_one_image_with_all_its_views(made, material):
    views = 2
    for other in material.others:
        changed = (other[0] != material.pool[0]).flatten(1).any(dim=1)
        assert changed.sum() == views and len(material.samples[changed].unique()) == 1
        for one, column in zip(other, material.pool, strict=True):
            assert one[~changed].equal(column[~changed])
    replaced = [
        material.samples[(other[0] != material.pool[0]).flatten(1).any(dim=1)][0].item()
        for other in material.others
    ]
    assert len(set(replaced)) == 2


def test_a_pool_has_every_view_once_and_its_labels_are_the_teachers(made, material, settings):
    _, start, ensemble, train, _ = made
    assert torch.bincount(material.samples).tolist() == [2] * len(train)
    images, log_probs, labels, tokens = material.pool
    assert labels.equal(train.labels[material.samples]) and tokens.shape == (40, tokens.shape[1], 10)
    assert torch.allclose(log_probs, ensemble(images), atol=1e-5)
    again, _ = labelled_pool(start, ensemble, train, settings, 2, "train")
    assert all(a.equal(b) for a, b in zip(again, material.pool, strict=True))


def test_relabel_on_dense_images_marks_as_many_patches_as_stops_leave(made, settings):
    _, _, ensemble, train, _ = made
    assert masked(ensemble, train, settings) is train
    dense = subset(train, torch.arange(6))
    dense.mask.fill_(True)
    marked = masked(ensemble, dense, settings).mask
    assert marked.sum(dim=1).eq(remaining(marked.shape[1], settings.inversion.stop_ratio)).all()


def test_losses_are_those_of_the_package(tables, made, material, settings):
    row = tables[0].query("optimizer == 'sgd' and images == 20 and step == 0").iloc[0]
    experiment, start, *_ = made
    loss = loss_of(settings.distill, settings.relabel)
    with torch.no_grad():
        first = tuple(column[:20] for column in material.pool)
        assert np.isclose(loss(start, *first).item(), row["train"], rtol=1e-4)
        assert np.isclose(loss(start, *material.held_out).item(), row["held_out"], rtol=1e-4)
        hits = start(experiment.task.test.images).argmax(1) == experiment.task.test.labels
    assert np.isclose(hits.double().mean().item(), row["accuracy"])


def test_held_out_images_are_other_images(made):
    *_, train, held = made
    assert len(held) == 22
    apart = torch.cdist(held.pixels.flatten(1), train.pixels.flatten(1))
    assert apart.min() > 1.0


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"distill.views": 0}, "distill.views=0"),
        ({"distill.ce_weight": 0.5}, "distill.ce_weight=0.5"),
        ({"distill.calibrate": 0.1}, "distill.calibrate=0.1"),
        ({"inversion.stop_at": [], "inversion.stop_ratio": []}, "inversion.stop_at=[]"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes, name, one_line):
    with pytest.raises(BadInput) as error:
        settings_of(START, 0, "smoke", SMALL_SETTINGS | changes)
    one_line(error.value, name, "allowed")


def test_the_command_keeps_trials_out_of_the_shipped_table():
    done = CliRunner().invoke(main, ["--profile", "smoke"])
    assert done.exit_code == 1 and "--out" in done.output


def test_students_take_a_stated_number_of_steps_at_most():
    assert settings_of(START, 0).distill.steps == module.STEPS < 400
    assert settings_of(START, 0, "smoke", SMALL_SETTINGS).distill.steps == 6
    assert settings_of(START, 0, overrides={"distill.steps": 400}).distill.steps == 400


def test_cells_that_share_their_images_are_labelled_once(folder, monkeypatch):
    made, labelled = [], module.material_of
    monkeypatch.setattr(module, "material_of", lambda *given: made.append(given[2:]) or labelled(*given))
    cells = [Cell("sparse", "distillation", optimizer) for optimizer in module.OPTIMIZERS]
    few = SMALL_SETTINGS | {"distill.steps": 2}
    rows, _ = theory(few, "smoke", [START], [0], cells, folder / "store")
    assert made == [("sparse", "distillation", 1)] and set(rows["optimizer"]) == set(module.OPTIMIZERS)
    first = rows[rows["step"] == 0].drop(columns=["optimizer", "rate", "curvature"])
    assert first["variance"].nunique() == 1  # one start and one set of images
