"""F-ADI: Adaptive DeepInversion (Yin et al., CVPR 2020) with the ensemble as its teacher.

Noise is optimised into images of given classes, all patches to the end, on which the student so far
still differs from the ensemble:

    min_x   CE(A(x), y) + a_tv·TV(x) + a_l2·‖x‖² + a_c·(1 − JS(A(x), student(x)))

then the student learns A on all images made so far; the two alternate. Published for CNNs: Adam on
the pixels, 2,000 iterations and more, random jitter and flips, and a term that matches the running
statistics of batch normalisation.

What a ViT changes: it has no batch normalisation, so that term is absent. Optimiser, views and priors
are those of the `inversion` block, the same as FedMITR's, without its stops; so the difference between
the two is what sparsity, token labels and the competition are worth. As every patch is carried to the
end, fewer iterations cost as much as FedMITR's. With `inversion.teacher=owners`, A in both terms is the
one client that the image is asked of, as in FedMITR.
"""

from collections.abc import Sequence
from functools import partial

from ..ensemble import held_classes
from ..inversion import invert, label_batches
from ..runtime import derive_seed, device, progress, timed
from ..settings import Settings
from ..store import Store
from ..upload import Upload
from .outcome import Outcome
from .rounds import Student, portions, stored


def fadi(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Uploads to one global model, by rounds of dense inversion and distillation."""
    return stored("fadi", uploads, settings, store, partial(_rounds, uploads, settings))


def _rounds(uploads: Sequence[Upload], settings: Settings) -> Outcome:
    own, seconds, steps = settings.fadi, {}, settings.distill.steps
    dense = settings.inversion.model_copy(
        update={"stop_at": (), "stop_ratio": (), "iterations": own.iterations}
    )
    student = Student(uploads, settings, "fadi", steps)
    batches = list(enumerate(label_batches(dense, held_classes(uploads), settings.seed)))
    rounds = min(own.rounds, len(batches))
    with progress(len(batches) * dense.iterations + steps, "F-ADI", "step") as bar:
        for share in portions(steps, rounds):
            size = -(-len(batches) // rounds)
            now, batches, rounds = batches[:size], batches[size:], rounds - 1
            for index, labels in now:
                with timed(seconds, "inversion"):
                    made = invert(
                        student.ensemble,
                        labels.to(device()),
                        dense,
                        derive_seed(settings.seed, "fadi", index),
                        rival=student.frozen,
                        competition=own.competition,
                        recorded=0,
                        progress=bar.update,
                    )
                with timed(seconds, "distillation"):
                    student.add(made.pixels, made.labels)
            with timed(seconds, "distillation"):
                student.learn(share, lambda logits, _: student.ensemble.combine(logits), bar.update)
    return Outcome([student.vit], seconds, student.images, steps)
