"""The blocks of settings: what each setting means, its default, its allowed range and where that is from.

`Settings` in load.py holds one of each block, and one for every method that has settings of its own
(`methods.register`). The defaults are those of the `laptop` profile unless a profile says otherwise.
"""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Name -> number of classes, None where they are counted in the folder. `data.register` adds to it.
TASKS: dict[str, int | None] = {"digits": 10, "digits-plain": 10}

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
OpenShare = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["auto", "fp32", "bf16"]


def setting(
    default: Any, meaning: str, source: str = "ours", choices: Collection[str] = (), **limits: Any
) -> Any:
    """Make a field with its meaning and the source of its default.

    choices: names that it may take, where they are not in its type because more can be registered.
    """
    extra = {"source": source, "choices": choices}
    return Field(default, description=meaning, json_schema_extra=extra, **limits)


class SettingsBlock(BaseModel):
    """Settings that belong together; unknown names and values out of range are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


def precision_of(what: str) -> Any:
    """A stage's setting for the precision of its matrix products."""
    return setting("fp32", f"matrix products of {what}; auto: bf16 where the hardware multiplies it")


class TaskSettings(SettingsBlock):
    """What is learnt."""

    name: str = setting("digits", "what is learnt", choices=TASKS)
    clutter: Share = setting(0.5, "brightest background texture, of full scale; digits-plain has 0")
    scale: tuple[OpenShare, Positive] = setting(
        (0.55, 0.75), "smallest and largest side of a digit, of the scene's"
    )
    degrees: NotNegative = setting(15.0, "largest rotation of a digit, degrees")
    data_dir: str | None = setting(
        None, "folder of the images; for cifar10, cifar100 and svhn by default data/downloads"
    )
    download: bool = setting(False, "let torchvision download cifar10, cifar100 or svhn to data_dir")
    validation: OpenShare = setting(
        0.1,
        "share held out for validation: of all images, or of training images where the test part is given",
    )
    test: OpenShare = setting(0.25, "share held out for the test, unless the task has a test part of its own")
    limit: int | None = setting(
        None, "most training images of a class, drawn by the seed; validation and test stay whole", ge=1
    )

    @model_validator(mode="after")
    def _scale_rises(self):
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale={list(self.scale)} must rise")
        return self


class PartitionSettings(SettingsBlock):
    """Who holds what."""

    scheme: Literal["dirichlet", "shards", "iid", "quantity", "domain"] = setting(
        "dirichlet", "how classes are spread; domain: one domain a client (office-home)"
    )
    clients: Count = setting(5, "number of clients K", "paper")
    alpha: Positive = setting(0.1, "Dirichlet concentration; small is extreme skew", "paper")
    classes_per_client: Count = setting(2, "classes a client holds, scheme=shards", "McMahan et al. 2017")
    min_size: Count = setting(
        10, "smallest shard allowed, images", "Dirichlet practice since Yurochkin et al. 2019"
    )


class ModelSettings(SettingsBlock):
    """The shared initial model."""

    name: str = setting(
        "vit_micro",
        "a ViT-Micro that ships (vit_micro, vit_micro_patch6, vit_micro_deep) or a timm Vision Transformer",
    )
    pretrained: bool = setting(True, "start from pretrained weights", "paper")
    checkpoint: str | None = setting(None, "local safetensors file with weights, instead of a download")
    image_size: int | None = setting(None, "side of the images, pixels; default the model's", ge=1)


class ClientSettings(SettingsBlock):
    """Local training."""

    models: tuple[str, ...] = setting(
        (),
        "the clients' models, names as model.name, dealt out in turn; none: model.name for all. Others need "
        "distill.start=initial, and do not start from model.checkpoint",
    )
    epochs: Count = setting(15, "passes over the shard")
    batch_size: Count = setting(32, "images a step")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "optimiser")
    lr: Positive = setting(1e-3, "peak learning rate")
    momentum: Share = setting(0.9, "SGD momentum")
    weight_decay: NotNegative = setting(0.05, "decoupled for AdamW", "DeiT")
    schedule: Literal["one_cycle", "cosine", "constant"] = setting(
        "one_cycle", "learning rate over the steps"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = setting(0.0, "label smoothing")
    augment: Share = setting(0.5, "strength of random scale, rotation and shift; 0 is none")
    token_weight: NotNegative = setting(
        0.0, "weight of the image label on the patch tokens as well", "LV-ViT"
    )
    fedprox: NotNegative = setting(
        0.0, "weight μ of (μ/2)‖w − w_shared‖² in the local loss; 0 is plain training", "Li et al. 2020"
    )
    precision: Precision = precision_of("local training")


class EnsembleSettings(SettingsBlock):
    """How the uploads become one teacher."""

    mode: Literal["mean_probs", "mean_logits", "size", "class"] = setting(
        "class",
        "mean of probabilities or logits, weighted by n_k, or by class counts c_k",
        "choice; FedFTG: class",
    )
    precision: Precision = precision_of("the teacher, in inversion and for labels")
    compile: bool = setting(False, "run the teacher through torch.compile; where that fails, without")


class InversionSettings(SettingsBlock):
    """Sparse model inversion; no stops is dense inversion."""

    teacher: Literal["ensemble", "owners"] = setting(
        "owners",
        "who is inverted: the ensemble, or for each image one client, drawn by shares of its class",
        "choice; paper: ensemble",
    )
    images: Count = setting(400, "synthetic images in all")
    batch_size: Count = setting(200, "images inverted together", "SMI: 100")
    iterations: Count = setting(100, "steps of the optimiser", "SMI: 4000")
    lr: Positive = setting(0.4, "Adam's learning rate", "SMI: 0.25")
    betas: tuple[Beta, Beta] = setting((0.5, 0.99), "Adam's betas", "SMI")
    schedule: Literal["constant", "cosine"] = setting(
        "cosine", "learning rate over the iterations", "SMI: constant"
    )
    stop_at: tuple[int, ...] = setting(
        (10, 20, 30, 40), "iterations after which patches stop", "SMI: 50,100,200,300"
    )
    stop_ratio: tuple[OpenShare, ...] = setting(
        (0.16, 0.16, 0.16, 0.16), "share of the remaining patches; half are left", "SMI: four times 0.3"
    )
    ce: NotNegative = setting(1.0, "weight of the cross-entropy to the target", "SMI")
    tv: NotNegative = setting(3e-3, "weight of the L2 total variation", "SMI: 1e-4")
    l2: NotNegative = setting(0.0, "weight of the squared norm of the pixels", "SMI")
    jitter: Annotated[float, Field(ge=0, lt=0.5)] = setting(
        0.125, "largest shift of a view, of the side, where augment is 0", "SMI"
    )
    augment: Share = setting(
        0.7,
        "strength of random scale, rotation and shift of views, as in distillation; 0: jitter instead",
        "ours; SMI: none",
    )
    flip: bool = setting(False, "mirror views at random (letters and digits are not symmetric)", "SMI: true")
    background: Literal["keep", "zero", "noise", "mean"] = setting(
        "keep", "pixels of a stopped patch", "choice"
    )
    keep_best: bool = setting(True, "return each image's iterate of least loss after the last stop", "SMI")

    @model_validator(mode="after")
    def _stops_fit(self):
        if len(self.stop_ratio) != len(self.stop_at):
            raise ValueError(
                f"stop_ratio has {len(self.stop_ratio)} values for {len(self.stop_at)} stops: give as many"
            )
        if list(self.stop_at) != sorted(set(self.stop_at)):
            raise ValueError(f"stop_at={list(self.stop_at)} must rise")
        if self.stop_at and (self.stop_at[0] < 1 or self.stop_at[-1] >= self.iterations):
            raise ValueError(f"stop_at={list(self.stop_at)} must lie in [1, iterations={self.iterations})")
        return self


class RelabelSettings(SettingsBlock):
    """Which label each patch token learns."""

    mode: Literal["relabel", "pseudo", "soft", "none"] = setting(
        "relabel", "the paper's, or an ablation of it", "paper"
    )
    source: Literal["token_logits", "background_cls"] = setting(
        "token_logits", "soft label of a patch", "choice"
    )
    temperature: Positive = setting(1.0, "of the soft token labels", "choice")
    foreground_soft: Share = setting(0.5, "share of the soft label mixed into the pseudo-label", "ours")


class DistillSettings(SettingsBlock):
    """Distilling the global model."""

    steps: Count = setting(400, "student steps")
    batch_size: Count = setting(64, "synthetic images a step")
    lr: Positive = setting(6e-4, "peak learning rate of AdamW, one cycle; FedMITR alone")
    weight_decay: NotNegative = setting(0.05, "AdamW's", "DeiT")
    start: Literal["average", "initial"] = setting("average", "student's start", "choice")
    temperature: Positive = setting(1.0, "T of the distillation loss", "choice")
    ce_weight: NotNegative = setting(
        0.25, "λ_ce, cross-entropy of CLS to the target; FedMITR alone", "choice"
    )
    calibrate: NotNegative = setting(
        0.02,
        "penalty λ of class offsets, fitted to the labels of synthetic views, that the ensemble gets before "
        "FedMITR distils it; 0: none",
        "ours",
    )
    token_weight: NotNegative = setting(0.1, "λ_tok, loss of the patch tokens", "choice")
    background: Literal["keep", "texture"] = setting(
        "texture", "low-density patches in each view: as inverted, or fresh smooth texture", "choice"
    )
    views: int = setting(
        8, "random views drawn of each image, labelled by the teacher once; 0: new ones every step", ge=0
    )
    per_class: int | None = setting(
        None,
        "clients that label a batch of views: so many for each class, drawn by shares of it; none: all. "
        "FedMITR alone; with ensemble.mode=class",
        ge=1,
    )
    group: int | None = setting(
        None,
        "clients distilled together first, each group to one model that then stands for it; none: all at "
        "once. FedMITR alone",
        ge=2,
    )
    augment: Share = setting(1.0, "strength of random scale, rotation and shift of pixels and mask")
    precision: Precision = precision_of("the student's training")


class FuseflSettings(SettingsBlock):
    """FuseFL: train, upload and fuse the network stage by stage."""

    stages: Count = setting(2, "stages the network is split into; one exchange each", "FuseFL")
    adaptor: Literal["average", "linear"] = setting(
        "average", "how clients' features are fused between stages", "FuseFL"
    )
