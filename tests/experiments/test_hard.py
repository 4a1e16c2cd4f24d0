"""Every method under hard settings: one client and many, one image each, few classes each, both starts."""

import pytest
import torch
from helpers import small_settings

import fedmitr as fm
from fedmitr.evaluation.metrics import predict
from fedmitr.experiments import clients
from fedmitr.methods import METHODS

SHORT = dict(inversion__images=6, inversion__batch_size=3, inversion__iterations=2, inversion__stop_at=[1])
SHORT |= dict(inversion__stop_ratio=[0.5], distill__steps=2, distill__views=1, distill__batch_size=4)
SHORT |= dict(task__test=0.02, task__validation=0.9, fadi__iterations=2)


def shards(clients, classes):
    return dict(
        partition__clients=clients,
        partition__scheme="shards",
        partition__classes_per_client=classes,
        partition__min_size=1,
    )


def skewed(clients, alpha):
    return dict(partition__clients=clients, partition__alpha=alpha, partition__min_size=1)


EARLY = dict(model__name="vit_micro_early", model__pretrained=True)
HARD = {
    "one client": dict(partition__clients=1),
    "two clients of extreme skew": skewed(2, 0.01),
    "ten clients of one class": shards(10, 1),
    "five clients of two classes": shards(5, 2),
    "seven clients of three classes, the early start": shards(7, 3) | EARLY,
    "seven clients of extreme skew": skewed(7, 0.01),
    "five clients that are nearly alike, the early start": skewed(5, 100.0) | EARLY,
    "class weights for those of one class": shards(10, 1) | dict(ensemble__mode="class"),
}


def survives(experiment, methods):
    test = experiment.task.test
    for method in methods:
        for model in experiment.outcome(method).models:
            assert all(v.isfinite().all() for v in model.state_dict().values()), method
            found = predict(model, test.images[:8])
            assert found.isfinite().all() and found.shape == (8, 10), method
            torch.testing.assert_close(found.sum(1), torch.ones(8), msg=method)


@pytest.mark.parametrize("name", HARD)
def test_every_method_survives(name, tmp_path):
    hard = fm.Experiment(small_settings(**SHORT | HARD[name]), tmp_path)
    sizes = [len(shard) for shard in hard.shards]
    assert len(sizes) == hard.settings.partition.clients and sum(sizes) == len(hard.task.train)
    if "one class" in name:
        assert all(len(hard.task.train.labels[shard].unique()) == 1 for shard in hard.shards)
    survives(hard, METHODS)


ALONE = [name for name, record in METHODS.items() if not record.needs_weights]


def test_with_as_many_clients_as_images_every_method_survives(tmp_path):
    """Each client has one image: no scatter, one step of training."""
    few = SHORT | dict(task__limit=1, partition__scheme="iid", partition__min_size=1)
    one = fm.Experiment(small_settings(**few, partition__clients=10), tmp_path)
    assert [len(shard) for shard in one.shards] == [1] * 10
    survives(one, METHODS)


def test_fifty_clients_of_an_image_or_two_survive(tmp_path):
    """All methods but two, whose work grows with the square of K: those have ten clients above."""
    few = SHORT | dict(task__limit=6, partition__clients=50, partition__alpha=0.3, partition__min_size=1)
    many = fm.Experiment(small_settings(**few), tmp_path)
    assert min(len(shard) for shard in many.shards) == 1 and len(many.shards) == 50
    survives(many, [name for name in METHODS if name not in ("stacking", "fusefl")])


# Statistics do not feel the partition.


@pytest.mark.parametrize("method", ["ncm", "ridge", "lda"])
def test_any_skew_and_any_number_of_clients_give_one_number_and_train_nobody(method, tmp_path, forbid):
    forbid(clients, "train_client")
    cells = [dict(), skewed(1, 0.1), skewed(7, 0.05), skewed(12, 100.0), shards(5, 2)]
    cells += [dict(partition__scheme="iid", partition__clients=20, partition__min_size=1)]
    heads, accuracies = [], set()
    for cell in cells:
        these = fm.Experiment(small_settings(**SHORT | cell), tmp_path)
        heads.append(these.outcome(method).models[0].head)
        accuracies.add(these.result(method).accuracy)
    assert len(accuracies) == 1 and not (tmp_path / "uploads").exists()
    for head in heads[1:]:
        torch.testing.assert_close(head.weight, heads[0].weight, rtol=1e-5, atol=1e-8)
    if method == "ridge":
        central = these.result("central_ridge")
        assert {central.accuracy} == accuracies and central.upload_bytes == 0
        torch.testing.assert_close(
            these.outcome("central_ridge").models[0].head.weight, heads[0].weight, rtol=1e-5, atol=1e-8
        )


def test_another_seed_or_start_is_another_number(tmp_path):
    found = [
        fm.Experiment(small_settings(**SHORT | cell), tmp_path).outcome("ridge").models[0].head.weight
        for cell in (dict(), dict(seed=1), dict(model__pretrained=True), EARLY)
    ]
    assert all(not torch.allclose(a, b) for k, a in enumerate(found) for b in found[:k])
