"""F-ADI: dense inversion against the student in turn with distillation."""

import torch
from tiny_runs import module_of, own, small

import fedmitr as fm
from fedmitr.core.store import Store
from fedmitr.methods import METHODS
from fedmitr.methods._student import Student

STOP = {"inversion.stop_at": (1,), "inversion.stop_ratio": (0.5,)}  # for FedMITR alone


def test_fadi_alternates_dense_inversion_against_the_student_with_distillation(
    clients, tmp_path, monkeypatch
):
    events, heads, learn = [], [], Student.learn

    def invert(ensemble, labels, settings, seed, *, opponent, competition, recorded, progress):
        assert (settings.stop_at, settings.stop_ratio, settings.iterations) == ((), (), 9)
        assert competition == 0.7 and not opponent.training
        assert not any(p.requires_grad for p in opponent.parameters())
        heads.append(opponent.head.weight.clone())
        events.append(len(labels))
        mask = torch.ones(len(labels), 9, dtype=torch.bool)
        return fm.SyntheticSet(torch.randn(len(labels), 1, 12, 12), labels, mask, labels * 0.0)

    def record(self, steps, teacher, progress):
        events.append(f"{steps} steps on {len(self.images)}")
        learn(self, steps, teacher, progress)

    monkeypatch.setattr(module_of("fadi"), "invert", invert)
    monkeypatch.setattr(Student, "learn", record)
    changes = own("fadi", rounds=2, competition=0.7, iterations=9) | STOP
    settings = small(changes, images=8, steps=5)
    METHODS["fadi"](clients[:2], settings, Store(tmp_path))
    assert events == [3, 3, "1 steps on 6", 2, "4 steps on 8"]  # 6/22 and 16/22 of five
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])


def test_fadi_makes_images_for_the_same_labels_as_fedmitr(clients, tmp_path):
    run, store = small(STOP, images=8), Store(tmp_path)
    dense, sparse = (METHODS[m](clients[:2], run, store).synthetic for m in ("fadi", "fedmitr"))
    assert torch.equal(dense.labels, sparse.labels) and dense.mask.all() and not sparse.mask.all()
