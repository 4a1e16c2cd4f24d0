"""The ensemble and a closed-form classifier as one teacher."""

import torch
from torch import Tensor, nn

from ..vision.features import FeatureClassifier
from .ensemble import CombinedModels


class EnsembleWithStatistics(nn.Module):
    """An ensemble and a closed-form classifier as one teacher: log A(x) + β·r(x), normalised.

    A knows what clients learned and not how they compare; r, ridge scores from the sums of all clients, knows
    how classes compare and nothing that was learned. Token logits are those of the ensemble alone.
    """

    def __init__(self, ensemble: CombinedModels, classifier: FeatureClassifier, weight: float) -> None:
        """Take the models as they are, without a copy; weight: β."""
        super().__init__()
        self.ensemble, self.classifier, self.weight = ensemble, classifier, weight

    def forward(self, images: Tensor, keep: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Return log-probabilities (B, C) of images (B, ch, H, W), from the kept patches (B, M) alone."""
        return self._joined(self.ensemble(images, keep), images, keep, temperature)

    def forward_tokens(self, images: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of CLS (B, C), and of every patch token (B, N, C)."""
        if temperature != 1:  # combining probabilities and softening them do not commute
            return self(images, temperature=temperature), self.ensemble.forward_tokens(images, temperature)[1]
        log_probs, tokens = self.ensemble.forward_tokens(images)
        return self._joined(log_probs, images), tokens

    @property
    def offset(self) -> Tensor:
        """The class offsets (C,) of the ensemble."""
        return self.ensemble.offset

    def calibrated(self, offset: Tensor) -> "EnsembleWithStatistics":
        """Return the same models with other class offsets (C,)."""
        return EnsembleWithStatistics(self.ensemble.calibrated(offset), self.classifier, self.weight)

    def drawn(self, per_class: int | None, rng: torch.Generator) -> "EnsembleWithStatistics":
        """Draw members as `CombinedModels.drawn` does; the classifier stays."""
        drawn = self.ensemble.drawn(per_class, rng)
        return EnsembleWithStatistics(drawn, self.classifier, self.weight)

    def _joined(
        self, log_probs: Tensor, images: Tensor, keep: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Add the classifier's scores to the ensemble's log-probabilities (B, C), and normalise."""
        scores = log_probs + self.weight * self.classifier(images, keep)  # (B, C)
        return (scores / temperature).log_softmax(dim=-1)
