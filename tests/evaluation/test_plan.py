"""plan.py: the plan of a run against closed forms, counts of real passes, loops and real uploads."""

import pytest
import timm
import torch
from PIL import Image

import fedmitr as fm
from fedmitr.evaluation.bench import random_uploads
from fedmitr.evaluation.flops import forward_flops, image_flops, one_pass
from fedmitr.evaluation.plan import Costs, model_costs, plan, plan_table, training_images
from fedmitr.methods import METHODS
from fedmitr.server.inversion import remaining
from fedmitr.settings import Settings
from fedmitr.settings.schema import EnsembleSettings, TaskSettings

GENERATORS = ("fdafl", "dense", "co_boosting", "fedftg")


@pytest.fixture(scope="module")
def vit():
    return fm.create_vit("vit_micro", 10).to("meta")


def stages(method, overrides=None):
    return {s.stage: s for s in plan(method, Settings.load("laptop", overrides))}


@pytest.mark.parametrize("name", ["vit_micro", "deit_tiny_patch16_224"])
def test_an_answer_costs_what_the_closed_form_says(name):
    real = fm.create_vit(name, 10)
    for patches in (5, real.patch_embed.num_patches):
        answer = one_pass(real.to("meta"), patches)
        assert answer.flops == pytest.approx(forward_flops(real, patches), rel=1e-3) and answer.kept == 0


def test_the_gradient_of_an_image_costs_what_it_costs_on_the_cpu(vit):
    ensemble = fm.Ensemble(random_uploads("vit_micro", None, 1), EnsembleSettings(mode="mean_logits"))
    for patches in (6, 36):
        assert one_pass(vit, patches, "image").flops == pytest.approx(
            image_flops(ensemble, patches), rel=1e-3
        )


def test_gradients_keep_activations_and_those_of_weights_more(vit):
    image, weights = (one_pass(vit, 36, wanted) for wanted in ("image", "weights"))
    tokens = 4 * 37 * 96  # bytes of all tokens once
    assert 4 * tokens < image.kept < weights.kept
    assert one_pass(vit, 18, "image").kept < image.kept


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


def test_more_stopped_patches_cost_less_and_all_stages_more_images_more():
    def cost(overrides):
        return sum(s.flops for s in stages("fedmitr", overrides).values())

    assert cost({"inversion.stop_ratio": [0.3] * 4}) < cost({}) < cost({"inversion.images": 800})
    assert cost({"task.test": 0.5}) < cost({}) < cost({"client.epochs": 20})


def test_distillation_is_labels_for_every_view_and_a_step_for_every_batch(vit):
    costs, found = Costs.of(vit), stages("fedmitr")
    settings = Settings.load("laptop")
    images, views = settings.inversion.images, settings.distill.views
    seen = images * views + 4 * images  # four views of each to calibrate
    assert found["labels"].flops == seen * 5 * costs.answer.flops
    assert found["student"].flops == 400 * 64 * costs.to_weights.flops
    fresh = stages("fedmitr", {"distill.views": 0, "distill.calibrate": 0})["labels"]
    assert fresh.flops == 400 * 64 * 5 * costs.answer.flops
    assert fresh.memory < found["labels"].memory


def test_messages_are_those_of_real_uploads():
    uploads = random_uploads("vit_micro", None, 5)
    both_ways = sum(u.bytes for u in uploads) * 2
    assert stages("fedavg")["clients"].bytes == pytest.approx(both_ways, rel=0.01)
    assert stages("fusefl")["clients"].bytes == pytest.approx(3 * both_ways, rel=0.01)
    assert stages("local")["clients"].bytes == stages("central")["central"].bytes == 0


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
    create, asked = timm.create_model, []
    model_costs.cache_clear()
    monkeypatch.setattr(timm, "create_model", lambda *a, **o: asked.append(o) or create(*a, **o))
    assert Settings.load("paper").model.pretrained and plan("fedmitr", Settings.load("paper"))
    assert plan("fedmitr", Settings.load("laptop"))  # whose weights are shipped
    assert asked and not any(options.get("pretrained") for options in asked)


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
    flops = Costs.of(fm.create_vit("vit_micro", 10)).to_weights.flops
    assert stages("fedavg")["clients"].flops == 15 * len(experiment.task.train) * flops
