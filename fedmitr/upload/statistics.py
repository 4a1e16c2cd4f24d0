"""Sums of image features, which a client may send beside its weights or in their place.

Ridge regression, linear discriminant analysis and nearest class means on frozen features need the images
only through these sums. Sums of clients add up to those of all their images. So what is solved from them is
what one machine with all images would find, for any partition and any number of clients (AFL, He et al., CVPR
2025; Fed3R, Fanì et al., ICML 2024). All is float64: the order of adding then tells in the last bits alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..core.errors import BadInput
from .privacy import Noise, sums_noise

TOLERANCE = 1e-8  # of the Gram matrix's trace: how far rounding may push an eigenvalue below zero
LARGEST = 1e100  # of a sum, so that squares of sums of many clients stay finite
UNLIKELY = 8  # deviations of declared noise that no honest client sees


@dataclass(frozen=True)
class Statistics:
    """The sums over some images with features f ∈ R^D and labels y.

    counts (C,), int64: images of each class. sums (C, D): Σ f over images of a class. gram (D, D): Σ f fᵀ.
    """

    counts: Tensor
    sums: Tensor
    gram: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, num_classes: int) -> "Statistics":
        """Sum features (n, D) with labels (n,) in [0, num_classes)."""
        features = features.double()
        one_hot = torch.nn.functional.one_hot(labels, num_classes).double()  # (n, C)
        gram = (features.T @ features).triu_()  # the product's lower half may differ in the last bit
        gram += gram.triu(1).T
        return cls(one_hot.sum(0).long(), one_hot.T @ features, gram)

    def __add__(self, other: "Statistics") -> "Statistics":
        """Add the sums of other images."""
        return Statistics(self.counts + other.counts, self.sums + other.sums, self.gram + other.gram)

    @property
    def size(self) -> int:
        """The number of images n."""
        return int(self.counts.sum())

    @property
    def width(self) -> int:
        """The number of features D."""
        return self.sums.shape[1]

    @property
    def scatter(self) -> Tensor:
        """The scatter within classes (D, D): Σ_y Σ_{i of y} (f_i − μ_y)(f_i − μ_y)ᵀ."""
        counts = self.counts.clamp(min=1)[:, None]
        return self.gram - self.sums.T @ (self.sums / counts)

    def to_arrays(self) -> dict[str, Tensor]:
        """Return the sums as they are sent: of the symmetric Gram matrix the upper triangle, row by row."""
        row, column = torch.triu_indices(self.width, self.width)
        return {"counts": self.counts, "sums": self.sums, "gram": self.gram[row, column]}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor]) -> "Statistics":
        """Read what `to_arrays` wrote; the arrays have the names, types and shapes of `expected_arrays`."""
        width = arrays["sums"].shape[1]
        row, column = torch.triu_indices(width, width)
        gram = torch.zeros(width, width, dtype=torch.double)
        gram[row, column] = gram[column, row] = arrays["gram"]
        return cls(arrays["counts"], arrays["sums"], gram)

    def checked(self, who: str, num_classes: int, width: int, size: int) -> "Statistics":
        """Return the sums themselves; BadInput as `check_sums` and `check_scatter` raise it."""
        self.check_sums(who, num_classes, width, size)
        self.check_scatter(who)
        return self

    def checked_noisy(self, who: str, num_classes: int, width: int, size: int, noise: Noise) -> "Statistics":
        """Return the sums themselves; BadInput, naming the sender, where declared noise cannot explain them.

        Noise makes counts negative and matrices indefinite, so what `checked` asks of exact sums does not
        hold. Asked is, with the deviations of `sums_noise` and features of norm C at most: counts lie in
        [0, n_k], the Gram matrix has a trace of at most n_k C² and no eigenvalue below zero, but for noise.
        The eigenvalues of the noise lie within ±σ√(2D) (Wigner's semicircle).
        """
        self.check_numbers(who, num_classes, width)
        at, told = sums_noise(noise), f"{who}: statistics: "
        most = UNLIKELY * at.counts + 1  # counts are rounded
        if self.counts.max() > size + most or self.counts.min() < -most:
            raise BadInput(
                f"{told}counts={_first(self.counts)} are beyond its size {size} and declared noise"
            )
        trace = float(self.gram.diagonal().sum())
        if trace > size * noise.clip**2 * (1 + 1e-6) + UNLIKELY * at.gram * width**0.5:
            raise BadInput(f"{told}gram is of features longer than {noise.clip:.4g} and of declared noise")
        if torch.linalg.eigvalsh(self.gram)[0] < -at.gram * (2 * (2 * width) ** 0.5 + UNLIKELY):
            raise BadInput(f"{told}gram is farther from positive semi-definite than declared noise explains")
        return self

    def check_sums(self, who: str, num_classes: int, width: int, size: int) -> None:
        """Raise BadInput, naming the sender, unless the sums are of `size` images, classes and features.

        Beyond what `check_numbers` asks, counts are not negative and sum to `size`, and a class without
        images has no sum.
        """
        self.check_numbers(who, num_classes, width)
        counts, told = self.counts, f"{who}: statistics: "
        if counts.min() < 0:
            raise BadInput(f"{told}counts={_first(counts)} hold a negative count: allowed are 0 and more")
        if (total := sum(counts.tolist())) != size:  # Python's integers do not wrap around
            raise BadInput(f"{told}counts={_first(counts)} sum to {total}, its size is {size}")
        if self.sums[counts == 0].any():
            raise BadInput(f"{told}sums of a class without images are not zero")

    def check_numbers(self, who: str, num_classes: int, width: int) -> None:
        """Raise BadInput, naming the sender, for sums that can be no sums of these classes and features.

        They have the types and shapes of `expected_shapes`, no number is beyond `LARGEST`, and the Gram
        matrix is symmetric.
        """
        check_shapes(who, vars(self), expected_shapes(num_classes, width))
        told = f"{who}: statistics: "
        for name in ("sums", "gram"):
            if not (getattr(self, name).abs() <= LARGEST).all():
                raise BadInput(f"{told}{name} holds NaN, Inf or numbers beyond {LARGEST:g}")
        if not torch.equal(self.gram, self.gram.T):
            raise BadInput(f"{told}gram is not symmetric")

    def check_scatter(self, who: str) -> None:
        """Raise BadInput, naming the sender, where the scatter within classes has a negative eigenvalue.

        No images have such sums. So the Gram matrix, which is larger, has none either. The check is that a
        Cholesky decomposition exists.
        """
        floor = TOLERANCE * self.gram.diagonal().abs().sum() + torch.finfo(torch.double).tiny
        raised = self.scatter + floor * torch.eye(self.width, dtype=torch.double)
        if torch.linalg.cholesky_ex(raised).info:
            raise BadInput(
                f"{who}: statistics: gram less the class means' share of it is not positive semi-definite: "
                "no images have these sums"
            )


def add_up(parts: Iterable[Statistics]) -> Statistics:
    """Add the sums of several clients, in their order."""
    return reduce(lambda a, b: a + b, parts)


def expected_shapes(num_classes: int, width: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """List type and shape of each of the sums."""
    return {
        "counts": (torch.int64, (num_classes,)),
        "sums": (torch.double, (num_classes, width)),
        "gram": (torch.double, (width, width)),
    }


def expected_arrays(num_classes: int, width: int) -> dict[str, Tensor]:
    """List the arrays of `Statistics.to_arrays`, as tensors on the meta device, which hold no numbers."""
    shapes = expected_shapes(num_classes, width) | {"gram": (torch.double, (width * (width + 1) // 2,))}
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in shapes.items()}


def check_shapes(who: str, found: dict[str, Tensor], wanted: dict) -> None:
    """Raise BadInput, naming the sender, for a tensor of another type or shape."""
    for name, (dtype, shape) in wanted.items():
        value = found[name]
        if value.dtype != dtype or tuple(value.shape) != shape:
            own = f"{value.dtype} {list(value.shape)}"
            raise BadInput(f"{who}: statistics: {name} is {own}, allowed is {dtype} {list(shape)}")


def _first(counts: Tensor) -> list[int]:
    """Return the first counts, for a message that stays one line."""
    return counts[:20].tolist()
