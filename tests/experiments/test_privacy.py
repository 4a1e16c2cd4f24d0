"""Runs with protections: the ε told, what is sent, secret noise; and that without them nothing changes."""

import json

import pytest
import torch
from helpers import SMALL_OPTIONS, call_cli, read_cli, small_settings

import fedmitr as fm
from fedmitr.core.store import fingerprint
from fedmitr.experiments.result import Result
from fedmitr.methods import METHODS
from fedmitr.settings.schema import ClientSettings, StatisticsSettings
from fedmitr.upload import add_up
from fedmitr.vision.vit import weights_digest

DELTA = 1e-5
BOTH = {"client__dp_epsilon": 20.0, "statistics__dp_epsilon": 9.0}
NEW = {"dp_epsilon", "dp_delta", "dp_clip", "smallest"}


def run(method, store, **changes):
    experiment = fm.Experiment(small_settings(**changes), store)
    experiment.check([method])
    return experiment, experiment.result(method)


def spent(noises):
    """ε of Opacus' accountant after every step."""
    accountant = pytest.importorskip("opacus.accountants").RDPAccountant()
    for noise in noises:
        for _ in range(noise.steps):
            accountant.step(noise_multiplier=noise.multiplier, sample_rate=noise.sample_rate)
    return accountant.get_epsilon(DELTA)


# Off: as before.


def test_addresses_without_protection_are_those_of_settings_that_had_none(store):
    """They are hashes of settings, spelled out here as they were before there were protections."""
    experiment = fm.Experiment(small_settings(), store)
    s, features = experiment.settings, experiment.features
    data = [s.task.model_dump(exclude={"data_dir", "download", "scenes"}), experiment.task.digest]
    client = {name: getattr(s.client, name) for name in ClientSettings.model_fields if name not in NEW}
    del client["models"]
    training = [s.seed, *data, client, s.model.model_dump(), weights_digest(s.model)]
    assert experiment.upload_key(1) == fingerprint("upload", training, s.partition.model_dump(), 1)
    assert experiment.central_key == fingerprint("central", training)
    told = {"shape": features.shape.model_dump(), "weights": features.weights, "tokens": features.tokens}
    told = json.dumps(told, separators=(",", ":"))
    assert experiment.statistics_key(None, features) == fingerprint("statistics", s.seed, *data, told)


@pytest.mark.parametrize("block", [ClientSettings, StatisticsSettings])
def test_a_dump_leaves_out_protections_that_are_off_and_reads_as_before(block):
    plain = block()
    assert not NEW & set(plain.model_dump()) and set(block.model_fields) - NEW == set(plain.model_dump())
    assert block.model_validate(plain.model_dump()) == plain
    on = block(dp_epsilon=3.0)
    assert on.model_dump()["dp_epsilon"] == 3.0 and block.model_validate(on.model_dump()) == on


def test_a_result_without_protection_is_written_as_before(store):
    _, result = run("ridge", store)
    assert result.epsilon is None and not {"epsilon", "delta"} & set(json.loads(result.model_dump_json()))
    assert set(Result.model_fields) - set(result.model_dump()) == {"epsilon", "delta"}


def test_protections_have_addresses_of_their_own(store):
    pytest.importorskip("opacus")
    plain, other = (fm.Experiment(small_settings(**changes), store) for changes in ({}, BOTH))
    secret = fm.Experiment(small_settings(**BOTH), store, noise_seed=5)
    assert len({one.upload_key(0) for one in (plain, other, secret)}) == 3
    assert len({one.statistics_key(0, one.features) for one in (plain, other, secret)}) == 3
    assert fm.Experiment(small_settings(), store, noise_seed=5).upload_key(0) == plain.upload_key(0)


# On.


@pytest.mark.parametrize("method", ["ridge", "fedavg", "fedmitr", "fedmitr_plus", "central_ridge", "central"])
def test_a_run_tells_the_epsilon_of_the_accountant(method, store):
    pytest.importorskip("opacus")
    changes = BOTH | {"fedmitr_plus__views": 1}
    experiment, result = run(method, store, **changes)
    sent = experiment.uploads_for(method)
    assert result.delta == DELTA
    assert result.epsilon == pytest.approx(max(spent(u.noises) for u in sent), rel=1e-9)
    record = METHODS[method]
    parts = [record.needs_weights, record.needs_statistics_under(experiment.settings)]
    assert all(len(u.noises) == sum(parts) for u in sent)
    if sum(parts) == 1:
        wanted = 20.0 if record.needs_weights else 9.0
        assert 0.998 * wanted <= result.epsilon <= wanted
    else:
        assert 20.0 < result.epsilon < 29.0
    assert Result.model_validate_json(result.model_dump_json()) == result


def test_no_true_count_is_sent(store):
    pytest.importorskip("opacus")
    experiment = fm.Experiment(small_settings(**BOTH), store)
    for k, upload in enumerate(experiment.uploads_for("fedmitr_plus")):
        labels = experiment.task.train.labels[experiment.shards[k]]
        assert upload.class_counts == tuple(upload.statistics.counts.clamp(min=0).tolist())
        assert upload.class_counts != tuple(labels.bincount(minlength=10).tolist())
    assert all(u.class_counts is None for u in experiment.counted_uploads)
    alone = experiment.upload_for(METHODS["fedmitr_plus"], 1)
    assert alone.digest == experiment.uploads_for("fedmitr_plus")[1].digest


def test_noise_is_the_same_again_and_other_under_a_secret(store, tmp_path):
    pytest.importorskip("opacus")

    def digests(folder, **more):
        experiment = fm.Experiment(small_settings(**BOTH), folder, **more)
        return [u.digest for u in experiment.uploads_for("ridge")]

    once = digests(store)
    assert digests(tmp_path / "a") == once
    assert not set(digests(tmp_path / "a", noise_seed=1)) & set(once)
    kept = digests(tmp_path / "b", noise_seed=1)
    assert digests(tmp_path / "b", noise_seed=2) == kept  # sent again as it was, without new noise


def test_small_classes_stay_with_the_client(store):
    experiment = fm.Experiment(small_settings(partition__alpha=0.5), store)
    counts = [
        experiment.task.train.labels[shard].bincount(minlength=10).tolist() for shard in experiment.shards
    ]
    smallest = sorted(n for row in counts for n in row if n)[6] + 1  # so that some classes are left out
    experiment = fm.Experiment(small_settings(partition__alpha=0.5, statistics__smallest=smallest), store)
    wanted = [tuple(n if n >= smallest else 0 for n in row) for row in counts]
    assert wanted != list(map(tuple, counts))
    for method in ("ridge", "fedmitr_plus", "fedftg"):
        for upload, told in zip(experiment.uploads_for(method), wanted, strict=True):
            assert upload.size == sum(told) and upload.checked()
            assert upload.class_counts in (None, told)
            if upload.statistics:
                assert tuple(upload.statistics.counts.tolist()) == told
    total = add_up(u.statistics for u in experiment.uploads_for("ridge"))
    assert torch.equal(total.counts, torch.tensor(wanted).sum(0))
    assert experiment.result("ridge").epsilon is None


@pytest.mark.parametrize("changes", [{"client__dp_epsilon": 1e-6}, {"statistics__dp_epsilon": 1e-6}], ids=str)
def test_an_epsilon_out_of_reach_is_one_line_before_any_work(changes, no_work, tmp_path, one_line):
    pytest.importorskip("opacus")
    method = "ridge" if "statistics__dp_epsilon" in changes else "fedavg"
    with pytest.raises(fm.BadInput) as error:
        fm.Experiment(small_settings(**changes), tmp_path).check([method])
    one_line(error.value, "dp_epsilon=1e-06")


def test_the_command_prints_what_was_spent(tmp_path):
    pytest.importorskip("opacus")
    words = ["--method", "ridge", *SMALL_OPTIONS, "--store", tmp_path]
    assert "privacy" not in call_cli("run", *words).stdout
    words += ["--set", "statistics.dp_epsilon=4"]
    found = read_cli("run", *words, "--json")
    assert f"ε = {found['epsilon']:.3f} at δ = 1e-05" in call_cli("run", *words).stdout
    assert 3.99 < found["epsilon"] <= 4
