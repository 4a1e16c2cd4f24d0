"""What the methods that distil share: the student, its pool of images, the rounds, the stored outcome."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, pairwise
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..core.machine import device
from ..core.progress import timed
from ..core.rng import make_rng
from ..core.store import Store, fingerprint, read_tensors, write_json, write_tensors
from ..server.distill import fit_offset, student_optimizer, train_student
from ..server.ensemble import Ensemble
from ..server.synthetic import SyntheticSet, load_synthetic, save_synthetic
from ..server.views import Batch, draw_views, epochs, rows_of, view
from ..settings import Settings, SettingsBlock
from ..settings.schema import NotNegative, Positive, RelabelSettings, setting
from ..upload import Upload
from ..vision.features import FeatureClassifier
from ..vision.tokens import images_at_once, kept_patches
from ..vision.vit import weights_digest
from ._method import Outcome, Range, Search
from ._start import build_ensemble, global_shape, initial_model
from ._statistics import ridge_classifier
from .fedavg import average_weights

# Settings of the `distill` block that FedMITR alone reads: other methods have their own, or no use for them.
FEDMITR_ALONE = {"lr", "temperature", "ce_weight", "calibrate", "token_weight", "per_class", "group"}
KD_TEMPERATURE = "temperature T of the distillation loss of its student"
CE_WEIGHT = "weight of the cross-entropy of CLS to the images' labels, in distillation"
CALIBRATE = "penalty λ of class offsets fitted to the images' labels before each round; 0: none"


class StudentSettings(SettingsBlock):
    """The student of a method that distils; FedMITR's is set by the `distill` block."""

    student_lr: Positive = setting(3e-4, "peak learning rate of its student")
    kd_temperature: Positive = setting(1.0, KD_TEMPERATURE)
    ce_weight: NotNegative = setting(0.0, CE_WEIGHT)
    calibrate: NotNegative = setting(0.0, CALIBRATE)


def student_search(block: str) -> Search:
    """List what tuning may try for the student of a method with this block of settings, and its teacher.

    None of our additions is among it: no label cross-entropy, no class offsets.
    """
    return {
        "ensemble.mode": ("mean_probs", "mean_logits", "size", "class"),
        "distill.start": ("average", "initial"),
        f"{block}.student_lr": Range(1e-4, 2e-3, log=True),
        f"{block}.kd_temperature": Range(1.0, 20.0, log=True),
    }


NO_TOKENS = RelabelSettings(mode="none")
WEIGHTS, ACCOUNT = "weights.safetensors", "account.json"
Teacher = Callable[[Tensor, Tensor], Tensor]  # clients' logits (K, B, C) and labels (B,) to log-probs (B, C)


def student_start(uploads: Sequence[Upload], settings: Settings) -> VisionTransformer | FeatureClassifier:
    """Make the student as it is before distillation (`distill.start`).

    It is the clients' average, the shared initial model, or that model with the head of ridge regression from
    the clients' statistics. The last one's logits are β·r(x), what ridge scores are in the teacher.
    """
    if settings.distill.start == "statistics":
        student = ridge_classifier(uploads, settings)
        for parameter in student.head.parameters():
            parameter.mul_(settings.statistics.weight)
        return student
    if settings.distill.start == "initial":
        return initial_model(uploads, settings)
    vit = global_shape(uploads, settings).build()
    vit.load_state_dict(average_weights(uploads))
    return vit.to(device())


class Student:
    """A student that learns, round by round, from a growing pool of images that the clients labelled.

    The pool keeps every client's logits for each view, so that a teacher whose weights change, or that
    depends on the target label, costs no new forward passes. With `ensemble.anchor` it keeps ridge scores,
    too, and they join whatever a method takes for its teacher. change(ensemble, views), where it is set,
    changes views (B, ch, H, W) when they are drawn, before any model is shown them.
    """

    change: Callable[[Ensemble, Tensor], Tensor] | None = None

    def __init__(self, uploads: Sequence[Upload], settings: Settings, method: str, steps: int) -> None:
        """Build ensemble, student and optimiser.

        method: names the block of settings, read where it has `StudentSettings`. steps: of all rounds.
        """
        self.ensemble = build_ensemble(uploads, settings)
        self.anchor = ridge_classifier(uploads, settings) if settings.ensemble.anchor else None
        self.anchor_weight = settings.statistics.weight
        self.vit = student_start(uploads, settings)
        own = getattr(settings, method, None)
        own = own if isinstance(own, StudentSettings) else StudentSettings()
        ours = {"lr": own.student_lr, "temperature": own.kd_temperature, "ce_weight": own.ce_weight}
        self.settings = settings.distill.model_copy(update=ours)
        self.calibrate = own.calibrate
        self.optimizer, self.schedule = student_optimizer(self.vit, self.settings, steps)
        self.rng = make_rng(settings.seed, method, "distill")
        self.parts: list[SyntheticSet] = []
        self.views: list[Batch] = []

    @property
    def frozen(self) -> VisionTransformer:
        """The student as a fixed opponent: evaluation mode, no gradients for its weights."""
        return self.vit.eval().requires_grad_(False)

    def logits(self, images: Tensor) -> Tensor:
        """Compute the frozen student's logits (B, C) of images (B, ch, H, W), at the ensemble's precision."""
        return self.ensemble.opponent_logits(self.frozen, *kept_patches(self.vit, images))

    def by_ensemble(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Combine clients' logits (K, B, C) to the ensemble's log-probabilities (B, C): the usual teacher."""
        return self.ensemble.combine(logits)

    @property
    def images(self) -> SyntheticSet:
        """All images of the pool, in the order in which they were added."""
        return SyntheticSet.concat(self.parts)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Put images (n, ch, H, W) made for labels (n,) into the pool; the clients label their views."""
        part = whole_images(self.vit, images, labels)
        self.parts.append(part)
        if self.settings.views:
            draw = partial(self._view, part)
            self.views.append(self._draw(draw, len(part), self.settings.views))

    def pool(self) -> Batch:
        """Return all stored views (V, ch, H, W), labels (V,), clients' logits (V, K, C), and β·r (V, C).

        The scores β·r are there with `ensemble.anchor`. With distill.views=0 nothing is stored, and one new
        view of each image is drawn.
        """
        if not self.settings.views:
            return self._draw(partial(self._view, self.images), len(self.images), 1)
        return tuple(map(torch.cat, zip(*self.views, strict=True)))

    def unchanged_views(self) -> Batch:
        """Draw a view of each image of the pool without `change`, with the columns of `pool`."""
        draw = partial(self._view, self.images, changed=False)
        return self._draw(draw, len(self.images), 1)

    def learn(self, steps: int, teacher: Teacher, progress: Callable[[int], object] | None = None) -> None:
        """Distil for some steps on random batches of the whole pool, labelled by `teacher`.

        progress is called with 1 after each step. Raises BadInput when the student diverged.
        """
        if self.settings.views:
            pool = self.pool()
            draw, count = rows_of(pool), len(pool[0])
        else:
            draw, count = partial(self._view, self.images), len(self.images)
        offset = self._offset(teacher) if self.calibrate else None

        def batches() -> Iterator[Batch]:
            for pick in islice(epochs(count, self.settings.batch_size, self.rng), steps):
                images, labels, *predicted = draw(pick)
                target = self._target(teacher, labels, *predicted)
                yield images, target if offset is None else (target + offset).log_softmax(-1), labels, None

        train_student(self.vit, batches(), self.optimizer, self.schedule, self.settings, NO_TOKENS, progress)

    def _offset(self, teacher: Teacher) -> Tensor:
        """Fit class offsets (C,) of the teacher to the labels of the pool; no pixels are kept for it."""
        if self.settings.views:
            columns = map(torch.cat, list(zip(*self.views, strict=True))[1:])
        else:
            columns = self._draw(lambda pick: self._view(self.images, pick)[1:], len(self.images), 1)
        labels, *predicted = columns
        return fit_offset(self._target(teacher, labels, *predicted), labels, self.calibrate)

    def _target(
        self, teacher: Teacher, labels: Tensor, logits: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """Return what the student learns, log-probabilities (B, C): the teacher's, with β·r if given."""
        target = teacher(logits.transpose(0, 1), labels)  # (B, C)
        return target if scores is None else (target + scores).log_softmax(-1)

    def _draw(self, fresh: Callable[[Tensor], Batch], count: int, views: int) -> Batch:
        return draw_views(fresh, count, views, self.rng, images_at_once(self.vit))

    def _view(self, images: SyntheticSet, pick: Tensor, changed: bool = True) -> Batch:
        """Draw a view of each image in pick (B,), with the columns of `pool`."""
        views = view(self.vit, images, pick, self.settings, self.rng)[0]
        if changed and self.change:
            views = self.change(self.ensemble, views)
        with torch.no_grad():
            columns = (views, images.labels[pick], self.ensemble.logits(views).transpose(0, 1))
            return columns if self.anchor is None else (*columns, self.anchor_weight * self.anchor(views))


def whole_images(vit: VisionTransformer, images: Tensor, labels: Tensor) -> SyntheticSet:
    """Return generated images as a synthetic set in which every patch counts."""
    count = vit.patch_embed.num_patches
    mask = torch.ones(len(images), count, dtype=torch.bool, device=images.device)
    return SyntheticSet(images, labels, mask, torch.zeros(len(images), device=images.device))


def portions(total: int, parts: int) -> list[int]:
    """Split total into `parts` whole numbers that differ by at most one."""
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def steps_of_rounds(steps: int, counts: Sequence[int]) -> list[int]:
    """Split the student's steps over rounds that add counts[r] images each to the pool.

    A round's share is in proportion to the images in its pool, so that every round passes over its pool
    equally often, as in the public code of DENSE and Co-Boosting (once there). The last round, which has all
    images, gets as much again for a last pass over all.
    """
    sizes = list(accumulate(counts))
    done = list(accumulate([*sizes[:-1], 2 * sizes[-1]], initial=0))
    return [steps * end // done[-1] - steps * start // done[-1] for start, end in pairwise(done)]


Images = Sequence[tuple[Tensor, Tensor]]  # batches of images (n, ch, H, W) with labels (n,)


@dataclass(frozen=True)
class Generation:
    """A method's way to make images and, optionally, its own teacher.

    make(r): the images of round r. teacher: the ensemble by default. before_learning(r): called when the
    images of round r are in the pool.
    """

    make: Callable[[int], Images]
    teacher: Teacher | None = None
    before_learning: Callable[[int], object] | None = None


def alternate(
    student: Student,
    generation: Generation,
    steps: int,
    counts: Sequence[int],
    *,
    stage: str,
    progress: Callable[[int], object],
) -> Outcome:
    """Make images, then distil on all of them so far, round after round; return the student's outcome.

    steps: of the student in all, shared among the rounds by `steps_of_rounds`. counts: the images that each
    round makes. stage: the name under which the seconds of making images are kept. progress is called with 1
    after each student step.
    """
    teacher = generation.teacher or student.by_ensemble
    seconds: dict[str, float] = {}
    for index, share in enumerate(steps_of_rounds(steps, counts)):
        with timed(seconds, stage):
            made = generation.make(index)
        with timed(seconds, "distillation"):
            for images, labels in made:
                student.add(images, labels)
            if generation.before_learning:
                generation.before_learning(index)
            student.learn(share, teacher, progress)
    return Outcome([student.vit], seconds, student.images, steps)


def stored(
    method: str, uploads: Sequence[Upload], settings: Settings, store: Store, make: Callable[[], Outcome]
) -> Outcome:
    """Take a method's student from the store, with its images and account; else make and keep them."""
    blocks = [settings.ensemble.model_dump(exclude={"anchor"})]
    blocks += [getattr(settings, b).model_dump() for b in ("inversion", method)]
    blocks.append(settings.distill.model_dump(exclude=FEDMITR_ALONE))
    shared = [weights_digest(settings.model), settings.budget, settings.seed]
    if settings.ensemble.anchor:
        shared.append(settings.statistics.model_dump())
    key = fingerprint(method, [u.digest for u in uploads], blocks, shared)

    def read(folder: Path) -> Outcome:
        vit = student_start(uploads, settings)
        vit.load_state_dict(read_tensors(folder / WEIGHTS))
        account = json.loads((folder / ACCOUNT).read_text())
        return Outcome([vit.eval()], synthetic=load_synthetic(folder), **account)

    def write(outcome: Outcome, folder: Path) -> None:
        write_tensors(outcome.models[0].state_dict(), folder / WEIGHTS)
        save_synthetic(outcome.synthetic, folder)
        seconds = {stage: round(value, 3) for stage, value in outcome.seconds.items()}
        write_json(folder / ACCOUNT, {"seconds": seconds, "student_steps": outcome.student_steps})

    return store.get("methods", key, read, make, write)
