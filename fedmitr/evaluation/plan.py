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
from timm.models.vision_transformer import VisionTransformer

from ..data.image_sets import IMAGE_SETS, TorchvisionSet, num_classes
from ..methods import Method, Work, check_methods, find
from ..server.distill import FIT_VIEWS
from ..server.inversion import remaining
from ..settings import Settings
from ..settings.schema import InversionSettings, TaskSettings
from ..vision.tokens import MODELS_AT_ONCE
from ..vision.vit import create_vit, vit_beside
from .flops import Pass, one_pass

ADAM = 4  # copies of a model in training: weights, gradients, two moments
FLOAT = 4  # bytes
DIGITS = 1797  # images of scikit-learn's digits


@dataclass(frozen=True)
class Stage:
    """One row of a plan: flops of all of it, the most memory it holds, bytes that cross up and down."""

    stage: str
    what: str
    flops: float = 0
    memory: float = 0
    bytes: float = 0


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


def plan(name: str, settings: Settings) -> list[Stage]:
    """List the stages of one run of a method, in their order. No weights are loaded and no images read.

    What the server does is what the method's record says (`Method.work`). Raises BadInput as `run` does.
    """
    check_methods([name], settings)
    method = find(name)
    work = method.work_under(settings)
    costs, team = costs_of(settings)
    stages = [clients(method, settings, costs, team)]
    if work.group and len(team) > work.group:
        stages += [groups(work, settings, costs, team)]
        team = [costs] * (-(-len(team) // work.group))
    return stages + server_stages(work, settings, costs, team)


def server_stages(work: Work, settings: Settings, costs: Costs, team: Team) -> list[Stage]:
    """List what the server computes from the uploads of one group of clients."""
    stages = []
    if work.inversion:
        stages += [inversion(work, costs, team)]
    if work.generator_steps:
        stages += [generation(work, costs, team)]
    if work.student_steps:
        stages += distillation(work, settings, costs, team)
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
    """Count the images that all clients hold together; in the folder where the task is one, unopened."""
    image_set, held = IMAGE_SETS.get(task.name), None
    if image_set is None:
        everything = DIGITS
    elif isinstance(image_set, TorchvisionSet):
        everything, held = image_set.images
    else:
        listing = image_set.list_files(task)
        everything, held = len(listing.names), sum(listing.held) if listing.held else None
    share = task.validation if held else task.validation / (1 - task.test)
    rest = everything - (held or math.ceil(everything * task.test))
    train = rest - math.ceil(rest * share)
    return min(train, task.limit * num_classes(task)) if task.limit else train


def clients(method: Method, settings: Settings, costs: Costs, team: Team) -> Stage:
    """Local training and the messages; of `central`, one client that holds everything and sends nothing."""
    own, count, images = settings.client, len(team), training_images(settings.task)
    alone = method.given == "central"
    trained = [costs] if alone else team
    flops = own.epochs * images * sum(c.to_weights.flops for c in trained) / len(trained)
    sent = 2 * sum(c.model for c in team) if method.sends else 0
    if method.given == "clients":  # all download all blocks, and run them below the stage that they train
        stages = method.exchanges_under(settings)
        flops += own.epochs * images * count * costs.answer.flops * (stages - 1) / (2 * stages)
        sent = (count + count * count) * costs.model
    who = "one client" if alone else f"{count} clients"
    return Stage(
        "central" if alone else "clients",
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


def inversion(work: Work, costs: Costs, team: Team) -> Stage:
    """All images: each inverted from one client, where owners are inverted, else from all of them."""
    how = work.inversion
    owners = how.teacher == "owners"
    flops = sum(count * inversion_flops(c, how) for c, count in Counter(team).items())
    flops = flops / len(team) if owners else flops
    if work.student_inverted:
        flops += how.iterations * costs.to_image.flops
    kept = [c.to_image.kept for c in team]
    at_once = max(kept) if owners or len(team) > MODELS_AT_ONCE else sum(kept)
    left = remaining(costs.patches, how.stop_ratio)
    return Stage(
        "inversion",
        f"{work.images:,} images, {how.iterations:,} iterations, {costs.patches} patches, {left} at last",
        work.images * flops,
        sum(c.model for c in team) + min(how.batch_size, work.images) * (at_once + ADAM * costs.image),
    )


def groups(work: Work, settings: Settings, costs: Costs, team: Team) -> Stage:
    """Every group of clients distilled to one model, as all of them are otherwise; all uploads are held."""
    parts = [team[first : first + work.group] for first in range(0, len(team), work.group)]
    each = Counter(tuple(part) for part in parts if len(part) > 1)
    flops, most = 0.0, 0.0
    for part, count in each.items():
        stages = server_stages(work, settings, costs, part)
        flops += count * sum(s.flops for s in stages)
        most = max(most, *(s.memory - sum(c.model for c in part) for s in stages))
    held = sum(c.model for c in team)
    return Stage(
        "groups", f"{len(parts)} groups of {work.group} clients at most, each as below", flops, most + held
    )


def generation(work: Work, costs: Costs, team: Team) -> Stage:
    """The passes through clients and student that train a generator, without its own."""
    models = [*team, costs]  # the clients and the student
    kept = [c.to_image.kept for c in models]
    at_once = max(kept) if len(team) > MODELS_AT_ONCE else sum(kept)
    return Stage(
        "generation",
        f"{work.generator_steps:,} steps on {work.generator_batch} images",
        work.generator_steps * work.generator_batch * sum(c.to_image.flops for c in models),
        sum(c.model for c in models) + work.generator_batch * at_once,
    )


def distillation(work: Work, settings: Settings, costs: Costs, team: Team) -> list[Stage]:
    """The ensemble's labels, for every stored view or for every step, and the student's steps."""
    own, count = settings.distill, work.images
    steps = work.student_steps * own.batch_size
    views = count * own.views if own.views else steps
    fit = count * FIT_VIEWS * bool(work.calibrate)
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
            f"{work.student_steps:,} steps on {own.batch_size} images",
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
