"""FedFTG (Zhang et al., CVPR 2022): the averaged model is fine-tuned on hard samples of a generator.

With p_k the softmax of client k, q the student's, and client k's weight for class y
α_k^y = c_k[y] / Σ_j c_j[y]:

    L_md(x, y)  = Σ_k α_k^y·KL(p_k(x) ‖ q(x))                 how far the student is from the clients
    L_cls(x, y) = Σ_k α_k^y·CE(p_k(x), y)                     whether clients that hold y predict y
    L_dis       = exp(−mean_ij ‖z_i − z_j‖·‖x_i − x_j‖)       whether other z give other images
    min over student, max over generator   L_md − λ_cls·L_cls − λ_dis·L_dis,   labels y ~ Σ_k c_k

Its four parts are here: the student starts at the average and is trained against the generator (hard
samples mined by the max), labels are drawn by the clients' histograms, and the teacher of an image made
for y weights the clients by α^y. So every upload carries its class histogram. Published: λ_cls = λ_dis
= 1, ten alternations of 1 generator and 5 student steps on batches of 50, in each of 1,000 exchanges.

What changes here: one exchange, and no batch normalisation in a ViT (nor does FedFTG need any). The
generator adds its share of the synthetic images to the pool after each round, so that the budget is
that of every other method; the student's start, views and optimiser are those of the `distill` block
(at a rate of its own), its loss is KL to Σ_k α_k^y p_k. Distances are means over entries, the noise's
squared, as in the official code.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.machine import device
from ..core.store import Store
from ..server.ensemble import class_weights, histograms
from ..settings import Settings
from ..settings.schema import Count, NotNegative, Positive, setting
from ..upload import Upload
from ._generator import (
    Generator,
    GeneratorSettings,
    distil_generated,
    generator_search,
    generator_work,
    make_adam,
    noise,
    take_step,
)
from ._method import Method, Outcome
from ._student import Generation, Images, Student


class FedftgSettings(GeneratorSettings):
    """FedFTG: a class-conditional generator of hard samples for the averaged model."""

    batch_size: Count = setting(64, "images of a generator step", "FedFTG: 50")
    lr: Positive = setting(1e-3, "Adam's learning rate of the generator")
    classification: NotNegative = setting(1.0, "weight λ_cls of the class-level cross-entropy", "FedFTG")
    diversity: NotNegative = setting(1.0, "weight λ_dis of the diversity loss", "FedFTG")


def fedftg(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Turn uploads, with their class histograms, into one global model; BadInput where one lacks its own."""
    histograms(uploads)  # before any work
    return distil_generated("fedftg", uploads, settings, store, partial(_begin, uploads, settings.fedftg))


def _begin(
    uploads: Sequence[Upload],
    own: FedftgSettings,
    student: Student,
    counts: Sequence[int],
    rng: torch.Generator,
    progress: Callable[[int], object],
) -> Generation:
    """Prepare a run; counts holds the number of images of each round."""
    known, totals = class_weights(uploads).to(device()), histograms(uploads).sum(0)  # (K, C), (C,)
    generator = Generator(student.vit, own, rng, conditional=True)
    optimizer = make_adam(generator.parameters(), own)

    def make(index: int) -> Images:
        for _ in range(own.generator_steps):
            z, labels = noise(own.batch_size, own, rng), sample_labels(totals, own.batch_size, rng)
            images = generator(z, labels)  # (B, ch, H, W)
            logits = student.ensemble.logits(images), student.logits(images)  # (K, B, C), (B, C)
            loss = generator_loss(*logits, labels, known, own) + own.diversity * likeness(z, images)
            take_step(optimizer, loss, generator)
            progress(1)
        labels = sample_labels(totals, counts[index], rng)
        with torch.no_grad():
            return [(generator(noise(counts[index], own, rng), labels), labels)]

    return Generation(make, teacher=partial(class_ensemble, known=known))


def sample_labels(totals: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Draw labels (count,) in proportion to the images of each class that all clients hold, totals (C,)."""
    return torch.multinomial(totals, count, replacement=True, generator=rng).to(device())


def class_ensemble(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Compute log Σ_k α_k^y p_k, (B, C), from logits (K, B, C), labels y (B,) and known = α (K, C)."""
    return torch.logsumexp(logits.log_softmax(dim=-1) + known[:, labels, None].log(), dim=0)


def generator_loss(
    logits: Tensor, student_logits: Tensor, labels: Tensor, known: Tensor, settings: FedftgSettings
) -> Tensor:
    """Compute λ_cls·L_cls − L_md, means over the batch; logits (K, B, C), student_logits (B, C)."""
    client_log_probs, weights = logits.log_softmax(dim=-1), known[:, labels]  # (K, B, C), α^y (K, B)
    # KL(p_k ‖ q) (K, B)
    apart = (client_log_probs.exp() * (client_log_probs - student_logits.log_softmax(dim=-1))).sum(dim=-1)
    wrong = F.nll_loss(client_log_probs.flatten(0, 1), labels.repeat(len(logits)), reduction="none")  # (K·B,)
    classification = (weights * wrong.view_as(weights)).sum(0).mean()
    return settings.classification * classification - (weights * apart).sum(0).mean()


def likeness(z: Tensor, images: Tensor) -> Tensor:
    """Compute exp(−mean_ij ‖z_i − z_j‖²·‖x_i − x_j‖₁): 1 for equal images, less the more they differ."""
    noise_distances = torch.cdist(z, z).square() / z.shape[1]  # (B, B)
    flat = images.flatten(1)
    image_distances = torch.cdist(flat, flat, p=1) / flat.shape[1]  # (B, B)
    return (-noise_distances * image_distances).mean().exp()


METHOD = Method(
    name="fedftg",
    run=fedftg,
    label="FedFTG",
    citation="Zhang et al., CVPR 2022",
    settings=FedftgSettings,
    search={
        **generator_search("fedftg"),
        "fedftg.classification": (0.3, 1.0, 3.0),
        "fedftg.diversity": (0.0, 1.0, 3.0),
    },
    work=lambda settings: generator_work(settings, settings.fedftg),
    needs_counts=True,
)
