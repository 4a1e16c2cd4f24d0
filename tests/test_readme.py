"""The README and the pages beside it: their results are the shipped ones, their examples run."""

import importlib
import importlib.util
import re

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import registrations_taken_back

import fedmitr as fm
from fedmitr.core.paths import home
from fedmitr.evaluation.metrics import ERRORS
from fedmitr.methods import METHODS, described
from fedmitr.settings import tuned_values
from fedmitr.study.analysis import finished_parts, part_table
from fedmitr.study.protocol import read_protocol
from fedmitr.study.run import finished, read_study
from fedmitr.study.verdicts import verdicts

README = home() / "README.md"
USING, MAP, RESULTS = (home() / "docs" / f"{name}.md" for name in ("using", "map", "results"))


def tool():
    spec = importlib.util.spec_from_file_location("readme", home() / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_are_those_of_the_shipped_study():
    script, protocol = tool(), read_protocol()
    runs = read_study(script.STUDY)
    assert f"{script.verdict(protocol, runs)}\n<!-- /results -->" in README.read_text()
    assert f"{script.table(protocol, runs)}\n<!-- /table -->" in RESULTS.read_text()


def test_the_list_of_notebooks_has_their_titles_and_minutes():
    listed = f"{tool().start(home() / 'notebooks')}\n<!-- /start -->"
    assert listed in README.read_text(), "a notebook's head has changed: run tools/readme.py"


def words(text):
    """The words that are read: without tables, comments, code, pictures and addresses of links."""
    text = re.sub(r"<!--.*?-->|```.*?```|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return [w for line in text.splitlines() if line[:1] != "|" for w in line.split() if re.search(r"\w", w)]


def test_words_are_counted_without_tables_code_and_addresses():
    text = "# One two\n| no |\n<!-- no -->\n```sh\nno\n```\n![no](no.png) [three](no.md) **four** ·\n"
    assert len(words(text)) == 4


def test_the_readme_is_read_in_minutes():
    assert 300 < len(words(README.read_text())) <= 700
    assert "Independent reproduction; not the authors' code." in README.read_text()


def test_no_row_of_the_study_is_of_another_protocol_and_every_accuracy_is_one():
    runs = finished(read_protocol(), tool().STUDY)  # refuses other rows
    assert runs["accuracy"].between(0, 1).all() and not runs.duplicated(["part", "cell", "seed"]).any()


def map_rows():
    """The rows of the map: name of the step and the functions that it lists."""
    parts = MAP.read_text().split("\n\n")
    part = next(part for part in parts if part.startswith("| step"))
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines()[2:]]
    return {row[1]: re.findall(r"`([\w.]+)`", row[-1]) for row in rows}


def follow(name):
    """The object that a dotted name below the package means."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["fedmitr", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def test_the_map_names_functions_that_are_there_and_explain_themselves():
    rows = map_rows()
    assert len(rows) >= 12 and all(rows.values())
    for name in (name for names in rows.values() for name in names if name != "flower_app.serve"):
        found = follow(name)
        assert not isinstance(found, type(re)), f"{name} is a module, not a function"
        assert isinstance(found, dict) or (found.__doc__ and len(found.__doc__) > 20), name


def test_the_map_has_every_folder_of_the_package():
    text = MAP.read_text().split("```\nfedmitr/")[1].split("```")[0]
    folders = {p.parent.name for p in (home() / "fedmitr").glob("*/__init__.py")}
    assert folders == set(re.findall(r"([a-z]+)/", text))


def test_fill_replaces_only_what_lies_between_the_markers():
    before = "a\n<!-- results: note -->\nold\n<!-- /results -->\nb\n<!-- times: x -->\nold\n<!-- /times -->\n"
    after = tool().fill(before, "results", "new")
    assert after == before.replace("old", "new", 1)


def examples():
    return re.findall(r"```python\n(.*?)```", USING.read_text(), re.DOTALL)


def test_the_example_on_your_own_model_runs():
    example = examples()[0]
    assert len(example.strip().splitlines()) <= 12
    names = {}
    exec(example, names)
    assert names["tokens"].shape == (30, 36, 3)
    assert names["model"](torch.randn(2, 1, 24, 24)).shape == (2, 3)


def test_the_example_of_a_method_of_your_own_runs(tmp_path, monkeypatch):
    example = examples()[1]
    assert len(example.strip().splitlines()) < 25
    monkeypatch.chdir(tmp_path)
    names = {}
    with registrations_taken_back():
        exec(example, names)
    runs = names["runs"]
    assert list(runs["method"]) == ["fedavg", "median", "fedmitr_plus"] * 2
    assert runs["accuracy"].between(0.1, 1).all()
    settings = names["settings"][0]
    uploads = fm.Experiment(settings, "data/store").uploads_for("fedavg")
    (vit,) = names["median"](uploads, settings, None).models
    for name, value in vit.state_dict().items():
        every = np.stack([u.weights[name].numpy() for u in uploads])
        assert np.array_equal(value.cpu().numpy(), np.median(every, axis=0))  # five clients: no tie


@pytest.fixture
def grounds():
    """Tables of the study's primary grounds that are finished."""
    protocol, runs = read_protocol(), read_study(tool().STUDY)
    done = [name for name in finished_parts(protocol, runs) if name in protocol.primary]
    return [part_table(protocol, runs, name) for name in done]


def test_the_page_on_why_it_works_has_the_numbers_of_its_table():
    text = (home() / "docs" / "why-it-works.md").read_text()
    table = pd.read_csv(home() / "results" / "errors.csv")
    means = table.groupby(["start", "model"])[list(ERRORS)].mean()
    for model, shares in means.loc["vit_micro_early"].iterrows():
        assert f"| {model} | " + " | ".join(f"{share:.3f}" for share in shares) + " |" in text
    pictures = re.findall(r"\((why_\w+\.png)\)", text)
    assert len(pictures) == 2 and all((home() / "docs" / picture).exists() for picture in pictures)
    _, same, other = means.loc["vit_micro_early", "ensemble, class weights"]
    assert round(50 * other / (same + other)) == 49  # "49 of 50"
    early = means.loc["vit_micro_early"]
    right, same, other = (early[kind] for kind in ERRORS)
    given = (same / (same + right)).round(2)  # wrong among images that go to the right client
    assert (given["ensemble, class weights"], given["ridge"]) == (0.02, 0.08)
    for better, worse, said in (
        ("ensemble + ridge", "ridge", "inside a client by {0:.1f} points, between clients by {1:.1f}"),
        ("ridge+", "ridge", "take away {1:.0f} points between clients and {0:.0f} inside"),
    ):
        assert said.format(*(100 * (k[worse] - k[better]) for k in (same, other))) in text
    pairs = table[table["start"] == "vit_micro_early"].pivot(index="seed", columns="model", values="right")
    gain = pairs["ensemble + ridge+"] - pairs["ridge+"]
    assert (
        (gain > 0).all()
        and len(gain) == 5
        and "adds 1.4 points, on five of five seeds" in " ".join(text.split())
    )
    assert round(100 * gain.mean(), 1) == 1.4


def test_what_the_page_of_results_says_holds_on_every_finished_ground(grounds):
    for table in grounds:
        made = table.loc[[name for name in table.index if METHODS[name].distils], "mean"]
        assert table.loc["ridge", "mean"] > made.drop("fedmitr_plus").max()  # far below plain ridge
        assert table.loc["fedmitr", "mean"] < table.loc["ensemble", "mean"]


def test_what_the_page_of_results_says_of_images_holds(grounds):
    text = " ".join(RESULTS.read_text().split())
    assert "textures in place of its images reach the same accuracy to 0.001" in text
    assert all(abs(table.loc["textures", "difference"]) < 0.0015 for table in grounds)
    assert "there training on images does not lift the start" in text
    card = verdicts(read_protocol(), read_study(tool().STUDY))
    (lift,) = card[card["claim"].str.contains("lift the model that the student starts as")].itertuples()
    assert lift.verdict == "fails" and lift.difference < 0
    assert "other penalties, from the shipped start other numbers of moved copies too" in text
    early, later = ([tuned_values("laptop", start, m) for m in ("ridge_plus", "fedmitr_plus")]
                    for start in ("vit_micro_early", "vit_micro"))  # fmt: skip
    for one, other in (early, later):
        assert one["statistics.ridge"] != other["statistics.ridge"]
    assert early[0]["fedmitr_plus.views"] == early[1]["fedmitr_plus.views"]
    assert later[0]["fedmitr_plus.views"] != later[1]["fedmitr_plus.views"]


def test_what_notebook_05_says_of_costs_holds_on_its_ground(grounds):
    first = grounds[0]
    images = [name for name in first.index if described(name).family == "synthetic images"]
    seconds = first.loc[images, "server_seconds"]
    assert seconds.between(30, 95).all()  # half a minute to a minute and a half
    sums = first.loc["ridge_plus", "upload_bytes"] / first.loc["fedavg", "upload_bytes"]
    assert round(sums) == 3  # three times as large as a model


def test_numbers_on_the_page_of_results_are_those_of_the_early_ground(grounds):
    text, early = " ".join(RESULTS.read_text().split()), grounds[0]
    mean = early["mean"].map("{:.2f}".format)
    added = [
        -table.loc["ridge_plus", ["high Holm", "difference", "low Holm"]].astype(float) for table in grounds
    ]
    (_, lost, most), (least, gained, _) = added
    assert f"{gained:.3f} above ridge+ from the shipped start, which the test finds above zero" in text
    assert f"{-lost:.3f} below it from the early start, which it does not" in text
    assert least > 0 and most > 0 > lost and max(gained, lost) < 0.0015  # "a thousandth at most"
    heads = f"ridge {mean['ridge']}, ridge+ {mean['ridge_plus']} and FedMITR+ {mean['fedmitr_plus']}"
    assert f"central training has {mean['central']}, {heads}" in text
    assert f"FedMITR, the paper's method, has {mean['fedmitr']}, below the ensemble of all" in text
    assert f"ensemble of all uploads with {mean['ensemble']}." in text
    assert f"FedMITR+ gains {early.loc['real_images', 'difference']:.3f}" in text
    both = early.loc["ensemble_statistics", "difference"]
    assert f"`ensemble_statistics`, is {both:.3f} above it" in text
    sums, model = (early.loc[name, "upload_bytes"] / 5e6 for name in ("ridge_plus", "fedavg"))  # 5 clients
    assert f"{sums:.1f} MB from each client, where a model has {model:.1f}" in text


def test_what_notebook_06_says_of_starts_holds_in_their_table():
    runs = pd.read_csv(home() / "results" / "transfer.csv")
    means = runs.pivot_table(index="method", columns="steps", values="accuracy")
    assert (means.loc["fedmitr"] < means.loc["ridge"]).all()
    assert (means.loc["ridge_plus"] > means.loc["ridge"]).all()
    assert abs(means.loc["ridge_plus", 0] - means.loc["ridge", 0] - 0.2) < 0.02
    central = means.loc["ridge_plus"] - means.loc["central"]
    assert (central[[0, 100, 200]] > 0).all() and (central[[400, 1000]] < 0).all()
    away = means.loc["fedmitr_plus"] - means.loc["ridge_plus"]
    assert (away[[400, 1000, 3600]].abs() < 0.01).all() and (away[[100, 200]] < 0).all()
    assert means.loc["fedmitr_plus", 0] < 0.55 * means.loc["ridge_plus", 0]  # "half"
    assert (means.loc["ensemble_statistics"] - means.loc["ridge_plus"]).between(-0.01, 0.02).all()
