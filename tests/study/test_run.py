"""run.py: the study runs the protocol once, goes on where it was, and parts of it can be run again."""

import pandas as pd
import pytest
import torch
from helpers import registrations_taken_back

import fedmitr as fm
from fedmitr.core.errors import BadInput
from fedmitr.experiments import compare
from fedmitr.methods import METHODS, Method, register
from fedmitr.settings import Settings, SettingsBlock
from fedmitr.settings.schema import setting
from fedmitr.study.protocol import planned, read_protocol, rules_of
from fedmitr.study.run import COLUMNS, cell_by_cell, read_study, rerun, study, write_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture
def few(protocol):
    """The protocol with methods on sums alone: no client trains."""
    grounds = {
        name: ground.model_copy(update={"methods": ("ridge", "ncm")})
        for name, ground in protocol.grounds.items()
    }
    made = protocol.model_copy(update={"grounds": grounds, "claims": ()})
    return made.model_copy(update={"rules": rules_of(made)})


@pytest.fixture
def runs(few, folder):
    return study(few, folder / "store", folder / "study.csv")


def test_a_row_is_the_test_accuracy_of_its_run(runs, few, tmp_path):
    plan = planned(few)
    assert runs[["part", "cell", "method", "seed"]].equals(plan[["part", "cell", "method", "seed"]])
    for row, run in zip(runs.itertuples(), plan.itertuples(index=False), strict=True):
        if run.seed == 30:
            found = fm.run(run.method, run[-1], tmp_path / "store")
            assert row.accuracy == pytest.approx(found.accuracy, abs=1e-6)
            assert row.upload_bytes == found.upload_bytes
    assert runs["accuracy"].nunique() > 2


def test_runs_that_share_images_are_not_neighbours():
    plan = planned(read_protocol())
    order = cell_by_cell(plan)
    assert order.sort_index().equals(plan)
    assert list(dict.fromkeys(order["part"])) == list(dict.fromkeys(plan["part"]))
    one, other = order[:-1], order[1:]
    starts = (other[["part", "cell"]].to_numpy() != one[["part", "cell"]].to_numpy()).any(1)
    assert 1 + starts.sum() == len(plan.drop_duplicates(["part", "cell"]))  # each cell in one go
    assert (other["seed"].to_numpy()[~starts] != one["seed"].to_numpy()[~starts]).all()
    assert cell_by_cell(plan[:0]).empty


def test_the_table_is_read_as_it_was_written(runs, folder):
    read = read_study(folder / "study.csv")
    pd.testing.assert_frame_equal(read[[*COLUMNS]], runs[[*COLUMNS]], check_dtype=False, atol=1e-6)


def test_a_study_goes_on_from_its_table_alone(runs, few, folder, tmp_path, monkeypatch):
    whole = (folder / "study.csv").read_bytes()
    out = tmp_path / "study.csv"
    lines = whole.decode().splitlines(keepends=True)
    out.write_text("".join(lines[:3]))  # the first two runs
    ran = []
    usual = compare._run_in_worker
    monkeypatch.setattr(compare, "_run_in_worker", lambda store, pair: ran.append(pair) or usual(store, pair))
    study(few, tmp_path / "store", out)
    assert len(ran) == len(runs) - 2
    assert out.read_bytes() == whole


@pytest.mark.parametrize("change", [{"settings": "other"}, {"seed": 99}])
def test_a_table_of_another_protocol_is_refused_and_left(change, runs, few, folder, tmp_path, one_line):
    out = tmp_path / "study.csv"
    pd.read_csv(folder / "study.csv").assign(**change).to_csv(out, index=False)
    before = out.read_bytes()
    with pytest.raises(BadInput) as error:
        study(few, folder / "store", out)
    one_line(error.value, "study.csv", "another protocol")
    assert out.read_bytes() == before


def test_rows_are_known_on_a_machine_with_other_threads(runs, few, folder, tmp_path, forbid):
    forbid(compare, "_run_in_worker")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        again = study(few, tmp_path / "store", folder / "study.csv")
    finally:
        torch.set_num_threads(threads)
    assert len(again) == len(runs)


def test_rows_are_known_beside_settings_that_came_later(runs, few, folder, forbid):
    class Later(SettingsBlock):
        """A block of a method that did not exist then."""

        strength: float = setting(1.0, "how strong it is")

    forbid(compare, "_run_in_worker")
    with registrations_taken_back():
        register(Method("later", METHODS["fedavg"].run, settings=Later))
        assert Settings.load("smoke").later.strength == 1
        assert len(study(few, folder / "store", folder / "study.csv")) == len(runs)


def test_cells_that_look_like_numbers_are_read_as_text(runs, folder, tmp_path):
    table = runs.assign(cell=["400"] * len(runs), settings=["0123"] * len(runs))
    write_study(table, tmp_path / "study.csv")
    assert set(read_study(tmp_path / "study.csv")["cell"]) == {"400"}
    assert set(read_study(tmp_path / "study.csv")["settings"]) == {"0123"}


@pytest.mark.parametrize("text", [None, "", "a,b\n1,2\n"])
def test_what_is_no_table_of_a_study_is_one_line(text, tmp_path, one_line):
    if text is not None:
        (tmp_path / "study.csv").write_text(text)
    with pytest.raises(BadInput) as error:
        read_study(tmp_path / "study.csv")
    one_line(error.value, "study.csv")


def test_some_rows_again_are_computed_anew(runs, few, folder):
    wrong = runs.assign(accuracy=0.5)
    table = rerun(few, wrong, "early", ["ncm"], [31])
    assert table["now"].item() != table["stored"].item() == 0.5
    table = rerun(few, runs, "early", ["ncm"], [31])
    assert table[["cell", "seed"]].values.tolist() == [["ncm", 31]]
    assert table["stored"].item() == pytest.approx(table["now"].item(), abs=1e-6)


@pytest.mark.parametrize("chosen", [("nowhere",), ("early", ["dense"]), ("early", ["ncm"], [7])])
def test_rows_that_the_protocol_does_not_have_are_refused(chosen, few, runs, one_line):
    with pytest.raises(BadInput) as error:
        rerun(few, runs, *chosen)
    one_line(error.value, "allowed are" if len(chosen) > 1 else "nowhere")


def test_changed_settings_are_refused_before_any_work(few, tmp_path, forbid):
    forbid(compare, "_run_in_worker")
    other = few.model_copy(update={"defaults": few.defaults | {"distill.lr": 1.0}})
    with pytest.raises(BadInput, match=r"distill\.lr"):
        study(other, tmp_path / "store", tmp_path / "study.csv")
    assert not (tmp_path / "study.csv").exists()
