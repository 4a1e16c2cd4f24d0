"""Clients whose ViTs differ: one ensemble, one run, and a line for what needs one architecture."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL_OPTIONS, call_cli, loud, read_cli

import fedmitr as fm
from fedmitr.evaluation.foreground import surviving_patches
from fedmitr.evaluation.metrics import predict
from fedmitr.evaluation.plan import plan
from fedmitr.experiments.run import Experiment
from fedmitr.methods import METHODS, find
from fedmitr.server import ensemble as room
from fedmitr.server.ensemble import Owners
from fedmitr.settings import Settings, parse_assignment
from fedmitr.settings.schema import EnsembleSettings, InversionSettings, ModelSettings, RelabelSettings
from fedmitr.upload import ModelShape, wire_bytes
from fedmitr.vision.tokens import forward_tokens, images_at_once
from fedmitr.vision.vit import client_vit, normalisation, renormalise

NAMES = ("vit_micro", "vit_micro_patch6", "vit_micro_deep")
MIXED = [
    *SMALL_OPTIONS,
    "--set",
    "client.models=[vit_micro_patch6,vit_micro]",
    "--set",
    "distill.start=initial",
]


def upload_of(client, name, counts=(1,) * 10):
    vit = loud(fm.create_vit(name, 10), seed=client, scale=0.1)
    return fm.Upload(client, sum(counts), ModelShape.of(name, vit), vit.state_dict(), tuple(counts))


@pytest.fixture(scope="module")
def different():
    return [upload_of(k, name) for k, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def together(different):
    """Seen on the grid of the second's, 4 by 4 patches of 6."""
    return fm.Ensemble(different, EnsembleSettings(mode="mean_logits"), like=different[1].vit())


def test_each_member_answers_for_whole_images_as_it_does_alone(different, together, images):
    found = together.logits(images)
    for upload, logits in zip(different, found, strict=True):
        torch.testing.assert_close(logits, upload.vit()(images))
    mean = torch.stack([u.vit()(images) for u in different]).mean(0).log_softmax(1)
    torch.testing.assert_close(together(images), mean)


def test_a_subset_hides_the_rest_from_every_member(together, images):
    keep = torch.tensor([[0, 1, 4, 5]]).expand(3, -1)  # the upper left quarter: 12 pixels, on every grid
    hidden = images.clone()
    hidden[:, :, 12:] = hidden[:, :, :, 12:] = 7.0
    torch.testing.assert_close(together.logits(images, keep), together.logits(hidden, keep))
    alone = together.members[0](images)
    assert not torch.allclose(together.logits(images, keep)[0], alone)


def test_token_logits_of_another_grid_are_interpolated(different, images):
    pair = fm.Ensemble(different[:2], EnsembleSettings(mode="mean_logits"))
    assert pair.grid.patches == 36
    first = forward_tokens(different[0].vit(), images)[1]
    second = forward_tokens(different[1].vit(), images)[1].transpose(1, 2).unflatten(2, (4, 4))
    second = F.interpolate(second, size=(6, 6), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(pair.forward_tokens(images)[1], ((first + second) / 2).log_softmax(-1))


def test_importance_of_all_sums_to_what_members_attend_to(together, images):
    patches, place = together.cut(images)
    found = together.importance(patches, place)
    alone = [fm.Ensemble([upload_of(k, name)]) for k, name in enumerate(NAMES)]
    wanted = [one.importance(*one.cut(images)).sum(1) for one in alone]
    assert found.shape == (3, 16)
    torch.testing.assert_close(found.sum(1), torch.stack(wanted).mean(0))


def test_owners_see_their_own_cut(together, images):
    owners = Owners(together, torch.tensor([2, 0, 1]))
    found = owners.forward_patches(*together.cut(images))
    for row, k in enumerate([2, 0, 1]):
        alone = together.members[k](images[row : row + 1]).log_softmax(1)[0]
        torch.testing.assert_close(found[row], alone)


@pytest.mark.parametrize("teacher", ["owners", "ensemble"])
def test_inversion_and_relabel_run_on_the_grid_of_the_student(teacher, together):
    how = InversionSettings(iterations=6, stop_at=(2,), stop_ratio=(0.5,), teacher=teacher)
    made = fm.invert(together, torch.tensor([3, 4]), how, seed=0)
    assert made.mask.shape == (2, 16) and made.mask.sum(1).tolist() == [8, 8]
    for source in ("token_logits", "background_cls"):
        targets = fm.relabel_tokens(together, made, RelabelSettings(source=source, foreground_soft=0.0))
        hard = F.one_hot(made.labels, 10)[:, None].expand(-1, 16, -1).float()
        assert torch.equal(targets[made.mask], hard[made.mask]) and targets.shape == (2, 16, 10)
        torch.testing.assert_close(targets.sum(-1), torch.ones(2, 16))
    assert surviving_patches(together, made.pixels, [0.5]).sum(1).tolist() == [8, 8]


def test_uploads_for_other_images_are_one_line(different, one_line):
    other = dataclasses.replace(different[1], shape=different[1].shape.model_copy(update={"image_size": 48}))
    with pytest.raises(fm.BadInput) as error:
        fm.Ensemble([different[0], other])
    one_line(error.value, "client 1", "48")


# Another normalisation of the same images.


@pytest.mark.parametrize("name", ["test_vit", "vit_micro_deep"])
def test_a_client_model_is_its_own_function_of_the_pixels(name):
    """As itself on images normalised for it, whatever the global model's pixels are."""
    initial = fm.create_vit("deit_tiny_patch16_224", 10, image_size=48)
    own = fm.create_vit(name, 10, image_size=48, in_chans=3)
    taught = client_vit(initial, ModelSettings(name=name, pretrained=False))
    raw = torch.rand(2, 3, 48, 48)
    (mean, std), (their_mean, their_std) = normalisation(initial), normalisation(own)
    assert not torch.equal(mean, their_mean)
    with torch.no_grad():
        wanted, found = own.eval()((raw - their_mean) / their_std), taught.eval()((raw - mean) / std)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_one_channel_takes_the_mean_of_a_colour_models_numbers():
    grey = fm.create_vit("vit_micro", 10, image_size=32)
    taught = client_vit(grey, ModelSettings(name="test_vit", pretrained=False))
    own = fm.create_vit("test_vit", 10, image_size=32, in_chans=1).eval()
    raw = torch.rand(2, 1, 32, 32)
    mean, std = (torch.tensor(own.pretrained_cfg[n]).mean() for n in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(
            taught.eval()((raw - 0.5) / 0.25), own((raw - mean) / std), rtol=1e-3, atol=1e-4
        )


def test_without_a_bias_another_normalisation_is_one_line(one_line):
    vit = fm.create_vit("vit_micro", 10)
    vit.patch_embed.proj.bias = None
    same = renormalise(vit, normalisation(vit))
    assert same is vit
    with pytest.raises(fm.BadInput) as error:
        renormalise(vit, (torch.zeros(1, 1, 1), torch.ones(1, 1, 1)))
    one_line(error.value, "normalises")


# A whole run.


def test_models_are_dealt_out_in_turn():
    settings = Settings.load("smoke", {"client.models": NAMES[1:], "partition.clients": 5})
    assert [settings.model_of(k).name for k in range(5)] == [*NAMES[1:], *NAMES[1:], NAMES[1]]
    assert settings.mixed and not Settings.load("smoke").mixed
    assert not Settings.load("smoke", {"client.models": ["vit_micro"]}).mixed


def test_a_run_with_two_architectures(tmp_path):
    result = read_cli("run", "--method", "fedmitr", "--json", "--store", tmp_path, *MIXED)
    assert result["fedavg_accuracy"] is None and 0 <= result["accuracy"] <= 1
    given = dict(word.split("=", 1) for word in MIXED if "=" in word)
    overrides = {name: parse_assignment(f"{name}={value}")[1] for name, value in given.items()}
    overrides |= {"partition.clients": 2, "partition.alpha": 1.0}
    these = Experiment(Settings.load("smoke", overrides), tmp_path)
    assert [u.shape.name for u in these.uploads] == ["vit_micro_patch6", "vit_micro"]
    assert result["upload_bytes"] == sum(u.bytes for u in these.uploads)
    test = these.task.test
    alone = [u.vit()(test.images).argmax(1) == test.labels for u in these.uploads]
    assert result["local_accuracies"] == pytest.approx([a.double().mean().item() for a in alone])
    again = read_cli("run", "--method", "fedmitr", "--json", "--store", tmp_path, *MIXED)
    assert again == result
    text = call_cli("run", "--method", "fedmitr", "--store", tmp_path, *MIXED)
    assert text.exit_code == 0 and "FedAvg" not in text.stdout


OTHERS = [name for name, record in METHODS.items() if not record.averages and name != "fedmitr"]


@pytest.mark.parametrize("method", OTHERS)
def test_every_other_method_that_does_not_average_takes_them(method, tmp_path_factory):
    store = tmp_path_factory.getbasetemp() / "mixed"
    few = [
        w for n in ("fdafl", "dense", "co_boosting", "fedftg") for w in ("--set", f"{n}.generator_steps=1")
    ]
    few += ["--set", "fadi.iterations=2", "--set", "fishermix.epochs=1"]
    result = read_cli("run", "--method", method, "--json", "--store", store, *MIXED, *few)
    assert np.isfinite(result["accuracy"]) and result["fedavg_accuracy"] is None


def test_statistics_are_the_shared_models_whatever_a_clients_own_is(tmp_path):
    """So they add, and are those of clients that all have the shared model."""
    pair = {"client.models": ["vit_micro_deep", "vit_micro_patch6"], "distill.start": "initial"}
    mixed, equal = (
        Experiment(Settings.load("smoke", {"partition.clients": 2} | changes), tmp_path)
        for changes in (pair, {})
    )
    for one, other in zip(mixed.uploads_for("ridge"), equal.uploads_for("ridge"), strict=True):
        assert one.digest == other.digest and one.shape.name == "vit_micro"
    whole = mixed.uploads_for("fedmitr_plus")
    assert [u.shape.name for u in whole] == pair["client.models"]
    assert [u.features for u in whole] == [
        mixed.features_of(find("fedmitr_plus").adapted(mixed.settings))
    ] * 2
    assert mixed.result("ridge").accuracy == equal.result("ridge").accuracy
    assert mixed.result("ridge").download_bytes == equal.result("ridge").download_bytes
    own = [wire_bytes(mixed.shared(mixed.settings.model_of(k)).state_dict()) for k in range(2)]
    shared = wire_bytes(mixed.initial.state_dict())
    assert mixed.result("fedmitr_plus").download_bytes == sum(own) + 2 * shared
    assert mixed.result("fedmitr").download_bytes == sum(own)


def test_a_client_with_the_global_architecture_is_the_same_client(tmp_path):
    """Its upload is addressed, and reused, as where all have one architecture."""
    mixed = Experiment(Settings.load("smoke", {"client.models": ["vit_micro_deep", "vit_micro"]}), tmp_path)
    equal = Experiment(Settings.load("smoke"), tmp_path)
    assert mixed.upload_key(1) == equal.upload_key(1) and mixed.upload_key(0) != equal.upload_key(0)
    assert mixed.central_key == equal.central_key


def test_two_students_of_one_store_have_images_and_references_of_their_own(tmp_path):
    """The same uploads under students with other patch grids; the second has no FedAvg beside it."""
    of = ["--set", "distill.start=initial", "--set", "client.models=[vit_micro]", "--store", tmp_path]
    for student, average in (("vit_micro", True), ("vit_micro_patch6", False), ("vit_micro", True)):
        name = ["--set", f"model.name={student}"]
        for method in ("fedmitr", "local"):
            result = read_cli("run", "--method", method, "--json", *SMALL_OPTIONS, *of, *name)
            assert (result["fedavg_accuracy"] is not None) == average


@pytest.mark.parametrize(
    "method, more, words",
    [
        ("fedavg", [], ("fedavg", "one architecture", "client.models", "vit_micro_patch6")),
        ("fusefl", [], ("fusefl", "one architecture")),
        ("fedavg_ridge", [], ("fedavg_ridge", "one architecture")),
        ("textures", ["--set", "distill.start=average"], ("distill.start", "initial")),
        ("real_images", ["--set", "distill.start=average"], ("distill.start", "initial")),
        ("fedmitr", ["--set", "distill.start=average"], ("distill.start", "initial")),
        ("dense", ["--set", "distill.start=average"], ("distill.start", "initial")),
        ("fedmitr", ["--set", "client.models=[vit_maximal]"], ("client.models", "vit_maximal", "allowed")),
        ("fedmitr", ["--set", "client.models=[vit_tiny_patch16_224]"], ("client.models", "multiple")),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(method, more, words, tmp_path, one_line):
    done = call_cli("run", "--method", method, "--store", tmp_path, *MIXED, *more)
    assert done.exit_code == 2
    one_line(done.stderr.strip(), *words)
    assert not list(tmp_path.glob("uploads/*"))


@pytest.mark.parametrize("name", ["vit_maximal", "vit_tiny_patch16_224"])
def test_a_plan_names_the_setting(name, one_line):
    with pytest.raises(fm.BadInput) as error:
        plan("fedmitr", Settings.load("smoke", {"client.models": [name], "distill.start": "initial"}))
    one_line(error.value, "client.models", "allowed")


def test_letters_of_one_channel_do_not_fit_a_model_of_colours(one_line):
    colours = fm.create_vit("deit_tiny_patch16_224", 10, image_size=48)
    with pytest.raises(fm.BadInput) as error:
        client_vit(colours, ModelSettings(name="vit_micro_deep"))
    one_line(error.value, "client.models", "vit_micro_deep", "one channel")


def test_a_plan_adds_up_the_clients_own_models():
    models = {"client.models": ["vit_micro_patch6", "vit_micro_deep"], "distill.start": "initial"}
    settings = Settings.load("laptop", models | {"partition.clients": 2, "model.pretrained": False})
    mixed = {s.stage: s for s in plan("fedmitr", settings)}
    alone = []
    for name in models["client.models"]:
        one = settings.model_copy(
            update={
                "model": ModelSettings(name=name),
                "client": settings.client.model_copy(update={"models": ()}),
            }
        )
        alone.append({s.stage: s for s in plan("fedmitr", one)})
    assert mixed["labels"].flops == pytest.approx(sum(a["labels"].flops for a in alone) / 2)
    assert mixed["clients"].flops == pytest.approx(sum(a["clients"].flops for a in alone) / 2)
    assert mixed["inversion"].flops == pytest.approx(sum(a["inversion"].flops for a in alone) / 2)
    assert mixed["clients"].bytes == sum(a["clients"].bytes for a in alone) / 2


# Many clients.


def test_many_members_give_the_same_gradients_with_less_held(images, monkeypatch):
    """Above `MODELS_AT_ONCE` members each forward is computed again in the backward pass, one at a time."""
    many = fm.Ensemble([upload_of(k, NAMES[k % 3]) for k in range(4)], EnsembleSettings(mode="mean_probs"))

    def gradient():
        kept = []
        patches, place = many.cut(images)
        patches = patches.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = many.forward_patches(patches, place)[:, 3].sum()
        return torch.autograd.grad(loss, patches)[0], sum(kept)

    held, much = gradient()
    monkeypatch.setattr(room, "MODELS_AT_ONCE", 3)
    again, little = gradient()
    assert torch.equal(held, again) and little < much / 20


def test_many_members_see_few_images_at_a_time_and_answer_the_same(together, monkeypatch):
    images = torch.randn(7, 1, 24, 24, generator=torch.Generator().manual_seed(4))
    keep = torch.arange(7)[:, None] + torch.arange(5)[None]
    wanted = together.logits(images), together.logits(images, keep), *together.forward_tokens(images)
    sizes = []
    for member in together.members:
        member.norm.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(room, "MODELS_AT_ONCE", 1)
    monkeypatch.setattr(room, "images_at_once", lambda ensemble: 2)
    found = together.logits(images), together.logits(images, keep), *together.forward_tokens(images)
    assert set(sizes) == {2, 1}
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_hundred_members_are_shown_as_many_images_as_fit_and_no_fewer():
    """The limit of `images_at_once` holds once, not once more for what it has let through."""
    upload = upload_of(0, "vit_micro_patch6")
    many = fm.Ensemble([dataclasses.replace(upload, client=k) for k in range(40)])
    sizes = []
    many.members[7].norm.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    images = torch.randn(100, 1, 24, 24, generator=torch.Generator().manual_seed(4))
    predict(many, images)
    assert images_at_once(many) == 64 and sizes == [64, 36]
    many.logits(images)
    assert sizes[2:] == [64, 36]


def test_an_ensemble_takes_no_room_beyond_its_uploads(different):
    for upload, member in zip(different, fm.Ensemble(different).members, strict=True):
        own = {name: value.data_ptr() for name, value in member.state_dict().items()}
        assert own == {name: value.data_ptr() for name, value in upload.weights.items()}
