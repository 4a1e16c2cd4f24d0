"""The plan of a run: stages with operations, memory and message sizes, computed without running.

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
from dataclasses import dataclass, replace

import pandas as pd
from timm.models.vision_transformer import VisionTransformer

from ..data.image_sets import IMAGE_SETS, TorchvisionSet, num_classes
from ..methods import Method, Work, check_methods, find
from ..server.distill import FIT_VIEWS
from ..server.inversion import remaining
from ..settings import Settings
from ..settings.schema import InversionSettings, TaskSettings
from ..vision.features import feature_width
from ..vision.tokens import MODELS_AT_ONCE
from ..vision.vit import create_vit, vit_beside
from .flops import Pass, one_pass

ADAM = 4  # copies of a model in training: weights, gradients, two moments
FLOAT = 4  # bytes
GRAMS = 3  # copies of a Gram matrix while it is summed
DIGITS = 1797  # images of scikit-learn's digits


@dataclass(frozen=True)
class Stage:
    """One row of a plan: its floating-point operations, the most bytes it holds, and the bytes it sends.

    bytes: of all messages, up and down together.
    """

    stage: str
    what: str
    flops: float = 0
    memory: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class ModelCosts:
    """The costs of one model, from which those of the stages are put together.

    forward, grad_image, grad_weights: one image with all its patches through the model, without a gradient
    and with that of the image or of the weights. model_bytes: the weights; image_bytes: one image.
    """

    vit: VisionTransformer
    forward: Pass
    grad_image: Pass
    grad_weights: Pass
    model_bytes: int
    image_bytes: int
    patches: int
    classes: int

    @classmethod
    def of(cls, vit: VisionTransformer) -> "ModelCosts":
        """Count the costs of a model, which is moved to the `meta` device."""
        vit, patches = vit.to("meta"), vit.patch_embed.num_patches
        passes = [one_pass(vit, patches, wanted) for wanted in ("", "image", "weights")]
        model_bytes = FLOAT * sum(value.numel() for value in vit.state_dict().values())
        image_bytes = FLOAT * patches * vit.patch_embed.proj.weight[0].numel()
        return cls(vit, *passes, model_bytes, image_bytes, patches, vit.num_classes)


Team = Sequence[ModelCosts]  # the costs of each client's model, in the order of clients


def plan(name: str, settings: Settings) -> list[Stage]:
    """List the stages of one run of a method, in order. No weights are loaded and no images are read.

    The method's record says what clients are given and send, and what the server computes
    (`Method.work_under`). Raises BadInput for settings that the method refuses.
    """
    check_methods([name], settings)
    method = find(name)
    work = replace(method.work_under(settings), with_statistics=method.needs_statistics_under(settings))
    student, team = costs_of(settings)
    stages = [_clients(method, settings, student, team)]
    held = 0.0  # the server keeps every client's sums, a whole Gram matrix each, beside its weights
    if work.with_statistics:
        width = feature_width(student.vit, method.adapted(settings).statistics.tokens)
        held = len(team) * _sums_bytes(width, student.classes)
    if work.group and len(team) > work.group:
        stages += [_groups(work, settings, student, team)]
        team = [student] * (-(-len(team) // work.group))  # each group has become one upload
    stages += _server_stages(work, settings, student, team)
    return [stages[0], *(replace(stage, memory=stage.memory + held) for stage in stages[1:])]


def _sums_bytes(width: int, classes: int, grams: int = 1) -> int:
    """Count the bytes of sums of features in memory, in float64, with so many Gram matrices."""
    return 2 * FLOAT * width * (grams * width + classes)


def _server_stages(work: Work, settings: Settings, student: ModelCosts, team: Team) -> list[Stage]:
    """List what the server computes from the uploads of the clients in `team`."""
    stages = []
    if work.inversion:
        stages += [_inversion(work, student, team)]
    if work.generator_steps:
        stages += [_generation(work, student, team)]
    if work.student_steps or work.calibrate:
        stages += _distillation(work, settings, student, team)
    return stages


def costs_of(settings: Settings) -> tuple[ModelCosts, Team]:
    """Return the costs of the global model, and those of each client's model, which may be another."""
    own = settings.model
    student = model_costs(own.name, num_classes(settings.task), own.image_size)
    names = [settings.model_of(k).name for k in range(settings.partition.clients)]
    known = {name: _costs_beside(student, name) for name in set(names) - {own.name}} | {own.name: student}
    return student, [known[name] for name in names]


@functools.cache
def model_costs(name: str, classes: int, image_size: int | None) -> ModelCosts:
    """Return the costs of a model by its timm name, class count and image side; its weights are not read."""
    return ModelCosts.of(create_vit(name, classes, image_size=image_size))


@functools.cache
def _costs_beside(student: ModelCosts, name: str) -> ModelCosts:
    """Return the costs of a client's model of another name, for the images and classes of the student."""
    return ModelCosts.of(vit_beside(student.vit, name))


def training_images(task: TaskSettings) -> int:
    """Count the images that all clients hold together; those of a folder are listed and not opened."""
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


def _clients(method: Method, settings: Settings, student: ModelCosts, team: Team) -> Stage:
    """Plan what clients compute, local training or sums of features or both, and the messages.

    For `central` one client holds all images and sends nothing. For a method that trains stage by stage
    (FuseFL) every client downloads all clients' blocks, and runs those of the stages before on its images.
    For one that asks for statistics after the uploads, every client is sent the models of all, or their
    average, and sends the sums of their features.
    """
    own, count, images = settings.client, len(team), training_images(settings.task)
    alone = method.given == "central"
    trained, flops, memory = [student] if alone else team, 0.0, 0.0
    summed = method.needs_statistics_under(settings)
    sent = 0.0
    if summed:  # down: the shared model, to clients that have not started from it
        others = [c for c in team if c is not student] if method.needs_weights else team
        sent += len(others) * student.model_bytes
    if method.needs_weights:
        sent += 2 * sum(c.model_bytes for c in team)  # down and up
        flops = own.epochs * images * sum(c.grad_weights.flops for c in trained) / len(trained)
        memory = max(ADAM * c.model_bytes + own.batch_size * c.grad_weights.kept for c in trained)
    if method.given == "stages":
        stages = method.exchanges_under(settings)
        # training stage s of S runs s / S of every client's blocks, s = 0 … S − 1: (S − 1) / 2S on average
        flops += own.epochs * images * count * student.forward.flops * (stages - 1) / (2 * stages)
        sent = (count + count * count) * student.model_bytes
    if summed or method.given == "clients":
        models = [student] if method.single_model or method.given != "clients" else list(team)
        how = method.adapted(settings).statistics
        width = sum(feature_width(c.vit, how.tokens) for c in models)
        flops += images * (1 + how.views) * (sum(c.forward.flops for c in models) + 2 * width * width)
        # float64: the models, sums, and the Gram matrix, its triangle and one that is added to it
        sums = _sums_bytes(width, student.classes, GRAMS)
        memory = max(memory, 2 * sum(c.model_bytes for c in models) + sums)
        sent += count * 2 * FLOAT * (width * (width + 1) // 2 + (width + 1) * student.classes)
        sent += count * sum(c.model_bytes for c in models) if method.given == "clients" else 0
    who = "one client" if alone else f"{count} clients"
    views = method.adapted(settings).statistics.views
    once = f", {1 + views} passes" if views else ", one pass"
    passes = f", {own.epochs} epochs" if method.needs_weights else once
    return Stage(
        "central" if alone else "clients",
        f"{who}, {images:,} images in all{passes}",
        flops,
        memory,
        sent if method.sends else 0,
    )


@functools.cache
def _inversion_flops(costs: ModelCosts, how: InversionSettings) -> float:
    """Compute the operations of inverting one image from one model: each iteration on the patches left."""
    starts = itertools.pairwise([0, *how.stop_at, how.iterations])
    return sum(
        (last - first) * one_pass(costs.vit, remaining(costs.patches, how.stop_ratio[:part]), "image").flops
        for part, (first, last) in enumerate(starts)
    )


def _inversion(work: Work, student: ModelCosts, team: Team) -> Stage:
    """Plan the inversion of all images: each from one of its owners, or from all clients."""
    how = work.inversion
    owners = how.teacher == "owners"
    flops = sum(count * _inversion_flops(c, how) for c, count in Counter(team).items())
    flops = flops / len(team) if owners else flops
    if work.student_inverted:
        flops += how.iterations * student.grad_image.flops
    if how.mask == "attention":
        flops += sum(c.forward.flops for c in team) / (len(team) if owners else 1)
    kept = [c.grad_image.kept for c in team]
    at_once = max(kept) if owners or len(team) > MODELS_AT_ONCE else sum(kept)
    left = remaining(student.patches, how.stop_ratio)
    batch = min(how.batch_size, work.images)
    return Stage(
        "inversion",
        f"{work.images:,} images, {how.iterations:,} iterations, {student.patches} patches, {left} at last",
        work.images * flops,
        sum(c.model_bytes for c in team) + batch * (at_once + ADAM * student.image_bytes),
    )


def _groups(work: Work, settings: Settings, student: ModelCosts, team: Team) -> Stage:
    """Plan the distillation of every group of clients to one model, while the uploads of all are held."""
    parts = [team[first : first + work.group] for first in range(0, len(team), work.group)]
    each = Counter(tuple(part) for part in parts if len(part) > 1)
    flops, most = 0.0, 0.0
    for part, count in each.items():
        stages = _server_stages(work, settings, student, part)
        flops += count * sum(s.flops for s in stages)
        uploads = sum(c.model_bytes for c in part)  # counted below, with those of all clients
        most = max([most, *(s.memory - uploads for s in stages)])
    held = sum(c.model_bytes for c in team)
    return Stage(
        "groups", f"{len(parts)} groups of {work.group} clients at most, each as below", flops, most + held
    )


def _generation(work: Work, student: ModelCosts, team: Team) -> Stage:
    """Plan the passes through clients and student that train a generator, without the generator's own."""
    models = [*team, student]
    kept = [c.grad_image.kept for c in models]
    at_once = max(kept) if len(team) > MODELS_AT_ONCE or work.one_client else sum(kept)
    clients = sum(c.grad_image.flops for c in team) / (len(team) if work.one_client else 1)
    return Stage(
        "generation",
        f"{work.generator_steps:,} steps on {work.generator_batch} images",
        work.generator_steps * work.generator_batch * (clients + student.grad_image.flops),
        sum(c.model_bytes for c in models) + work.generator_batch * at_once,
    )


def _distillation(work: Work, settings: Settings, student: ModelCosts, team: Team) -> list[Stage]:
    """Plan the ensemble's labels, for every stored view or for every step, and the student's steps."""
    own, count = settings.distill, work.images
    steps = work.student_steps * own.batch_size
    views = (count * own.views if own.views else steps) if steps else 0
    # methods that make images round by round fit offsets to views that are labelled already
    fit = count * FIT_VIEWS * bool(work.calibrate and work.inversion and not work.student_inverted)
    stored = count * own.views * (student.image_bytes + FLOAT * student.classes * (1 + student.patches))
    labelling = min(len(team), own.per_class * student.classes) if own.per_class else len(team)
    teachers = sum(c.model_bytes for c in team)
    training = ADAM * student.model_bytes + own.batch_size * student.grad_weights.kept
    stages = [
        Stage(
            "labels",
            f"{views:,} views" + (f", {fit:,} for calibration" if fit else "") + f", by {labelling} clients",
            (views + fit + work.reweighing) * sum(c.forward.flops for c in team) * labelling / len(team)
            + views * work.perturbed * sum(c.grad_image.flops for c in team)
            + (views + fit) * student.forward.flops * work.with_statistics,
            teachers + stored,
        )
    ]
    if steps:
        what = f"{work.student_steps:,} steps on {own.batch_size} images"
        trained = student.forward if own.train == "head" else student.grad_weights
        flops = steps * trained.flops
        stages.append(Stage("student", what, flops, teachers + stored + training))
    return stages


def plan_table(stages: list[Stage]) -> pd.DataFrame:
    """Return a plan as a table of text with a last row for all stages: sums, and the most memory of any."""
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
