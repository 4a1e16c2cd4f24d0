"""What is measured: accuracy, per class too, calibration, and how much true foreground the stops keep."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .ensemble import Ensemble
from .inversion import SyntheticSet, remaining
from .runtime import device, progress
from .scenes import patch_share
from .tasks import Split
from .vit import gather_tokens, image_logits, images_at_once, kept_patches, patch_features, read_by_head


def predict(model: nn.Module, images: Tensor, batch_size: int | None = None) -> Tensor:
    """Class probabilities (n, C) on the CPU; the model may return logits or log-probabilities.

    batch_size: by default `vit.images_at_once`.
    """
    return _in_batches(model, model, images, batch_size)


def predict_with_members(ensemble: Ensemble, images: Tensor) -> Tensor:
    """Class probabilities (1 + K, n, C) of the ensemble and of its members, from one forward of each."""

    def everyone(batch: Tensor) -> Tensor:
        each = ensemble.logits(batch)
        return torch.cat([ensemble.combine(each)[None], each])

    return _in_batches(everyone, ensemble, images)


@torch.inference_mode()
def _in_batches(
    answer: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, batch_size: int | None = None
) -> Tensor:
    """Probabilities (..., n, C) on the CPU from what `answer` makes of each batch on the model's device."""
    at = next((p.device for p in model.parameters()), images.device)
    parts = []
    with progress(len(images), "evaluation", "image", delay=1) as bar:
        for batch in images.split(batch_size or images_at_once(model)):
            parts.append(answer(batch.to(at)).softmax(dim=-1).cpu())
            bar.update(len(batch))
    return torch.cat(parts, dim=-2)


def answers(models: Sequence[nn.Module], images: Tensor) -> Tensor:
    """The class (models, n) that each model names for each image."""
    return torch.stack([predict(model, images).argmax(-1) for model in models])


def share_right(named: Tensor, labels: Tensor) -> Tensor:
    """Share of named classes (..., n) that are the labels (n,), in [0, 1]."""
    return (named == labels).double().mean(-1)


def recall(named: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Recall of each class (C,) by named classes (n,), NaN for a class that is no label."""
    hit = (named == labels).double()
    total = torch.bincount(labels, minlength=num_classes)
    return torch.bincount(labels, weights=hit, minlength=num_classes) / total


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of the split's images named right, in [0, 1]."""
    return share_right(answers([model], split.images)[0], split.labels).item()


def accuracy_per_class(model: nn.Module, split: Split, num_classes: int) -> Tensor:
    """Recall of each class (C,), NaN for a class that the split does not hold."""
    return recall(answers([model], split.images)[0], split.labels, num_classes)


@torch.inference_mode()
def surviving_patches(ensemble: Ensemble, images: Tensor, ratios: Sequence[float]) -> Tensor:
    """Mask (n, N) of the patches that stops of these ratios would leave on given images.

    The stops of inversion, applied to still images: at each, the ensemble's CLS attention is
    computed anew on the patches that are left.
    """
    parts = []
    for batch in images.split(images_at_once(ensemble)):
        patches, keep = ensemble.cut(batch.to(device()))
        keep = keep.expand(len(batch), -1)
        mask = torch.zeros(keep.shape, dtype=torch.bool)
        for ratio in ratios:
            rows = ensemble.importance(patches, keep).topk(remaining(keep.shape[1], [ratio]), dim=1).indices
            patches, keep = gather_tokens(patches, rows), keep.gather(1, rows)
        parts.append(mask.scatter(1, keep.cpu(), True))
    return torch.cat(parts)


def foreground_kept(foreground: Tensor, mask: Tensor, patch: int) -> Tensor:
    """Share of each image's true foreground area (n, 1, H, W) that lies in surviving patches (n, N): (n,)."""
    area = patch_share(foreground, patch)
    return (area * mask).sum(1) / area.sum(1).clamp(min=1e-9)


@torch.inference_mode()
def token_features(vit: VisionTransformer, images: Tensor) -> np.ndarray:
    """Output tokens (n, N, d) of whole images, on the CPU."""
    vit = copy.deepcopy(vit).to(device()).eval()
    batches = images.split(images_at_once(vit))
    parts = [patch_features(vit, *kept_patches(vit, batch.to(device()))) for batch in batches]
    return torch.cat(parts)[:, vit.num_prefix_tokens :].cpu().numpy()


def estimated_foreground(
    vit: VisionTransformer, real: Split, synthetic: SyntheticSet
) -> tuple[Tensor, float]:
    """Share of the estimated foreground of synthetic images that the surviving patches hold, and chance.

    Inverted images have no true foreground. A logistic probe learns it on real scenes, where it is
    known: from a patch's output token to whether digit covers a quarter of the patch. Its
    probabilities on the synthetic patches are summed over the survivors: share (n,), chance is the
    share of patches that survive. vit should be a model that took no part in the inversion.
    """
    covered = patch_share(real.foreground, vit.patch_embed.patch_size[0]) >= 0.25
    features = token_features(vit, real.images)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    probe.fit(features.reshape(-1, features.shape[-1]), covered.flatten().numpy())
    patches = token_features(vit, synthetic.pixels)
    belief = probe.predict_proba(patches.reshape(-1, patches.shape[-1]))[:, 1]
    belief, mask = torch.from_numpy(belief).view(len(synthetic), -1), synthetic.mask.cpu()
    return (belief * mask).sum(1) / belief.sum(1), mask.double().mean().item()


def label_skew(counts: Tensor) -> Tensor:
    """How far each client's class mix is from everyone's (K,), from class counts (K, C).

    Total variation distance: 0 where the mixes agree, near 1 where they share no class.
    """
    own, common = counts / counts.sum(1, keepdim=True), counts.sum(0) / counts.sum()
    return (own - common).abs().sum(1) / 2


@torch.inference_mode()
def inference_flops(model: nn.Module, image: Tensor) -> int:
    """Floating-point operations of any model on one image (1, ch, H, W), as torch counts them."""
    at = next((p.device for p in model.parameters()), image.device)
    forward = partial(image_logits, model) if isinstance(model, VisionTransformer) else model
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward(image.to(at))
    return counter.get_total_flops()


def forward_flops(vit: VisionTransformer, patches: int) -> int:
    """Floating-point operations of one image's forward pass on that many patches, up to the classifier.

    Matrix products only, a multiply-add as two: embedding, the blocks' linear layers, and attention,
    which grows with the square of the tokens. In the last block only what the classifier reads counts.
    """
    tokens = patches + vit.num_prefix_tokens
    rows = [tokens] * (len(vit.blocks) - 1) + [read_by_head(vit) or tokens]
    blocks = sum(block_multiplications(b, tokens, n) for b, n in zip(vit.blocks, rows, strict=True))
    return 2 * (patches * vit.patch_embed.proj.weight.numel() + blocks)


def block_multiplications(block: Block, tokens: int, rows: int) -> int:
    """Of one block, for its first `rows` tokens: keys and values need all, the rest these rows alone."""
    qkv = block.attn.qkv.weight.numel()
    linear = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
    attention = 2 * rows * tokens * block.attn.attn_dim
    return tokens * 2 * qkv // 3 + rows * (linear - 2 * qkv // 3) + attention
