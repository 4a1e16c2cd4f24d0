"""FedFTG (Zhang et al., CVPR 2022): the averaged model is fine-tuned on hard samples of a generator.

With p_k the softmax of client k, q the student's, and client k's weight for class y
α_k^y = c_k[y] / Σ_j c_j[y]:

    L_md(x, y)  = Σ_k α_k^y·KL(p_k(x) ‖ q(x))                 how far the student is from the clients
    L_cls(x, y) = Σ_k α_k^y·CE(p_k(x), y)                     is it a y for those who know y
    L_dis       = exp(−mean_ij ‖z_i − z_j‖·‖x_i − x_j‖)       do other z give other images
    min over student, max over generator   L_md − λ_cls·L_cls − λ_dis·L_dis,   labels y ~ Σ_k c_k

Its four parts are here: the student starts at the average and is trained against the generator (hard
samples mined by the max), labels are drawn by the clients' histograms, and the teacher of an image made
for y weighs the clients by α^y. So every upload carries its class histogram. Published: λ_cls = λ_dis
= 1, ten alternations of 1 generator and 5 student steps on batches of 50, in each of 1,000 exchanges.

What changes here: one exchange, and no batch normalisation in a ViT (nor does FedFTG need any). The
generator adds its share of the synthetic images to the pool after each round, so that the budget is
that of every other method; the student's start, views and optimiser are those of the `distill` block
(at a rate of its own), its loss is KL to Σ_k α_k^y p_k. Distances are means over entries, the noise's
squared, as in the official code.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import FedftgSettings
from ..ensemble import class_weights, histograms
from ..runtime import device, generator, progress, timed
from ..settings import Settings
from ..store import Store
from ..upload import Upload
from .generator import Generator, make_adam, noise, take_step
from .outcome import Outcome
from .rounds import Student, budget, portions, stored


def fedftg(uploads: Sequence[Upload], settings: Settings, store: Store) -> Outcome:
    """Uploads, with their class histograms, to one global model."""
    return stored("fedftg", uploads, settings, store, partial(_rounds, uploads, settings))


def _rounds(uploads: Sequence[Upload], settings: Settings) -> Outcome:
    own, seconds = settings.fedftg, {}
    images, steps = budget(settings, own)
    known, totals = class_weights(uploads).to(device()), histograms(uploads).sum(0)
    student = Student(uploads, settings, "fedftg", steps)
    rng = generator(settings.seed, "fedftg")
    maker = Generator(student.vit, own, rng, conditional=True)
    optimizer = make_adam(maker.parameters(), own)
    rounds = min(own.rounds, images)
    with progress(rounds * own.generator_steps + steps, "FedFTG", "step") as bar:
        for count, share in zip(portions(images, rounds), portions(steps, rounds), strict=True):
            with timed(seconds, "generation"):
                for _ in range(own.generator_steps):
                    z, labels = noise(own.batch_size, own, rng), sample_labels(totals, own.batch_size, rng)
                    made = maker(z, labels)
                    of_clients, of_student = student.ensemble.logits(made), student.logits(made)
                    loss = generator_loss(of_clients, of_student, labels, known, own)
                    loss = loss + own.diversity * likeness(z, made)
                    take_step(optimizer, loss, maker)
                    bar.update(1)
                labels = sample_labels(totals, count, rng)
                with torch.no_grad():
                    made = maker(noise(count, own, rng), labels)
            with timed(seconds, "distillation"):
                student.add(made, labels)
                student.learn(share, partial(class_ensemble, known=known), bar.update)
    return Outcome([student.vit], seconds, student.images, steps)


def sample_labels(totals: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Labels (count,) drawn in proportion to the classes that all clients hold together, totals (C,)."""
    return torch.multinomial(totals, count, replacement=True, generator=rng).to(device())


def class_ensemble(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Log-probabilities (B, C) of Σ_k α_k^y p_k; logits (K, B, C), labels y (B,), known α (K, C)."""
    return torch.logsumexp(logits.log_softmax(dim=-1) + known[:, labels, None].log(), dim=0)


def generator_loss(
    logits: Tensor, of_student: Tensor, labels: Tensor, known: Tensor, settings: FedftgSettings
) -> Tensor:
    """λ_cls·L_cls − L_md, means over the batch; logits (K, B, C), of_student (B, C)."""
    of_clients, weights = logits.log_softmax(dim=-1), known[:, labels]
    apart = (of_clients.exp() * (of_clients - of_student.log_softmax(dim=-1))).sum(dim=-1)
    right = F.nll_loss(of_clients.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
    classification = (weights * right.view_as(weights)).sum(0).mean()
    return settings.classification * classification - (weights * apart).sum(0).mean()


def likeness(z: Tensor, images: Tensor) -> Tensor:
    """exp(−mean_ij ‖z_i − z_j‖²·‖x_i − x_j‖₁): 1 where all images are one, less the more they differ."""
    of_noise = torch.cdist(z, z).square() / z.shape[1]
    flat = images.flatten(1)
    of_images = torch.cdist(flat, flat, p=1) / flat.shape[1]
    return (-of_noise * of_images).mean().exp()
