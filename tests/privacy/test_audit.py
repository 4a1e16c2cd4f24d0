"""audit.py: attacks on real small runs, controls first; resumed from the store."""

import importlib

import numpy as np
import pandas as pd
import pytest

from fedmitr import BadInput
from fedmitr.privacy.audit import attacks, beside, observed_runs, run_audit
from fedmitr.privacy.membership import predicted
from fedmitr.privacy.roc import auc, tpr_at
from fedmitr.privacy.targets import Target

SOME = ("untrained", "class_sums", "gram", "upload", "ridge", "images")


@pytest.fixture(scope="module")
def done(audit, store, tmp_path_factory):
    out = tmp_path_factory.mktemp("tables") / "audit.csv"
    return out, *run_audit(audit, SOME, store, out)


def test_an_untrained_model_says_nothing(done):
    rates = done[1]
    own = rates[(rates["target"] == "untrained") & rates["attack"].isin(["LiRA", "LiRA, offline"])]
    assert len(own) == 4 and np.allclose(own["auc"], 0.5) and (own["tpr_0.01"] == 0).all()


def test_a_gram_matrix_of_fewer_images_than_features_names_them_without_any_shadow_run(done):
    rates = done[1]
    own = rates[(rates["target"] == "gram") & (rates["attack"] == "score alone")]
    assert (own["auc"] == 1).all() and (own["tpr_0.001"] == 1).all()


def test_lira_on_an_overfitted_model_reaches_what_its_gaussians_predict(audit, store):
    """Sixty passes over 45 images as they are: all of them are learnt by heart, wrong labels too."""
    many = {"client.epochs": 60, "client.augment": 0.0, "client.weight_decay": 0.0}
    observed = observed_runs(audit, Target("overfitted here", "control", "upload", overrides=many), store)
    found = {name: (scores, member) for name, scores, member in attacks(observed, controlled=True)}
    assert auc(*found["LiRA"]) > 0.95
    simulated = predicted(observed.records[..., 0], observed.member)
    for level, within in ((0.01, 0.2), (0.1, 0.05)):  # real scores have heavier tails than Gaussians
        reached, wanted = (tpr_at(*these, level) for these in (found["LiRA, image alone"], simulated))
        assert wanted > 0.8 and reached == pytest.approx(wanted, abs=within)
    assert tpr_at(*found["LiRA"], 0.01) > 3 * tpr_at(*found["score alone"], 0.01)
    canary = observed.canary
    scores, member = found["LiRA"]
    assert auc(scores[:, canary], member[:, canary]) > auc(scores[:, ~canary], member[:, ~canary])


def test_the_tables_on_disk_are_those_returned(done):
    out, rates, points = done
    pd.testing.assert_frame_equal(pd.read_csv(out), rates, atol=1e-5)
    pd.testing.assert_frame_equal(pd.read_csv(beside(out, "roc")), points, atol=1e-5)
    assert set(pd.read_csv(beside(out, "seconds"))["target"]) == set(SOME)
    values = rates.filter(regex="^(auc|tpr)")
    assert ((values >= 0) & (values <= 1)).all().all()
    assert set(rates["records"]) == {"random", "mislabelled"}
    assert (rates["members"] + rates["non_members"]).max() <= 16 * 100
    asked = rates[rates["attack"] == "RMIA"]["target"]
    assert set(asked) == {"untrained", "upload"}  # ridge's scores are no probabilities


def test_finished_runs_come_from_the_store(done, audit, store, forbid, tmp_path):
    out, before = done[0], done[0].read_bytes()
    forbid(importlib.import_module("fedmitr.privacy.audit"), "observe")
    run_audit(audit, SOME, store, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == before
    assert beside(tmp_path / "again.csv", "roc").read_bytes() == beside(out, "roc").read_bytes()


def test_half_targets_take_the_first_half_of_the_runs(audit, store):
    assert len(observed_runs(audit, Target("x", "y", "class sums", "ridge", half=True), store).member) == 8


def test_an_unknown_target_is_refused_before_any_work(audit, tmp_path, forbid):
    forbid(importlib.import_module("fedmitr.privacy.audit"), "observed_runs")
    with pytest.raises(BadInput, match="target='letters'"):
        run_audit(audit, ["gram", "letters"], tmp_path)
