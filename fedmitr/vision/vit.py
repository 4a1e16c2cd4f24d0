"""Construction of models: ViT-Micro and timm's ViTs, their weights and pixel normalisation.

A model is a plain timm `VisionTransformer`; nothing of timm is copied or subclassed. It needs a CLS token, an
absolute position embedding and patches cut straight from the image, so that any subset of patches can be
embedded on its own (`vision.tokens`).
"""

import hashlib
import logging
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from ..core.errors import BadInput
from ..core.paths import shipped
from ..settings.schema import ModelSettings

VIT_MICRO = dict(img_size=24, patch_size=4, in_chans=1, embed_dim=96, depth=4, num_heads=3, mlp_ratio=2)
# The shipped models, all pretrained on letters: "early" for so short a time that its features leave room to
# learn; the last two are for clients whose ViTs differ.
MICROS = {
    "vit_micro": VIT_MICRO,
    "vit_micro_early": VIT_MICRO,
    "vit_micro_patch6": VIT_MICRO | dict(patch_size=6),
    "vit_micro_deep": VIT_MICRO | dict(embed_dim=64, depth=6, num_heads=2),
}


def create_vit(
    name: str = "vit_micro",
    num_classes: int = 10,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    image_size: int | None = None,
    in_chans: int | None = None,
) -> VisionTransformer:
    """Build the shared initial model (method step 0): one of `MICROS`, or any timm ViT by its timm name.

    pretrained loads the shipped letter weights for the `MICROS` and timm's published weights for every other
    name; checkpoint loads a local safetensors file instead. A classifier whose class count differs is
    replaced by a fresh one, the same in every process. Without `pretrained` nothing is read from the network.
    Raises BadInput for an unknown name, a model that is no plain VisionTransformer, an image size that is not
    a multiple of the patch, a download that fails, and a checkpoint that does not fit.
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
    """Return the path of a ViT-Micro's shipped weights."""
    return shipped(f"data/{name}_letters.safetensors")


def shared_vit(settings: ModelSettings, num_classes: int) -> VisionTransformer:
    """Build the shared initial model that the settings name; BadInput as `create_vit`."""
    return create_vit(
        settings.name,
        num_classes,
        pretrained=settings.pretrained,
        checkpoint=settings.checkpoint,
        image_size=settings.image_size,
    )


def client_vit(initial: VisionTransformer, settings: ModelSettings) -> VisionTransformer:
    """Build the initial model of a client whose architecture differs; it takes the shared model's images.

    Image size, channels, classes and normalisation of pixels are those of `initial`; weights are those that
    the settings name. Raises BadInput as `create_vit` and `renormalise`, naming `client.models`.
    """
    vit = vit_beside(initial, settings.name, settings.pretrained)
    try:
        return renormalise(vit, normalisation(initial))
    except BadInput as error:
        raise BadInput(f"client.models: {error}") from None


def vit_beside(initial: VisionTransformer, name: str, pretrained: bool = False) -> VisionTransformer:
    """Build another architecture with the classes, image size and channels of `initial`.

    It still expects pixels normalised by its own statistics. Raises BadInput as `create_vit`, naming
    `client.models`.
    """
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
    """Change a ViT's patch embedding, in place, for pixels normalised with stats = mean and std, (ch, 1, 1).

    With the model's own mean m and deviation s, and pixels x̂ normalised with m̂ and ŝ,
    (x − m)/s = x̂·ŝ/s + (m̂ − m)/s; so the model stays the same function of the image. It is nearly so where a
    model of colours is given one channel: timm sums its weights, and m and s are averaged here. Raises
    BadInput where that needs a bias which the model does not have.
    """
    projection = vit.patch_embed.proj
    channels = projection.in_channels
    own = [torch.tensor(vit.pretrained_cfg[k]) for k in ("mean", "std")]
    if len(own[0]) != channels:
        own = [values.mean().expand(channels) for values in own]
    mean, std = (values.view(-1, 1, 1) for values in own)
    scale, shift = stats[1] / std, (stats[0] - mean) / std  # ŝ/s and (m̂ − m)/s, each (ch, 1, 1)
    if projection.bias is None and shift.any():
        raise BadInput(
            f"{vit.pretrained_cfg.get('architecture')!r} normalises images otherwise than model.name"
        )
    if projection.bias is not None:
        projection.bias += (projection.weight * shift).sum(dim=(1, 2, 3))  # weight is (d, ch, p, p)
    projection.weight *= scale
    return vit


def normalisation(vit: VisionTransformer) -> tuple[Tensor, Tensor]:
    """Return mean and std, each (ch, 1, 1), with which a model expects its pixels normalised."""
    return tuple(torch.tensor(vit.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))


def weights_digest(settings: ModelSettings) -> str:
    """Identify the initial weights: by the SHA-256 of their file, or by the name of timm's published ones."""
    path = settings.checkpoint
    if path is None and settings.pretrained and settings.name in MICROS:
        path = letter_weights(settings.name)
    if path is None:
        return f"{settings.name}, pretrained={settings.pretrained}"
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _create_micro(
    name: str, num_classes: int, image_size: int | None, in_chans: int | None
) -> VisionTransformer:
    """Build one of `MICROS`, of its own image size and channels where none are given."""
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
    """Build a plain timm ViT, with the published weights if pretrained; BadInput for any other model."""
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
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # hide its retries; BadInput below reports the failure
    try:
        return timm.create_model(name, pretrained=True, num_classes=num_classes, **options)
    except (OSError, RuntimeError, ConnectionError) as error:
        raise BadInput(
            f"model.pretrained=true: the weights of {name!r} could not be downloaded "
            f"({type(error).__name__}); give a local safetensors file as model.checkpoint=PATH"
        ) from error


def _known_to_timm(name: str) -> bool:
    """Whether timm has an architecture of this name and, after a dot, published weights of that tag."""
    try:
        timm.get_pretrained_cfg(name)  # raises for an unknown tag
    except RuntimeError:
        return False
    return timm.is_model(name)


def _is_plain(vit: object) -> bool:
    """Whether any subset of patches can be embedded on its own and CLS attention read off."""
    return (
        isinstance(vit, VisionTransformer)
        and vit.cls_token is not None
        and vit.pos_embed is not None
        and isinstance(vit.patch_embed, PatchEmbed)
        and all(isinstance(block, Block) for block in vit.blocks)
    )


def _check_multiple(name: str, image_size: int, patch: int) -> None:
    """Raise BadInput unless the image size is a multiple of the patch."""
    if image_size % patch:
        raise BadInput(
            f"model.image_size={image_size} is not a multiple of the patch of {name!r}: "
            f"allowed are multiples of {patch}"
        )


def _load_checkpoint(vit: VisionTransformer, path: Path) -> None:
    """Load a safetensors file into a ViT, all but a head of other shape; BadInput where it does not fit."""
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
