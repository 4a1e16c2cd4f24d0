"""FedFTG (Zhang et al., CVPR 2022): the averaged model is fine-tuned on hard samples of a generator.

With z_k the logits of client k and p_k their softmax, z and q the student's, and client k's weight for
class y α_k^y = c_k[y] / Σ_j c_j[y]:

    generator, for each client k in turn, on noise ε and labels y ~ Σ_k c_k, images x = G(ε, y):
        min  −L_md + λ_cls·L_cls + λ_dis·L_dis / K
        L_md  = mean α_k^y·mean_c |z_c(x) − z_kc(x)|           the student's distance from that client
        L_cls = mean α_k^y·mean CE(p_k(x), y)                  whether the clients predict y
        L_dis = exp(−mean_ij ‖ε_i − ε_j‖²·‖x_i − x_j‖₁)        whether other noise gives other images
    student:  min  KL(Σ_k α_k^y p_k(x) ‖ q(x))

L_md has no gradient through the client: images move to where the student's logits leave the client's. The
student starts at the average, labels are drawn by the clients' histograms, and the teacher of an image made
for y weights the clients by α^y; so every upload carries its class histogram. Published, and taken from the
authors' code: λ_cls = λ_dis = 1; ten alternations of one pass over the clients, one step of the generator
each (Adam, 0.01), and 5 student steps on its images in evaluation mode, on batches of 50 and at T = 1, in
each of 1,000 exchanges through which the generator lives on. The paper writes KL for the code's L1 in L_md,
and in L_cls gives each image its own α^y, where the code multiplies two means over the batch.

What changes here: one exchange, so the alternations are as many as `rounds` says, and the passes over the
clients in each as many as `generator_steps` says. After each round the generator adds its share of the
synthetic images to the pool, from which the student learns, so that the budget is that of every other method;
the student's start, views and optimiser are those of the `distill` block (at a rate of its own).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.machine import autocast, device
from ..core.store import Store
from ..server.ensemble import Ensemble, class_weights, histograms
from ..settings import Settings
from ..settings.schema import Count, NotNegative, Positive, setting
from ..upload import Upload
from ._generator import (
    Generator,
    GeneratorSettings,
    distil_generated,
    generator_search,
    generator_work,
    noise,
)
from ._method import Method, Outcome, Work
from ._student import Generation, Images, Student


class FedftgSettings(GeneratorSettings):
    """FedFTG: a class-conditional generator of hard samples for the averaged model."""

    rounds: Count = setting(20, "rounds of generation, then distillation", "FedFTG: 10 an exchange")
    generator_steps: Count = setting(
        3, "passes over the clients in a round, each client one optimiser step of the generator", "FedFTG: 1"
    )
    batch_size: Count = setting(50, "images of a generator step", "FedFTG")
    lr: Positive = setting(1e-2, "Adam's learning rate of the generator", "FedFTG")
    classification: NotNegative = setting(
        10.0, "weight λ_cls of the class-level cross-entropy", "choice; FedFTG: 1"
    )
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
    generator = Generator(student.vit, own, rng, form="dafl", conditional=True)
    optimizer = torch.optim.Adam(generator.parameters(), own.lr)

    def make(index: int) -> Images:
        generator.train()
        for _ in range(own.generator_steps):
            z, labels = noise(own.batch_size, own, rng), sample_labels(totals, own.batch_size, rng)
            for k, weights in enumerate(known[:, labels]):  # α_k^y (B,)
                images = generator(z, labels)  # (B, ch, H, W)
                logits = client_logits(student.ensemble, k, images), student.logits(images)  # (B, C) each
                loss = generator_loss(*logits, labels, weights, own)
                loss = loss + own.diversity * likeness(z, images) / len(known)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            progress(1)
        labels = sample_labels(totals, counts[index], rng)
        with torch.no_grad():
            return [(generator.eval()(noise(counts[index], own, rng), labels), labels)]

    return Generation(make, teacher=partial(class_ensemble, known=known))


def sample_labels(totals: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Draw labels (count,) in proportion to the images of each class that all clients hold, totals (C,)."""
    return torch.multinomial(totals, count, replacement=True, generator=rng).to(device())


def class_ensemble(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Compute log Σ_k α_k^y p_k, (B, C), from logits (K, B, C), labels y (B,) and known = α (K, C)."""
    return torch.logsumexp(logits.log_softmax(dim=-1) + known[:, labels, None].log(), dim=0)


def client_logits(ensemble: Ensemble, client: int, images: Tensor) -> Tensor:
    """Compute one client's logits (B, C) of images (B, ch, H, W), at the ensemble's precision."""
    with autocast(ensemble.precision):
        return ensemble.member_logits(client, *ensemble.cut(images)).to(images)


def generator_loss(
    logits: Tensor, student_logits: Tensor, labels: Tensor, weights: Tensor, settings: FedftgSettings
) -> Tensor:
    """Compute λ_cls·L_cls − L_md of one client.

    logits of the client and student_logits (B, C); labels y and the client's weights α^y (B,).
    """
    apart = (student_logits - logits.detach()).abs().mean(dim=1)  # (B,)
    wrong = F.cross_entropy(logits, labels)
    return settings.classification * weights.mean() * wrong - (weights * apart).mean()


def likeness(z: Tensor, images: Tensor) -> Tensor:
    """Compute exp(−mean_ij ‖z_i − z_j‖²·‖x_i − x_j‖₁): 1 for equal images, less the more they differ."""
    noise_distances = torch.cdist(z, z).square() / z.shape[1]  # (B, B)
    flat = images.flatten(1)
    image_distances = torch.cdist(flat, flat, p=1) / flat.shape[1]  # (B, B)
    return (-noise_distances * image_distances).mean().exp()


def _work(settings: Settings) -> Work:
    """Count a step of the generator for each client of each pass."""
    work = generator_work(settings, settings.fedftg)
    steps = work.generator_steps * settings.partition.clients
    return replace(work, generator_steps=steps, one_client=True)


FIXED = ("ensemble.mode", "distill.start")  # it weighs by class, and fine-tunes the average

METHOD = Method(
    name="fedftg",
    run=fedftg,
    label="FedFTG",
    citation="Zhang et al., CVPR 2022",
    settings=FedftgSettings,
    search={
        **{name: v for name, v in generator_search("fedftg").items() if name not in FIXED},
        "fedftg.rounds": (1, 4, 20, 80),
        "fedftg.generator_steps": (1, 3),
        "fedftg.classification": (0.3, 1.0, 3.0, 10.0, 30.0),
        "fedftg.diversity": (0.0, 1.0, 3.0),
    },
    work=_work,
    needs_counts=True,
)
