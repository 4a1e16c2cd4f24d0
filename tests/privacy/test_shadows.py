"""shadows.py: who is in which run, and runs that are ordinary ones but for one client's images."""

import pytest
import torch

import fedmitr as fm
from fedmitr import BadInput
from fedmitr.client.statistics import feature_statistics
from fedmitr.client.train import train_client
from fedmitr.core.store import Store
from fedmitr.methods import find
from fedmitr.privacy.shadows import Audit, Records, ShadowRun, memberships


@pytest.fixture(scope="module")
def plain(audit, store):
    return fm.Experiment(audit.settings("ridge"), store)


@pytest.fixture(scope="module")
def records(plain, audit):
    return Records.of(plain, audit)


@pytest.fixture(scope="module")
def shadow(plain, audit, records, store):
    member = memberships(audit.runs, len(records.rows), 0)
    return lambda number: ShadowRun(plain.settings, Store(store), records, member[number], number)


@pytest.mark.parametrize(("runs", "count"), [(16, 30), (64, 7)])
def test_every_record_is_in_half_of_each_half_of_the_runs(runs, count):
    member = memberships(runs, count, seed=3)
    assert member.shape == (runs, count)
    for part in (member[: runs // 2], member[runs // 2 :]):
        assert (part.sum(0) == runs // 4).all()
    assert not torch.equal(member[: runs // 2], member[runs // 2 :])
    assert torch.equal(member, memberships(runs, count, seed=3))
    assert not torch.equal(member, memberships(runs, count, seed=4))


def test_canaries_are_some_of_the_largest_clients_images_with_labels_that_it_holds(plain, audit, records):
    sizes = [len(shard) for shard in plain.shards]
    assert len(records.rows) == max(sizes) == sizes[records.client]
    true = plain.task.train.labels[records.rows]
    assert torch.equal(records.labels != true, records.canary) and records.canary.sum() == audit.canaries
    assert set(records.labels.tolist()) <= set(true.tolist())


def test_a_run_is_an_ordinary_one_but_for_the_audited_client(plain, records, shadow):
    run, client = shadow(2), records.client
    other = next(k for k in range(len(plain.shards)) if k != client)
    assert torch.equal(run.shards[client], records.rows[run.member])
    assert torch.equal(run.shards[other], plain.shards[other])
    assert run.upload_key(other) == plain.upload_key(other)
    features = plain.features
    assert run.statistics_key(other, features) == plain.statistics_key(other, features)
    keys = [shadow(number).upload_key(client) for number in range(3)] + [plain.upload_key(client)]
    assert len(set(keys)) == 4
    assert torch.equal(run.task.train.labels[records.rows], records.labels)
    untouched = torch.ones(len(plain.task.train), dtype=torch.bool).scatter(0, records.rows, False)
    assert torch.equal(run.task.train.labels[untouched], plain.task.train.labels[untouched])
    assert torch.equal(run.task.validation.labels, plain.task.validation.labels)


def test_its_upload_and_sums_are_those_of_its_members_alone(plain, records, shadow):
    run, client = shadow(1), records.client
    rows = records.rows[run.member]
    shard = fm.Split(plain.task.train.images[rows], records.labels[run.member])
    wanted = train_client(
        plain.initial, shard, plain.settings.client, client=client, seed=run.seed_of(client)
    )
    found = run.train(client)
    assert all(torch.equal(found.weights[name], value) for name, value in wanted.weights.items())
    assert found.class_counts == wanted.class_counts
    sums = run.upload_for(find("ridge"), client).statistics
    again = feature_statistics([plain.initial], shard, plain.settings.statistics.tokens)
    assert torch.equal(sums.counts, again.counts) and torch.allclose(sums.gram, again.gram)


def test_every_run_draws_its_own_randomness_for_the_audited_client_alone(plain, records, shadow):
    client = records.client
    seeds = [shadow(number).seed_of(client) for number in range(4)]
    assert len(set(seeds)) == 4 and plain.settings.seed not in seeds
    assert shadow(1).seed_of(1 - client) == plain.seed_of(1 - client) == plain.settings.seed


def test_a_method_gets_the_other_clients_uploads_unchanged(plain, records, shadow):
    run, method = shadow(3), find("fedavg")
    client = records.client
    uploads = run.uploads_for(method)
    assert uploads[1 - client].digest == plain.uploads_for(method)[1 - client].digest
    assert uploads[client].digest == run.train(client).without_counts().digest
    with pytest.raises(BadInput, match="fusefl"):
        run.outcome("fusefl")


def test_what_cannot_be_audited_is_refused_in_one_line(plain, one_line):
    cases = [
        (lambda: Audit(runs=10), "runs=10", "multiples of 4"),
        (lambda: Audit(canaries=-1), "canaries=-1", "0 and more"),
        (lambda: Records.of(plain, Audit(client=7)), "client=7", "0 to 1"),
        (lambda: Records.of(plain, Audit(canaries=400)), "canaries=400", "half at most"),
    ]
    for call, *words in cases:
        with pytest.raises(BadInput) as error:
            call()
        one_line(error.value, *words)
