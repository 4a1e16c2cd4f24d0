"""F-ADI: Adaptive DeepInversion (Yin et al., CVPR 2020) with the ensemble as its teacher.

Noise is optimised into images of given classes, all patches to the end, on which the student so far
still differs from the ensemble A:

    min_x   CE(A(x), y) + a_tv·TV(x) + a_l2·‖x‖² + a_c·(1 − JS(A(x), student(x)))

then the student learns A, at temperature 3, on all images made so far, their labels unused; the two
alternate. Published for CNNs: Adam on the pixels, 2,000 iterations and more, random jitter and flips, a_c =
0.2, and a term that matches the running statistics of batch normalisation. In the authors' code JS is of
probabilities clamped to [0.01, 0.99], each KL from the mean to them, in nats; here it is the true one, in
bits.

What a ViT changes: it has no batch normalisation, so that term is absent. Optimiser, views and priors
are those of the `inversion` block, the same as FedMITR's, without its stops; so the difference between
the two is what sparsity, token labels and the competition are worth. As every patch is carried to the
end, fewer iterations cost as much as FedMITR's. With `inversion.teacher=owners`, A in both terms is one
client for each image, drawn by its share of the image's class, as in FedMITR+.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice

from ..core.machine import device
from ..core.progress import progress
from ..core.rng import derive_seed
from ..core.store import Store
from ..server.ensemble import held_classes
from ..server.inversion import invert
from ..server.synthetic import label_batches
from ..settings import Settings
from ..settings.schema import Count, InversionSettings, NotNegative, Positive, setting
from ..upload import Upload
from ._method import Method, Outcome, Range, Work
from ._student import (
    KD_TEMPERATURE,
    Generation,
    Images,
    Student,
    StudentSettings,
    alternate,
    portions,
    stored,
    student_search,
)


class FadiSettings(StudentSettings):
    """F-ADI: dense DeepInversion against a growing student, then distillation."""

    kd_temperature: Positive = setting(3.0, KD_TEMPERATURE, "DeepInversion's authors, issue 9 of their code")
    rounds: Count = setting(2, "times that inversion and distillation alternate", "choice")
    iterations: Count = setting(
        62, "steps of the optimiser; no fewer patch-steps than FedMITR's sparse ones", "ADI: 2000"
    )
    competition: NotNegative = setting(
        0.2, "weight of 1 − JS(teacher, student) in the inversion loss", "ADI, with a JS of its own"
    )


def fadi(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn uploads into one global model, by rounds of dense inversion and distillation."""
    return stored("fadi", uploads, settings, store, partial(_rounds, uploads, settings))


def dense_inversion(settings: Settings) -> InversionSettings:
    """Return the run's inversion settings without stops, for F-ADI's own number of iterations."""
    own = {"stop_at": (), "stop_ratio": (), "iterations": settings.fadi.iterations}
    return settings.inversion.model_copy(update=own)


def _rounds(uploads: Sequence[Upload], settings: Settings) -> Outcome:
    own, dense, steps = settings.fadi, dense_inversion(settings), settings.distill.steps
    student = Student(uploads, settings, "fadi", steps)
    batches = label_batches(dense, held_classes(uploads), settings.seed)
    rounds, numbered = min(own.rounds, len(batches)), iter(enumerate(batches))
    sizes = sorted(portions(len(batches), rounds), reverse=True)
    shares = [list(islice(numbered, size)) for size in sizes]  # consecutive batches, one list a round
    with progress(len(batches) * dense.iterations + steps, "F-ADI", "step") as bar:

        def make(index: int) -> Images:
            made = [
                invert(
                    student.ensemble,
                    labels.to(device()),
                    dense,
                    derive_seed(settings.seed, "fadi", batch),
                    opponent=student.frozen,
                    competition=own.competition,
                    recorded=0,
                    progress=bar.update,
                )
                for batch, labels in shares[index]
            ]
            return [(part.pixels, part.labels) for part in made]

        counts = [sum(len(labels) for _, labels in share) for share in shares]
        return alternate(student, Generation(make), steps, counts, stage="inversion", progress=bar.update)


METHOD = Method(
    name="fadi",
    run=fadi,
    label="F-ADI",
    citation="Yin et al., CVPR 2020, with the ensemble as the teacher",
    settings=FadiSettings,
    search={
        **student_search("fadi"),
        "inversion.tv": Range(1e-4, 1e-2, log=True),
        "inversion.lr": Range(0.1, 1.0, log=True),
        "inversion.schedule": ("constant", "cosine"),
        "inversion.clip": (False, True),
        "fadi.rounds": (1, 2, 4),
        "fadi.iterations": (31, 62),
        "fadi.competition": (0.0, 0.2, 1.0, 3.0),
    },
    work=lambda settings: Work(
        images=settings.inversion.images,
        inversion=dense_inversion(settings),
        student_inverted=settings.fadi.competition > 0,
        student_steps=settings.distill.steps,
        calibrate=settings.fadi.calibrate,
    ),
)
