"""reproduce.py: what is run, where it is written, and what the table may say."""

import papermill
import pytest

import fedmitr as fm
from fedmitr.experiments.headline import read_numbers, record
from fedmitr.experiments.reproduce import notebooks, reproduce


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Parameters of every notebook that papermill would have run; each records one number."""
    calls = []

    def execute(source, target, parameters, **_):
        calls.append((source.name, target, parameters))
        record({f"{source.name[:2]} number": len(calls)}, parameters["PROFILE"])

    monkeypatch.setenv("FEDMITR_OUTPUT", str(tmp_path / "out"))
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    return calls


def test_notebooks_are_chosen_by_number():
    assert [p.name[:2] for p in notebooks("3, 00")] == ["03", "00"]
    with pytest.raises(fm.BadInput, match="only='77'"):
        notebooks("77")


def test_a_run_says_only_what_it_measured(ran, tmp_path):
    reproduce("smoke", "00,01", store=tmp_path / "store")
    said = reproduce("smoke", "09", store=tmp_path / "store", seed=3)
    assert read_numbers(tmp_path / "out" / "results" / "numbers.csv") == {"09 number": 3.0}
    assert str(tmp_path / "out") in said
    assert [name[:2] for name, *_ in ran] == ["00", "01", "09"]
    assert "SEED" not in ran[0][2] and ran[2][2]["SEED"] == 3
    assert ran[0][1].parent == tmp_path / "out" / "notebooks"


def test_an_output_that_cannot_be_written_is_one_line(ran, tmp_path, monkeypatch, one_line):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDMITR_OUTPUT", str(tmp_path / "file" / "below"))
    with pytest.raises(fm.BadInput) as caught:
        reproduce("smoke", "00", store=tmp_path / "store")
    one_line(caught.value, "FEDMITR_OUTPUT")
    assert not ran
