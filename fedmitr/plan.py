"""What a run would do, before it does it: stages, sizes, operations, memory, bytes.

Everything here is computed, nothing is measured. Operations are those that torch counts in the model's own
forward and backward passes on the `meta` device, which has shapes and no numbers; a stage's are those of its
models, without views, optimisers and copies. Memory is that of float32 and of attention as plain matrix
products: bfloat16 and fused attention need less, and so does a student on a CPU, where large images are taken
few at a time.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .blocks import GeneratorSettings, InversionSettings, RivalSettings, TaskSettings
from .distill import FIT_VIEWS
from .inversion import remaining
from .photos import list_folders, num_classes
from .settings import WITHOUT_STUDENT, Settings, check_architectures
from .vit import MODELS_AT_ONCE, class_logits, create_vit, vit_beside

ADAM = 4  # copies of a model in training: weights, gradients, two moments
FLOAT = 4  # bytes
# All images of a task, and how many of them are its own test part.
IMAGES = {
    "digits": (1797, None),
    "digits-plain": (1797, None),
    "cifar10": (60_000, 10_000),
    "cifar100": (60_000, 10_000),
    "svhn": (99_289, 26_032),
}


@dataclass(frozen=True)
class Stage:
    """One row of a plan: flops of all of it, the most memory it holds, bytes that cross up and down."""

    stage: str
    what: str
    flops: float = 0
    memory: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class Pass:
    """One image through one model: floating-point operations, and bytes kept for the backward pass."""

    flops: int
    kept: int


def one_pass(vit: VisionTransformer, patches: int, wanted: str = "") -> Pass:
    """The cost of one image of that many patches through a model on the meta device.

    wanted: the gradient that follows, of the "image", of the "weights", or "" for the answer alone. In
    float32, attention as plain matrix products: an upper bound of the memory of fused kernels.
    """
    vit.requires_grad_(wanted == "weights")
    width = vit.patch_embed.proj.weight[0].numel()
    view = torch.empty(1, patches, width, device="meta", requires_grad=wanted == "image")
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    place = torch.arange(patches, device="meta")[None]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.set_grad_enabled(bool(wanted)):
            answer = class_logits(vit, view, place)
        if wanted:
            answer.sum().backward()
    return Pass(counter.get_total_flops(), sum(kept.values()))


@dataclass(frozen=True)
class Costs:
    """What stages are made of: a model's passes on all patches, its bytes and those of one image."""

    vit: VisionTransformer
    answer: Pass
    to_image: Pass
    to_weights: Pass
    model: int
    image: int
    patches: int
    classes: int

    @classmethod
    def of(cls, vit: VisionTransformer) -> "Costs":
        vit, patches = vit.to("meta"), vit.patch_embed.num_patches
        passes = [one_pass(vit, patches, wanted) for wanted in ("", "image", "weights")]
        model = FLOAT * sum(value.numel() for value in vit.state_dict().values())
        image = FLOAT * patches * vit.patch_embed.proj.weight[0].numel()
        return cls(vit, *passes, model, image, patches, vit.num_classes)


Team = Sequence[Costs]  # of every client's model


def plan(method: str, settings: Settings) -> list[Stage]:
    """The stages of one run, in their order. No weights are loaded and no images read."""
    check_architectures(settings, [method])
    costs, team = costs_of(settings)
    stages = [clients(method, settings, costs, team)]
    if method == "fedmitr":
        if settings.distill.group and len(team) > settings.distill.group:
            stages += [groups(settings, costs, team)]
            team = [costs] * (-(-len(team) // settings.distill.group))
        stages += [inversion(settings.inversion, costs, team)]
        stages += distillation(settings, costs, team, settings.distill.calibrate)
    elif method not in WITHOUT_STUDENT:
        own = getattr(settings, method)
        if settings.budget == "own" and isinstance(own, GeneratorSettings):
            budget = {"inversion": {"images": own.images}, "distill": {"steps": own.student_steps}}
            blocks = {name: getattr(settings, name).model_copy(update=new) for name, new in budget.items()}
            settings = settings.model_copy(update=blocks)
        stages += [images_of_rival(own, settings, costs, team)]
        stages += distillation(settings, costs, team, own.calibrate)
    return stages


def costs_of(settings: Settings) -> tuple[Costs, Team]:
    """Of the global model, and of every client's."""
    costs = model_costs(settings.model.name, num_classes(settings.task), settings.model.image_size)
    names = [settings.model_of(k).name for k in range(settings.partition.clients)]
    known = {name: costs_beside(costs, name) for name in set(names)}
    known[settings.model.name] = costs
    return costs, [known[name] for name in names]


@functools.cache
def model_costs(name: str, classes: int, size: int | None) -> Costs:
    """Of the global model by its name; no weights are read."""
    return Costs.of(create_vit(name, classes, image_size=size))


@functools.cache
def costs_beside(costs: Costs, name: str) -> Costs:
    """Of a client's model, for the same images and classes."""
    return Costs.of(vit_beside(costs.vit, name))


def training_images(task: TaskSettings) -> int:
    """How many images all clients hold together; counted in the folder where the task is one, unopened."""
    if task.name in IMAGES:
        everything, held = IMAGES[task.name]
    else:
        listing, _ = list_folders(task)
        everything, held = len(listing.names), sum(listing.held) if listing.held else None
    share = task.validation if held else task.validation / (1 - task.test)
    rest = everything - (held or math.ceil(everything * task.test))
    train = rest - math.ceil(rest * share)
    return min(train, task.limit * num_classes(task)) if task.limit else train


def clients(method: str, settings: Settings, costs: Costs, team: Team) -> Stage:
    """Local training and the messages; of `central`, one client that holds everything and sends nothing."""
    own, count, images = settings.client, len(team), training_images(settings.task)
    trained = [costs] if method == "central" else team
    flops = own.epochs * images * sum(c.to_weights.flops for c in trained) / len(trained)
    sent = 2 * sum(c.model for c in team)
    if method == "fusefl":  # every client downloads all blocks, and runs them below the stage that it trains
        stages = settings.fusefl.stages
        flops += own.epochs * images * count * costs.answer.flops * (stages - 1) / (2 * stages)
        sent = (count + count * count) * costs.model
    if method in ("local", "central"):
        sent = 0
    who = "one client" if method == "central" else f"{count} clients"
    return Stage(
        "central" if method == "central" else "clients",
        f"{who}, {images:,} images in all, {own.epochs} epochs",
        flops,
        max(ADAM * c.model + own.batch_size * c.to_weights.kept for c in trained),
        sent,
    )


@functools.cache
def inversion_flops(costs: Costs, how: InversionSettings) -> float:
    """Of one image and one model: every iteration on the patches that are left."""
    starts = itertools.pairwise([0, *how.stop_at, how.iterations])
    return sum(
        (last - first) * one_pass(costs.vit, remaining(costs.patches, how.stop_ratio[:part]), "image").flops
        for part, (first, last) in enumerate(starts)
    )


def inversion(how: InversionSettings, costs: Costs, team: Team) -> Stage:
    """All images, each seen by one client, drawn as any other here, or by all of them."""
    owners = how.teacher == "owners"
    flops = sum(count * inversion_flops(c, how) for c, count in Counter(team).items())
    kept = [c.to_image.kept for c in team]
    at_once = max(kept) if owners or len(team) > MODELS_AT_ONCE else sum(kept)
    left = remaining(costs.patches, how.stop_ratio)
    return Stage(
        "inversion",
        f"{how.images:,} images, {how.iterations:,} iterations, {costs.patches} patches, {left} at last",
        how.images * (flops / len(team) if owners else flops),
        sum(c.model for c in team) + min(how.batch_size, how.images) * (at_once + ADAM * costs.image),
    )


def groups(settings: Settings, costs: Costs, team: Team) -> Stage:
    """Every group of clients distilled to one model, as all of them are otherwise; all uploads are held."""
    size = settings.distill.group
    parts = [team[first : first + size] for first in range(0, len(team), size)]
    each = Counter(tuple(part) for part in parts if len(part) > 1)
    flops, most = 0.0, 0.0
    for part, count in each.items():
        stages = [inversion(settings.inversion, costs, part)]
        stages += distillation(settings, costs, part, settings.distill.calibrate)
        flops += count * sum(s.flops for s in stages)
        most = max(most, *(s.memory - sum(c.model for c in part) for s in stages))
    held = sum(c.model for c in team)
    return Stage(
        "groups", f"{len(parts)} groups of {size} clients at most, each as below", flops, most + held
    )


def images_of_rival(own: RivalSettings, settings: Settings, costs: Costs, team: Team) -> Stage:
    """Dense inversion against the student, or the passes that train a generator, without its own."""
    if not isinstance(own, GeneratorSettings):  # F-ADI
        update = {"stop_at": (), "stop_ratio": (), "iterations": own.iterations}
        dense = inversion(settings.inversion.model_copy(update=update), costs, team)
        rival = settings.inversion.images * own.iterations * costs.to_image.flops * (own.competition > 0)
        return Stage(dense.stage, dense.what, dense.flops + rival, dense.memory)
    batch = getattr(own, "batch_size", settings.distill.batch_size)
    models = [*team, costs]  # the clients and the student
    kept = [c.to_image.kept for c in models]
    at_once = max(kept) if len(team) > MODELS_AT_ONCE else sum(kept)
    return Stage(
        "generation",
        f"{own.rounds} rounds of {own.generator_steps} steps on {batch} images",
        own.rounds * own.generator_steps * batch * sum(c.to_image.flops for c in models),
        sum(c.model for c in models) + batch * at_once,
    )


def distillation(settings: Settings, costs: Costs, team: Team, calibrate: float) -> list[Stage]:
    """The ensemble's labels, for every stored view or for every step, and the student's steps."""
    own, count = settings.distill, settings.inversion.images
    steps = own.steps * own.batch_size
    views = count * own.views if own.views else steps
    fit = count * FIT_VIEWS * bool(calibrate)
    stored = count * own.views * (costs.image + FLOAT * costs.classes * (1 + costs.patches))
    labelling = min(len(team), own.per_class * costs.classes) if own.per_class else len(team)
    teachers = sum(c.model for c in team)
    student = ADAM * costs.model + own.batch_size * costs.to_weights.kept
    return [
        Stage(
            "labels",
            f"{views:,} views" + (f", {fit:,} for calibration" if fit else "") + f", by {labelling} clients",
            (views + fit) * sum(c.answer.flops for c in team) * labelling / len(team),
            teachers + stored,
        ),
        Stage(
            "student",
            f"{own.steps:,} steps on {own.batch_size} images",
            steps * costs.to_weights.flops,
            teachers + stored + student,
        ),
    ]


def plan_table(stages: list[Stage]) -> pd.DataFrame:
    """A plan as text, with its sum: memory is the most of any stage."""
    total = Stage(
        "all",
        "",
        sum(s.flops for s in stages),
        max(s.memory for s in stages),
        sum(s.bytes for s in stages),
    )
    rows = [
        {
            "stage": s.stage,
            "what": s.what,
            "TFLOP": f"{s.flops / 1e12:,.3g}",
            "minutes at 1 TFLOP/s": f"{s.flops / 6e13:,.3g}",
            "memory, MB": f"{s.memory / 1e6:,.0f}",
            "messages, MB": f"{s.bytes / 1e6:,.2f}" if s.bytes else "",
        }
        for s in [*stages, total]
    ]
    return pd.DataFrame(rows).set_index("stage")
