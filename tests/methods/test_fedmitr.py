"""fedmitr.py: where the student starts, and the global model in the store."""

import pytest
import torch

import fedmitr as fm
from fedmitr.core.store import Store
from fedmitr.methods import fedmitr as pipeline
from fedmitr.methods import find
from fedmitr.methods.fedavg import average_weights
from fedmitr.settings import Settings
from fedmitr.settings.schema import DistillSettings, EnsembleSettings, ModelSettings


def test_from_the_average_the_student_is_one_shot_fedavg_before_the_first_step(uploads, tmp_path):
    start = pipeline.student_start(uploads, Settings(distill=DistillSettings(start="average")))
    (averaged,) = find("fedavg").run(uploads, Settings(), Store(tmp_path)).models
    closed = average_weights(uploads)
    for name, value in start.state_dict().items():
        assert torch.equal(value, averaged.state_dict()[name]) and torch.equal(value, closed[name]), name


def test_from_the_initial_model_the_student_is_what_clients_started_from(uploads):
    settings = Settings(distill=DistillSettings(start="initial"), model=ModelSettings(pretrained=False))
    start = pipeline.student_start(uploads, settings).state_dict()
    initial = fm.create_vit("vit_micro", 10).state_dict()
    assert all(torch.equal(start[name], value) for name, value in initial.items())


def test_the_global_model_is_distilled_once_and_comes_back_from_the_store(
    uploads, synthetic, tmp_path, monkeypatch
):
    short = DistillSettings(steps=3, batch_size=4, views=2)
    settings = Settings(distill=short, ensemble=EnsembleSettings(mode="size"))
    first = pipeline.global_model(uploads, synthetic, settings, Store(tmp_path)).state_dict()

    def again(*_, **__):
        raise AssertionError("distilled twice")

    monkeypatch.setattr(pipeline, "distill", again)
    back = pipeline.global_model(uploads, synthetic, settings, Store(tmp_path))
    assert not back.training
    assert all(torch.equal(v, first[k]) for k, v in back.state_dict().items())
    with pytest.raises(AssertionError, match="distilled twice"):
        warmer = settings.changed({"relabel.temperature": 2.0})
        pipeline.global_model(uploads, synthetic, warmer, Store(tmp_path))
