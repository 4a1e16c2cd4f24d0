"""The noise that an upload declares, and the (ε, δ) of differential privacy that follows from it.

Neighbours are two shards of a client that differ in one record: the contribution of one image, with its
label, to every gradient and every sum is there in one and zero in the other. n_k is the same in both: it is
public. Sensitivities and accounting are those of adding or removing a record (Ponomareva et al. 2023, "How to
DP-fy ML", call this "zero-out"). The guarantee of one upload is

    P(M(shard) ∈ S) ≤ e^ε P(M(shard') ∈ S) + δ   for every set S of messages.

ε is computed by Opacus' accountant of Rényi differential privacy (Mironov 2017; Mironov et al. 2019 for
Poisson-sampled steps), which composes releases of any kind: their Rényi divergences add up.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import BadInput

TOLERANCE = 1e-3  # of ε, relative: how far below the wanted one a calibrated ε may lie
# Weights of counts, Σ f and Σ f fᵀ in the noise of sums: chosen on validation images of seeds 0 to 2.
COUNTS, SUMS, GRAM = 0.5, 1.0, 0.3


class Noise(BaseModel):
    """The declared noise of one release: Gaussian, on sums of vectors that are clipped to a norm.

    clip: the norm C; multiplier: the noise's deviation over the sensitivity; steps: how often such a sum is
    released; sample_rate: the probability with which each record enters each of them, independently.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    clip: float = Field(gt=0)
    multiplier: float = Field(gt=0)
    sample_rate: float = Field(default=1.0, gt=0, le=1)
    steps: int = Field(default=1, strict=True, ge=1, le=2**31)


class SumsNoise(NamedTuple):
    """Deviations of the noise on the sums of one client: on each count, each entry of Σ f, and Σ f fᵀ.

    gram: of the diagonal of Σ f fᵀ; other entries have gram / √2, since each stands there twice.
    """

    counts: float
    sums: float
    gram: float


def sums_sensitivity() -> float:
    """Return the largest change of the weighted sums (a n, b Σ f / C, c Σ f fᵀ / C²) by one record.

    A record of class y adds 1 to n_y, f to row y of Σ f, and F to Σ f fᵀ. Without moved copies F = f fᵀ; with
    them f and F are means over the image and its copies of g and g gᵀ. All copies are of one image, so they
    are one record. Every g is clipped to |g| ≤ C first. Then |f| ≤ mean |g| ≤ C and
    ‖F‖_F ≤ mean ‖g gᵀ‖_F = mean |g|² ≤ C², so that the squared norm of what is added is

        a² + b² |f|² / C² + c² ‖F‖_F² / C⁴ ≤ a² + b² + c²,

    with equality for an image whose copies all have the same features, of norm C or more. The three parts are
    different coordinates of one vector, so this is exact. a, b, c are `COUNTS`, `SUMS`, `GRAM`.

    Σ f fᵀ is symmetric, and its upper triangle is sent. The Frobenius norm is that of the vector of the
    diagonal and √2 times each entry above it. Noise of deviation σ on this vector is σ on the diagonal and
    σ/√2 above: the noise (Z + Zᵀ)/2 of a matrix Z of independent entries with deviation σ.
    """
    return math.hypot(COUNTS, SUMS, GRAM)


def sums_noise(noise: Noise) -> SumsNoise:
    """Return the deviations of a client's noise: multiplier · sensitivity, over the weight of each part."""
    level = noise.multiplier * sums_sensitivity()
    return SumsNoise(level / COUNTS, level * noise.clip / SUMS, level * noise.clip**2 / GRAM)


def epsilon(noises: Sequence[Noise], delta: float) -> float:
    """Compute the ε at δ of releases from the same records together, by Opacus' RDP accountant.

    0 where nothing is released. Raises BadInput where Opacus is not installed.
    """
    if not noises:
        return 0.0
    accountants = _accountants()
    accountant = accountants.RDPAccountant()
    accountant.history = [(n.multiplier, n.sample_rate, n.steps) for n in noises]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the")  # the bound holds; it could be tighter
        return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=1024)  # every client of every run asks
def noise_multiplier(
    name: str, epsilon: float, delta: float, sample_rate: float = 1.0, steps: int = 1
) -> float:
    """Find the least noise multiplier whose ε at δ is at most `epsilon`, by Opacus, to 0.1 % of ε.

    name: the setting that ε comes from. Raises BadInput, naming it, where Opacus is not installed, and for an
    ε that no noise of Opacus' range reaches.
    """
    accountants = _accountants(f"{name}={epsilon!r}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Optimal order is the")
            return accountants.utils.get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant="rdp",
                epsilon_tolerance=TOLERANCE * epsilon,
            )
    except ValueError:
        raise BadInput(f"{name}={epsilon!r} is too small at δ={delta!r}: no noise reaches it") from None


def _accountants(name: str = "differential privacy"):
    """Import Opacus' accountants, which are an extra; BadInput, one line, where they are not installed."""
    try:
        import opacus.accountants
        import opacus.accountants.utils
    except ImportError:
        raise BadInput(
            f"{name} needs Opacus, which is not installed: pip install 'fedmitr[privacy]'"
        ) from None
    return opacus.accountants
