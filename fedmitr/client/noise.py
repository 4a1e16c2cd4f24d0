"""What a client does to its sums of features before it sends them: the Gaussian mechanism, smallest counts.

The mechanism (Dwork & Roth 2014, appendix A) clips what each image adds to the sums, and adds Gaussian noise
in proportion to the largest change by one image, `upload.privacy.sums_sensitivity`.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..core.errors import BadInput
from ..data.tasks import Split
from ..upload import Noise, Statistics, Upload
from ..upload.privacy import sums_noise


def clipped(features: Tensor, clip: float) -> Tensor:
    """Scale features (B, D) that are longer than `clip` down to that norm; others stay as they are."""
    return features * (clip / features.norm(dim=1, keepdim=True)).clamp(max=1)


def noisy(statistics: Statistics, noise: Noise, rng: torch.Generator) -> Statistics:
    """Add the noise of `sums_noise` to sums of features of norm `noise.clip` at most.

    Counts are rounded after that and may be negative. The Gram matrix stays symmetric and need not be
    positive semi-definite: the server mends the sum over clients (`server.statistics.mended`). rng must be
    the client's secret: who knows it can take the noise away.
    """
    draw, at = partial(torch.randn, generator=rng, dtype=torch.double), sums_noise(noise)
    counts = statistics.counts + at.counts * draw(statistics.counts.shape)
    sums = statistics.sums + at.sums * draw(statistics.sums.shape)
    z = draw(statistics.gram.shape)
    gram = statistics.gram + at.gram * (z + z.T) / 2  # σ on the diagonal, σ/√2 elsewhere
    return Statistics(counts.round().long(), sums, gram)


def without_small_classes(statistics: Statistics, smallest: int) -> Statistics:
    """Set counts and sums of classes with fewer than `smallest` images to zero, after noise was added.

    The Gram matrix is not by class and stays.
    """
    small = statistics.counts < smallest
    counts = statistics.counts.masked_fill(small, 0)
    return Statistics(counts, statistics.sums.masked_fill(small[:, None], 0.0), statistics.gram)


def in_large_classes(labels: Tensor, smallest: int) -> Tensor:
    """Return a mask (n,) of the labels (n,) whose class stands among them at least `smallest` times."""
    return labels.bincount()[labels] >= smallest


def large_classes(shard: Split, smallest: int, who: str) -> Split:
    """Return a shard's images of classes that have at least `smallest` of them there.

    Raises BadInput, naming the client, where none is left.
    """
    rows = in_large_classes(shard.labels, smallest).nonzero()[:, 0]
    if not len(rows):
        raise BadInput(f"statistics.smallest={smallest}: {who} has no class of so many images")
    return shard.subset(rows)


def told_counts(upload: Upload, counted: bool, smallest: int) -> Upload:
    """Return an upload with what it tells of its class counts.

    counted: whether its method reads the class histogram, which is dropped else. Beside noisy sums it is that
    of their noisy counts, negative ones as 0, which costs no privacy. Else classes with fewer than `smallest`
    images are left out, and its size is that of the others.
    """
    sums, noise = upload.statistics, upload.features.noise if upload.features else None
    counts = upload.class_counts if counted else None
    if noise:
        told = counted and upload.weights is not None
        return replace(upload, class_counts=tuple(sums.counts.clamp(min=0).tolist()) if told else None)
    if counts and smallest:
        counts = tuple(c if c >= smallest else 0 for c in counts)
    if smallest and (counts or sums):
        size = sum(counts) if counts else sums.size
        if not size:
            raise BadInput(
                f"statistics.smallest={smallest}: client {upload.client} has no class of so many images"
            )
        return replace(upload, class_counts=counts, size=size)
    return upload if counts == upload.class_counts else upload.without_counts()
