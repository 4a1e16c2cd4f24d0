"""methods/fedmitr.py: batches of inversion are independent, so that a killed run goes on where it was."""

import importlib
import shutil

import pytest
import torch
from helpers import same

from fedmitr.core.store import Store
from fedmitr.server.inversion import invert
from fedmitr.settings import Settings
from fedmitr.settings.schema import EnsembleSettings, InversionSettings

pipeline = importlib.import_module("fedmitr.methods.fedmitr")  # the package's name for it is the method

RUN = Settings(
    ensemble=EnsembleSettings(mode="mean_probs"),
    inversion=InversionSettings(images=6, batch_size=2, iterations=3, stop_at=(1,), stop_ratio=(0.5,)),
)


def test_a_killed_run_resumes_after_its_last_whole_batch(uploads, tmp_path, monkeypatch):
    whole = pipeline.synthetic_set(uploads, RUN, Store(tmp_path / "whole"))
    calls, killed = [], Store(tmp_path / "killed")

    def killed_in_the_second(ensemble, labels, settings, seed, recorded, progress):
        calls.append(labels)

        def kill(step):
            if len(calls) == 2:
                raise KeyboardInterrupt

        return invert(ensemble, labels, settings, seed, recorded=recorded, progress=kill)

    monkeypatch.setattr(pipeline, "invert", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        pipeline.synthetic_set(uploads, RUN, killed)
    kept = [killed.has("synthetic", key) for key in pipeline.inversion_keys(uploads, RUN)]
    assert kept == [True, False, False]

    def count(ensemble, labels, settings, seed, recorded, progress):
        calls.append(labels)
        return invert(ensemble, labels, settings, seed, recorded=recorded, progress=progress)

    calls.clear()
    monkeypatch.setattr(pipeline, "invert", count)
    resumed = pipeline.synthetic_set(uploads, RUN, killed)
    assert len(calls) == 2 and same(resumed, whole)


def test_any_one_batch_can_be_made_again_alone(uploads, tmp_path):
    store = Store(tmp_path)
    whole = pipeline.synthetic_set(uploads, RUN, store)
    shutil.rmtree(store.path("synthetic", pipeline.inversion_keys(uploads, RUN)[1]))
    assert same(pipeline.synthetic_set(uploads, RUN, store), whole)
    assert not torch.equal(whole.pixels[:2], whole.pixels[2:4])


@pytest.mark.parametrize(
    "change", [dict(seed=1), dict(inversion=RUN.inversion.model_copy(update={"lr": 0.3}))], ids=["seed", "lr"]
)
def test_other_settings_have_other_addresses(uploads, change):
    here = pipeline.inversion_keys(uploads, RUN)
    there = pipeline.inversion_keys(uploads, RUN.model_copy(update=change))
    assert not set(here) & set(there) and len(set(here)) == 3
    assert not set(here) & set(pipeline.inversion_keys(uploads[:2], RUN))
