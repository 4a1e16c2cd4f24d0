"""The model: a timm Vision Transformer seen token by token, on any subset of its patches.

Every function takes a plain timm `VisionTransformer`; nothing of timm is copied or subclassed.
A subset is given by patch indices in row-major order of the patch grid. Patches that are left
out cost nothing: they are neither embedded nor attended to.
"""

import hashlib
import logging
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from .attention import look, run_blocks
from .blocks import ModelSettings
from .errors import BadInput
from .paths import shipped

VIT_MICRO = dict(img_size=24, patch_size=4, in_chans=1, embed_dim=96, depth=4, num_heads=3, mlp_ratio=2)
# The shipped models, all pretrained on letters; the others are for clients whose ViTs differ.
MICROS = {
    "vit_micro": VIT_MICRO,
    "vit_micro_patch6": VIT_MICRO | dict(patch_size=6),
    "vit_micro_deep": VIT_MICRO | dict(embed_dim=64, depth=6, num_heads=2),
}
PATCHES_IN_TRAINING = 64 * 64  # one backward pass on a CPU holds no more: 64 images of 32x32 cut by four
MODELS_AT_ONCE = 10  # of more, less is held for each
AT_ONCE = 256  # images in a batch that no gradient is taken of, where they are small:
PATCHES_AT_ONCE = AT_ONCE * 64  # a batch holds no more patches than so many images of 32x32 cut by four


def create_vit(
    name: str = "vit_micro",
    num_classes: int = 10,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    image_size: int | None = None,
    in_chans: int | None = None,
) -> VisionTransformer:
    """The shared initial model (method step 0): a ViT-Micro, or any timm ViT by its timm name.

    pretrained loads the shipped letter weights for `vit_micro` and its kin (`MICROS`) and timm's published
    weights for every other name; checkpoint loads a local safetensors file instead. A classifier whose class
    count differs is replaced by a fresh one, the same in every process. Raises BadInput for an
    unknown name, a model that is no timm VisionTransformer, an image size that is not a multiple
    of the patch, a download that fails, and a checkpoint that does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in MICROS and pretrained and not checkpoint and in_chans not in (None, 1):
            raise BadInput(f"the letter weights of {name!r} take images of one channel, not of {in_chans}")
        if name in MICROS:
            vit = _create_micro(name, num_classes, image_size, in_chans)
            checkpoint = checkpoint or (letter_weights(name) if pretrained else None)
        else:
            vit = _create_timm(name, num_classes, pretrained and not checkpoint, image_size, in_chans)
    if checkpoint:
        _load_checkpoint(vit, Path(checkpoint))
    return vit


def letter_weights(name: str) -> Path:
    """The shipped weights of a ViT-Micro."""
    return shipped(f"data/{name}_letters.safetensors")


def shared_vit(settings: ModelSettings, num_classes: int) -> VisionTransformer:
    """The shared initial model that settings ask for; BadInput as `create_vit`."""
    return create_vit(
        settings.name,
        num_classes,
        pretrained=settings.pretrained,
        checkpoint=settings.checkpoint,
        image_size=settings.image_size,
    )


def client_vit(initial: VisionTransformer, settings: ModelSettings) -> VisionTransformer:
    """Another shared model, for a client whose architecture differs, that takes the initial one's images.

    Its size, channels, classes and normalisation of pixels are the initial model's. Raises BadInput as
    `create_vit`, naming `client.models`.
    """
    vit = vit_beside(initial, settings.name, settings.pretrained)
    try:
        return renormalise(vit, normalisation(initial))
    except BadInput as error:
        raise BadInput(f"client.models: {error}") from None


def vit_beside(initial: VisionTransformer, name: str, pretrained: bool = False) -> VisionTransformer:
    """A model with the classes and for the size and channels of images of the initial one."""
    embed = initial.patch_embed
    size, channels = embed.img_size[0], embed.proj.in_channels
    try:
        return create_vit(
            name, initial.num_classes, pretrained=pretrained, image_size=size, in_chans=channels
        )
    except BadInput as error:
        raise BadInput(f"client.models: {error}") from None


@torch.no_grad()
def renormalise(vit: VisionTransformer, stats: tuple[Tensor, Tensor]) -> VisionTransformer:
    """The same function of the same images, normalised with other stats = mean and std, each (ch, 1, 1).

    (x − m)/s = x̂·ŝ/s + (m̂ − m)/s for pixels x̂ normalised with m̂ and ŝ: the patch embedding takes it in.
    Nearly the same where a model of colours sees one channel: timm sums its weights, we average its m and s.
    Raises BadInput where that needs a bias which the model has not.
    """
    projection = vit.patch_embed.proj
    channels = projection.in_channels
    own = [torch.tensor(vit.pretrained_cfg[k]) for k in ("mean", "std")]
    if len(own[0]) != channels:
        own = [values.mean().expand(channels) for values in own]
    mean, std = (values.view(-1, 1, 1) for values in own)
    scale, shift = stats[1] / std, (stats[0] - mean) / std
    if projection.bias is None and shift.any():
        raise BadInput(
            f"{vit.pretrained_cfg.get('architecture')!r} normalises images otherwise than model.name"
        )
    if projection.bias is not None:
        projection.bias += (projection.weight * shift).sum(dim=(1, 2, 3))
    projection.weight *= scale
    return vit


def weights_digest(settings: ModelSettings) -> str:
    """What the initial weights are: a hash of their file, or the name of timm's published ones."""
    path = settings.checkpoint
    if path is None and settings.pretrained and settings.name in MICROS:
        path = letter_weights(settings.name)
    if path is None:
        return f"{settings.name}, pretrained={settings.pretrained}"
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _create_micro(
    name: str, num_classes: int, image_size: int | None, in_chans: int | None
) -> VisionTransformer:
    shape = dict(MICROS[name])
    shape.update({k: v for k, v in dict(img_size=image_size, in_chans=in_chans).items() if v})
    _check_multiple(name, shape["img_size"], shape["patch_size"])
    vit = VisionTransformer(num_classes=num_classes, **shape)
    channels = shape["in_chans"]
    vit.pretrained_cfg = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    return vit


def _create_timm(
    name: str, num_classes: int, pretrained: bool, image_size: int | None, in_chans: int | None
) -> VisionTransformer:
    if not _known_to_timm(name):
        raise BadInput(
            f"model.name={name!r} is unknown: allowed are {', '.join(MICROS)} and timm's Vision "
            "Transformers, such as 'deit_tiny_patch16_224' (all: timm.list_models('*vit*'))"
        )
    options = {k: v for k, v in dict(img_size=image_size, in_chans=in_chans).items() if v}
    if image_size and "_patch" in name:
        _check_multiple(name, image_size, int(name.split("_patch")[1].split("_")[0]))
    try:
        vit = timm.create_model(name, num_classes=num_classes, **options)
    except TypeError:  # a network that takes no image size: no Vision Transformer
        vit = None
    if not _is_plain(vit):
        raise BadInput(
            f"model.name={name!r} cannot be used: allowed are timm VisionTransformers with a CLS token, "
            "absolute position embedding, patches cut from the image and plain blocks"
        )
    _check_multiple(name, vit.patch_embed.img_size[0], vit.patch_embed.patch_size[0])
    if not pretrained:
        return vit
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the line below says all
    try:
        return timm.create_model(name, pretrained=True, num_classes=num_classes, **options)
    except (OSError, RuntimeError, ConnectionError) as error:
        raise BadInput(
            f"model.pretrained=true: the weights of {name!r} could not be downloaded "
            f"({type(error).__name__}); give a local safetensors file as model.checkpoint=PATH"
        ) from error


def _known_to_timm(name: str) -> bool:
    try:
        timm.get_pretrained_cfg(name)  # raises for an unknown tag after the dot
    except RuntimeError:
        return False
    return timm.is_model(name)


def _is_plain(vit: object) -> bool:
    """Whether a subset of patches can be embedded on its own and CLS attention read off."""
    return (
        isinstance(vit, VisionTransformer)
        and vit.cls_token is not None
        and vit.pos_embed is not None
        and isinstance(vit.patch_embed, PatchEmbed)
        and all(isinstance(block, Block) for block in vit.blocks)
    )


def _check_multiple(name: str, image_size: int, patch: int) -> None:
    if image_size % patch:
        raise BadInput(
            f"model.image_size={image_size} is not a multiple of the patch of {name!r}: "
            f"allowed are multiples of {patch}"
        )


def _load_checkpoint(vit: VisionTransformer, path: Path) -> None:
    if not path.is_file():
        raise BadInput(f"model.checkpoint={str(path)!r} does not exist: give a safetensors file")
    try:
        state = load_file(path)
    except Exception as error:
        raise BadInput(f"model.checkpoint={str(path)!r} is not a safetensors file: {error}") from error
    try:  # timm's own filter renames old keys and resamples position embeddings to the image size
        state = checkpoint_filter_fn(state, vit)
    except Exception as error:
        raise BadInput(f"model.checkpoint={str(path)!r} does not fit the model: {error}") from error
    wanted = vit.state_dict()
    other_head = [
        k for k in wanted.keys() & state if k.startswith("head") and wanted[k].shape != state[k].shape
    ]
    state = {k: v for k, v in state.items() if k not in other_head}
    wrong = sorted(k for k in state if k not in wanted or state[k].shape != wanted[k].shape)
    missing = sorted(k for k in wanted if k not in state and not k.startswith("head"))
    if wrong or missing:
        raise BadInput(
            f"model.checkpoint={str(path)!r} does not fit the model: "
            f"{(wrong + missing)[0]!r} is {'of another shape or unknown' if wrong else 'missing'}"
        )
    vit.load_state_dict(state, strict=False)


def grid_size(vit: VisionTransformer) -> tuple[int, int]:
    """Rows and columns of the patch grid; N is their product."""
    return vit.patch_embed.grid_size


def images_at_once(model: nn.Module) -> int:
    """How many images to put through a model, or several in one, together where no gradient is wanted.

    Memory grows with the patches: 256 images of 24x24 pixels cut by four, 83 of 224x224 cut by sixteen; and
    with the answers where there are many models: of 100 a tenth as many images.
    """
    counts = [m.num_patches for m in model.modules() if isinstance(m, PatchEmbed)] or [1]
    return max(
        1, min(AT_ONCE, PATCHES_AT_ONCE // max(counts)) * MODELS_AT_ONCE // max(MODELS_AT_ONCE, len(counts))
    )


def images_in_training(vit: VisionTransformer) -> int:
    """How many images to hold in one backward pass: 113 of 24x24 pixels cut by four, 20 of 224x224 by 16."""
    return max(1, PATCHES_IN_TRAINING // vit.patch_embed.num_patches)


def normalisation(vit: VisionTransformer) -> tuple[Tensor, Tensor]:
    """Mean and std (ch, 1, 1) of the pixels that the model expects, from its own configuration."""
    return tuple(torch.tensor(vit.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images (B, ch, H, W) cut into patches (B, N, ch·p·p), row-major."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    cut = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, patch: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, N, ch·p·p) back to images (B, ch, H, W)."""
    rows, columns = image_size[0] // patch[0], image_size[1] // patch[1]
    cut = patches.reshape(len(patches), rows, columns, -1, *patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, *image_size)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, M) of tokens (B, N, d): (B, M, d)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))


def embed_patches(vit: VisionTransformer, patches: Tensor, position: Tensor) -> Tensor:
    """Patches (B, M, ch·p·p) at grid positions (B, M), or (1, M) for all -> the blocks' input (B, P + M, d).

    P prefix tokens (CLS first) come before the patches, as in timm.
    """
    convolution = vit.patch_embed.proj
    tokens = F.linear(patches, convolution.weight.flatten(1), convolution.bias)
    tokens = vit.patch_embed.norm(tokens)
    names = ("cls_token", "dist_token", "reg_token")  # timm's order
    prefix = [getattr(vit, n) for n in names if getattr(vit, n, None) is not None]
    prefix = torch.cat(prefix, dim=1)
    at_patches = vit.pos_embed
    if not vit.no_embed_class:
        prefix = prefix + vit.pos_embed[:, : prefix.shape[1]]
        at_patches = vit.pos_embed[:, prefix.shape[1] :]
    tokens = tokens + at_patches[0][position]
    tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
    return vit.norm_pre(vit.pos_drop(tokens))


def patch_features(
    vit: VisionTransformer, patches: Tensor, position: Tensor, rows: int | None = None
) -> Tensor:
    """Normalised output tokens (B, P + M, d) of patches (B, M, ch·p·p) at positions (B, M) or (1, M).

    rows: only the first so many tokens, (B, rows, d); the last block then computes no others.
    """
    return vit.norm(run_blocks(vit.blocks, embed_patches(vit, patches, position), rows))


def class_logits(vit: VisionTransformer, patches: Tensor, position: Tensor) -> Tensor:
    """Class logits z^0 (B, C) of patches (B, M, ch·p·p) at positions (B, M), or (1, M) for all images."""
    return vit.forward_head(patch_features(vit, patches, position, read_by_head(vit)))


def image_logits(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Class logits z^0 (B, C) of whole images (B, ch, H, W): timm's forward, with less work."""
    return class_logits(vit, *kept_patches(vit, images))


def read_by_head(vit: VisionTransformer) -> int | None:
    """How many tokens the class logits depend on: the prefix, or all (None) where the head pools patches."""
    return vit.num_prefix_tokens if vit.attn_pool is None and vit.global_pool == "token" else None


def forward_tokens(
    vit: VisionTransformer, images: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Class logits z^0 (B, C) and token logits z^i (B, M, C) of images (B, ch, H, W).

    keep (B, M): patch indices in [0, N), default all. z^i = h(norm(token_i)).
    """
    features = patch_features(vit, *kept_patches(vit, images, keep))
    return vit.forward_head(features), token_logits(vit, features)


def token_logits(vit: VisionTransformer, features: Tensor) -> Tensor:
    """The classifier head on every patch token: (B, P + M, d) -> (B, M, C)."""
    return vit.head(vit.fc_norm(features[:, vit.num_prefix_tokens :]))


def kept_patches(vit: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The kept patches (B, M, ch·p·p) of images and their positions (B, M); without `keep` (1, N), all."""
    return cut_patches(images, vit.patch_embed.patch_size, keep)


def cut_patches(images: Tensor, patch: tuple[int, int], keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`kept_patches` of any model with patches of this size."""
    patches = patchify(images, patch)
    if keep is None:
        return patches, torch.arange(patches.shape[1], device=images.device)[None]
    return gather_tokens(patches, keep), keep


def cls_attention(vit: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attention of CLS to each patch in the last block, mean over heads (SMI's importance).

    images (B, ch, H, W); keep (B, M) patch indices in [0, N), default all.
    Returns (B, M); rows sum to less than one: CLS attends to itself too.
    """
    return patch_importance(vit, *kept_patches(vit, images, keep))


def patch_importance(vit: VisionTransformer, patches: Tensor, position: Tensor) -> Tensor:
    """`cls_attention` for patches (B, M, ch·p·p) at grid positions (B, M)."""
    tokens = run_blocks(vit.blocks[:-1], embed_patches(vit, patches, position))
    last = vit.blocks[-1]
    weights, _ = look(last.attn, last.norm1(tokens), rows=1)
    return weights[:, :, 0, vit.num_prefix_tokens :].mean(dim=1)
