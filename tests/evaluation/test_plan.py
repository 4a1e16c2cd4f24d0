"""plan.py: the plan of a run against closed forms, counts of real passes, loops and real uploads."""

import pytest
import timm
import torch
from helpers import registrations_taken_back
from PIL import Image

import fedmitr as fm
from fedmitr.core.errors import BadInput
from fedmitr.evaluation.bench import random_uploads
from fedmitr.evaluation.flops import one_pass
from fedmitr.evaluation.plan import ModelCosts, model_costs, plan, plan_table, training_images
from fedmitr.methods import METHODS, Method, Outcome, Work, register
from fedmitr.server.inversion import remaining
from fedmitr.settings import Settings
from fedmitr.settings.schema import TaskSettings

GENERATORS = ("fdafl", "dense", "co_boosting", "fedftg")


@pytest.fixture(scope="module")
def vit():
    return fm.create_vit("vit_micro", 10).to("meta")


def stages(method, overrides=None):
    return {s.stage: s for s in plan(method, Settings.load("laptop", overrides))}


@pytest.mark.parametrize("teacher", ["owners", "ensemble"])
def test_inversion_is_a_sum_over_iterations(vit, teacher):
    how = {"inversion.images": 7, "inversion.iterations": 9, "inversion.stop_at": [2, 5]}
    how |= {"inversion.stop_ratio": [0.3, 0.5], "inversion.teacher": teacher}
    found = stages("fedmitr", how)["inversion"]
    left, flops = 36, 0
    for step in range(9):
        left = remaining(left, [{2: 0.3, 5: 0.5}.get(step, 0)])
        flops += one_pass(vit, left, "image").flops
    assert found.flops == 7 * flops * (1 if teacher == "owners" else 5)
    assert "13 at last" in found.what  # 36 -> 25 -> 13 (rounded halves up)
    masked = stages("fedmitr", how | {"inversion.mask": "attention"})["inversion"]
    one_more = one_pass(vit, 36, "").flops * (1 if teacher == "owners" else 5)
    assert masked.flops - found.flops == pytest.approx(7 * one_more)


def test_more_stopped_patches_cost_less_and_all_stages_more_images_more():
    def cost(overrides):
        return sum(s.flops for s in stages("fedmitr", overrides).values())

    assert cost({"inversion.stop_ratio": [0.3] * 4}) < cost({}) < cost({"inversion.images": 800})
    assert cost({"task.test": 0.5}) < cost({}) < cost({"client.epochs": 20})


def test_distillation_is_labels_for_every_view_and_a_step_for_every_batch(vit):
    costs, found = ModelCosts.of(vit), stages("fedmitr")
    settings = Settings.load("laptop")
    images, views = settings.inversion.images, settings.distill.views
    assert found["labels"].flops == images * views * 5 * costs.forward.flops
    assert found["student"].flops == 400 * 64 * costs.grad_weights.flops
    fresh = stages("fedmitr", {"distill.views": 0})["labels"]
    assert fresh.flops == 400 * 64 * 5 * costs.forward.flops
    assert fresh.memory < found["labels"].memory
    head = stages("fedmitr", {"distill.train": "head"})["student"]  # nothing goes back below the classifier
    assert head.flops == 400 * 64 * costs.forward.flops
    offsets = stages("fedmitr", {"distill.calibrate": 0.1})["labels"]  # four more views of each
    assert offsets.flops == images * (views + 4) * 5 * costs.forward.flops


def test_messages_are_those_of_real_uploads():
    uploads = random_uploads("vit_micro", None, 5)
    both_ways = sum(u.bytes for u in uploads) * 2
    assert stages("fedavg")["clients"].bytes == pytest.approx(both_ways, rel=0.01)
    assert stages("fusefl")["clients"].bytes == pytest.approx(3 * both_ways, rel=0.01)
    assert stages("local")["clients"].bytes == stages("central")["central"].bytes == 0


@pytest.mark.parametrize("tokens, width", [("cls", 96), ("patches", 96), ("both", 192)])
def test_statistics_are_one_pass_and_one_product_an_image(vit, tokens, width):
    found = stages("ridge", {"statistics.tokens": tokens})
    images = training_images(Settings.load("laptop").task)
    assert list(found) == ["clients"] and "one pass" in found["clients"].what
    forward = ModelCosts.of(vit).forward.flops
    assert found["clients"].flops == images * (forward + 2 * width * width)
    sums = 8 * (10 + 10 * width + width * (width + 1) // 2)  # float64
    model = 4 * sum(value.numel() for value in vit.state_dict().values())
    assert found["clients"].bytes == 5 * (model + sums)
    plain_sums = {"fedmitr_plus.regions": False, "fedmitr_plus.views": 0}
    beside = stages("fedmitr_plus", plain_sums | {"statistics.tokens": tokens})["clients"]
    plain = stages("fedmitr")["clients"]
    assert beside.bytes == plain.bytes + 5 * sums and beside.memory == plain.memory
    assert beside.flops - plain.flops == pytest.approx(found["clients"].flops)
    off = stages("fedmitr_plus", {"fedmitr_plus.statistics": False})["clients"]
    assert (off.bytes, off.flops) == (plain.bytes, plain.flops)


def test_a_second_exchange_sends_the_average_or_all_models_and_wider_sums(vit):
    model = 4 * sum(value.numel() for value in vit.state_dict().values())
    for method, models in (("fedavg_ridge", 1), ("stacking", 5)):
        width = 192 * models
        sums = 8 * (10 + 10 * width + width * (width + 1) // 2)
        assert stages(method)["clients"].bytes == 5 * (2 * model + models * model + sums)
    assert stages("stacking")["clients"].flops > stages("fedavg_ridge")["clients"].flops


def test_what_is_not_federated_sends_nothing_and_trains_one_model_or_none():
    trained, summed = stages("central")["central"], stages("central_ridge")["central"]
    assert trained.bytes == summed.bytes == 0 and summed.flops < trained.flops / 10
    assert summed.flops == stages("ridge")["clients"].flops


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan_whose_sum_stands_below(method):
    found = list(stages(method).values())
    table = plan_table(found)
    assert list(table.index) == [*(s.stage for s in found), "all"]
    total = sum(s.flops for s in found) / 1e12
    assert float(table.loc["all", "TFLOP"]) == pytest.approx(total, rel=0.01)
    assert ("generation" in table.index) == (method in GENERATORS)
    assert all(s.flops > 0 and s.memory > 0 for s in found)


def test_a_plan_loads_no_weights_and_reads_no_images(monkeypatch):
    monkeypatch.setattr("fedmitr.vision.vit._load_checkpoint", lambda *_: pytest.fail("loaded weights"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("downloaded"))
    create, created = timm.create_model, []
    model_costs.cache_clear()
    monkeypatch.setattr(timm, "create_model", lambda *a, **o: created.append(o) or create(*a, **o))
    assert Settings.load("paper").model.pretrained and plan("fedmitr", Settings.load("paper"))
    assert plan("fedmitr", Settings.load("laptop"))  # whose weights are shipped
    assert created and not any(options.get("pretrained") for options in created)


def test_fedftg_steps_for_one_client_at_a_time_and_co_boosting_moves_and_reweighs(vit):
    costs, settings = ModelCosts.of(vit), Settings.load("laptop")
    own = settings.fedftg
    passes = own.rounds * own.generator_steps * 5  # each a pass of one client and one of the student
    assert stages("fedftg")["generation"].flops == passes * own.batch_size * 2 * costs.grad_image.flops
    still = {"co_boosting.perturbation": 0.0, "co_boosting.weight_step": 0.0}
    mine, dense = stages("co_boosting")["labels"], stages("dense")["labels"]
    assert stages("co_boosting", still)["labels"].flops == dense.flops
    images, views = settings.inversion.images, settings.distill.views
    shown = images * (1 + 2 + 3 + 4) // 4  # four rounds
    more = images * views * 5 * costs.grad_image.flops + shown * 5 * costs.forward.flops
    assert mine.flops - dense.flops == pytest.approx(more)


def test_offsets_of_a_generators_student_cost_no_forward_pass():
    assert stages("dense", {"dense.calibrate": 0.1})["labels"].flops == stages("dense")["labels"].flops


def test_statistics_take_the_shared_model_to_clients_of_another_one():
    mixed = {"client.models": ["vit_micro_deep", "vit_micro"], "distill.start": "initial"}
    settings = Settings.load("laptop", mixed)
    names = [settings.model_of(k).name for k in range(5)]
    own = [model_costs(name, 10, None).model_bytes for name in names]
    shared = model_costs("vit_micro", 10, None).model_bytes
    sums = stages("ridge_plus")["clients"].bytes - 5 * shared
    assert stages("ridge_plus", mixed)["clients"].bytes == 5 * shared + sums
    again = shared * names.count("vit_micro_deep")
    assert stages("fedmitr_plus", mixed)["clients"].bytes == 2 * sum(own) + again + sums
    assert stages("fedmitr", mixed)["clients"].bytes == 2 * sum(own)


@pytest.mark.parametrize("method", GENERATORS)
def test_a_budget_of_its_own_is_what_a_method_spends(method):
    own = {"budget": "own", f"{method}.student_steps": 100, f"{method}.images": 50}
    mine, equal = stages(method, own), stages(method)
    assert equal["student"].flops == 4 * mine["student"].flops
    assert equal["labels"].flops == 8 * mine["labels"].flops


@pytest.mark.parametrize("split", [True, False])
def test_images_of_a_folder_are_counted_as_they_are_split(split, tmp_path):
    for part, count in (("train", 10), ("test", 4)) if split else ((".", 14),):
        for label in "ab":
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (8, 8), (10 * k, 0, 0)).save(folder / f"{k}.png")
    for limit in (None, 3):
        task = TaskSettings(name="image-folder", data_dir=str(tmp_path), limit=limit)
        stats = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
        assert training_images(task) == len(fm.load_task(task, 0, 8, stats).train)


def test_the_plan_counts_the_images_that_the_clients_hold():
    experiment = fm.Experiment(Settings.load("laptop"))
    assert training_images(experiment.settings.task) == len(experiment.task.train)
    flops = ModelCosts.of(fm.create_vit("vit_micro", 10)).grad_weights.flops
    assert stages("fedavg")["clients"].flops == 15 * len(experiment.task.train) * flops


# A method that a user adds.


@pytest.fixture
def add_method():
    """Registers a method named `mine` for one test; the record's other fields are given."""
    with registrations_taken_back():
        yield lambda **fields: register(Method("mine", run=lambda *_: Outcome([]), **fields))


def test_a_users_method_without_work_is_a_distillation_with_the_common_budget(add_method):
    add_method()  # of the family "synthetic images"
    mine, ours = stages("mine"), stages("fedmitr")
    assert list(mine) == ["clients", "labels", "student"]
    assert all(mine[name] == ours[name] for name in mine)


@pytest.mark.parametrize("family", ["average", "statistics", "fusion", "reference"])
def test_a_users_method_of_another_family_trains_clients_and_sends_uploads(family, add_method):
    add_method(family=family)
    assert stages("mine") == stages("fedavg")


def test_a_users_method_that_says_its_work_is_planned_by_it(add_method):
    settings = Settings.load("laptop")
    add_method(
        work=lambda s: Work(images=9, inversion=s.inversion, student_inverted=True, student_steps=3, group=2)
    )
    mine = stages("mine", {"partition.clients": 5})
    assert list(mine) == ["clients", "groups", "inversion", "labels", "student"]
    assert mine["inversion"].what.startswith("9 images") and mine["student"].what.startswith("3 steps")
    alone = stages("fedmitr", {"partition.clients": 3, "inversion.images": 9})["inversion"]  # three groups
    student = 9 * settings.inversion.iterations * model_costs("vit_micro", 10, None).grad_image.flops
    assert mine["inversion"].flops == alone.flops + student


def test_work_with_groups_and_nothing_else_is_planned(add_method):
    add_method(work=lambda _: Work(group=2))
    assert list(stages("mine")) == ["clients", "groups"] and stages("mine")["groups"].flops == 0


def test_what_a_method_refuses_has_no_plan(add_method, one_line):
    add_method(family="average", averages=True)
    mixed = {"client.models": ["vit_micro", "vit_micro_deep"], "distill.start": "initial"}
    with pytest.raises(BadInput) as error:
        stages("mine", mixed)
    one_line(error.value, "mine", "architecture")
    with pytest.raises(BadInput) as error:
        stages("unknown")
    one_line(error.value, "unknown", "fedmitr")
