"""The blocks of settings: what each setting means, its default, its range, and the source of the default.

`Settings` in load.py has one field per block, and one per method that has settings of its own
(`methods.register`). Profiles set what differs from these defaults.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import (
    Beta,
    Count,
    FeatureTokens,
    NotNegative,
    OpenShare,
    Positive,
    Precision,
    SettingsBlock,
    Share,
    precision_of,
    setting,
)

# Number of classes by task.name, None where they are counted in the folder. `data.register` adds to it.
TASKS: dict[str, int | None] = {"digits": 10, "digits-plain": 10}


class TaskSettings(SettingsBlock):
    """The task: its images and their splits."""

    name: str = setting("digits", "the data set", choices=TASKS)
    clutter: Share = setting(
        0.5, "brightness of the background texture at most, as a share of full scale; digits-plain has 0"
    )
    scale: tuple[OpenShare, Positive] = setting(
        (0.55, 0.75), "smallest and largest side of a digit, as shares of the image's"
    )
    degrees: NotNegative = setting(15.0, "largest rotation of a digit, in degrees")
    scenes: int = setting(
        1,
        "scenes of each validation and test digit: more of them average out its place; training has one",
        ge=1,
        le=100,
    )
    data_dir: str | None = setting(
        None, "folder of the image files; torchvision's data sets have a default, data/downloads"
    )
    download: bool = setting(False, "let torchvision download cifar10, cifar100 or svhn into data_dir")
    validation: OpenShare = setting(
        0.1,
        "share held out for validation: of all images, or of the training part where a test part is given",
    )
    test: OpenShare = setting(
        0.25, "share of all images held out for the test, unless the task has a test part of its own"
    )
    limit: int | None = setting(
        None, "most training images of a class, drawn by the seed; validation and test keep all", ge=1
    )

    @model_validator(mode="after")
    def _scale_rises(self):
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale={list(self.scale)} must rise")
        return self


class PartitionSettings(SettingsBlock):
    """The partition of the training images among clients."""

    scheme: Literal["dirichlet", "shards", "iid", "quantity", "domain"] = setting(
        "dirichlet", "how images are dealt to clients; domain: one domain per client (office-home)"
    )
    clients: Count = setting(5, "number of clients K", "paper")
    alpha: Positive = setting(
        0.1, "concentration of the Dirichlet distribution; the smaller, the more skewed", "paper"
    )
    classes_per_client: Count = setting(
        2, "number of classes that a client holds, with scheme=shards", "McMahan et al. 2017"
    )
    min_size: Count = setting(
        10, "fewest images that a client holds", "Dirichlet practice since Yurochkin et al. 2019"
    )


class ModelSettings(SettingsBlock):
    """The shared initial model."""

    name: str = setting(
        "vit_micro",
        "a ViT-Micro that ships (vit_micro, vit_micro_patch6, vit_micro_deep) or a timm Vision Transformer",
    )
    pretrained: bool = setting(True, "start from pretrained weights", "paper")
    checkpoint: str | None = setting(
        None, "safetensors file with the initial weights, in place of those that ship or are downloaded"
    )
    image_size: int | None = setting(None, "side of the images in pixels; none: the model's own", ge=1)


class ClientSettings(SettingsBlock):
    """Local training of the clients."""

    models: tuple[str, ...] = setting(
        (),
        "the clients' models, names as model.name, dealt out in turn; none: model.name for all. Others need "
        "distill.start=initial, and do not start from model.checkpoint",
    )
    epochs: Count = setting(15, "passes over a client's images")
    batch_size: Count = setting(32, "images per step")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "optimiser")
    lr: Positive = setting(1e-3, "peak learning rate")
    weight_decay: NotNegative = setting(0.05, "weight decay; decoupled with adamw", "DeiT")
    schedule: Literal["one_cycle", "cosine", "constant"] = setting(
        "one_cycle", "course of the learning rate over the steps"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = setting(0.0, "label smoothing")
    augment: Share = setting(0.5, "strength of random scale, rotation and shift of the images; 0: none")
    token_weight: NotNegative = setting(
        0.0, "weight of a cross-entropy of the patch tokens to the label of their image", "LV-ViT"
    )
    fedprox: NotNegative = setting(
        0.0, "weight μ of (μ/2)‖w − w_shared‖² in the local loss; 0: plain training", "Li et al. 2020"
    )
    precision: Precision = precision_of("local training")
    dp_epsilon: Positive | None = setting(
        None,
        "ε of the differential privacy of a client's weights: its training becomes DP-SGD, which needs "
        "fedmitr[privacy]; none: plain training",
        later=True,
    )
    dp_delta: OpenShare = setting(1e-5, "δ beside dp_epsilon; less than 1 / n_k", "choice", later=True)
    dp_clip: Positive = setting(
        1.0, "largest norm of one image's gradient in DP-SGD; longer ones are scaled down to it", later=True
    )


class StatisticsSettings(SettingsBlock):
    """Sums of features that clients send where closed-form heads are wanted."""

    tokens: FeatureTokens = setting(
        "both",
        "features of an image: CLS, the mean of the patches, or both, after the last block; regions: CLS and "
        "the mean of each quarter of the image, after each of the last two blocks; all under the last norm",
        "choice",
    )
    views: int = setting(
        0,
        "moved copies of each image: what it adds to the sums is the mean over it and them, so that it still "
        "counts once; the same moves for all images of all clients",
        ge=0,
        le=100,
    )
    ridge: Positive = setting(
        1.0, "penalty λ of ridge regression on standardised features", "choice; scikit-learn's default"
    )
    weight: NotNegative = setting(
        10.0, "β, weight of the ridge scores beside the ensemble's log-probabilities", "ours"
    )
    smallest: int = setting(
        0,
        "fewest images of a class that a client tells of: smaller classes are left out of its sums and its "
        "class histogram, not of its weights; with dp_epsilon, noisy counts decide",
        later=True,
        ge=0,
    )
    dp_epsilon: Positive | None = setting(
        None,
        "ε of the differential privacy of a client's sums and counts: Gaussian noise on them, which needs "
        "fedmitr[privacy]; none: no noise",
        later=True,
    )
    dp_delta: OpenShare = setting(1e-5, "δ beside dp_epsilon; less than 1 / n_k", "choice", later=True)
    dp_clip: Positive = setting(
        0.5,
        "largest norm of an image's features with dp_epsilon, in units of √D; longer ones are scaled down",
        later=True,
    )


class EnsembleSettings(SettingsBlock):
    """The ensemble: how uploads become one teacher."""

    mode: Literal["mean_probs", "mean_logits", "size", "class"] = setting(
        "mean_logits",
        "plain mean of probabilities or of logits, or weighted by clients' sizes n_k or class counts c_k",
        "DENSE, Co-Boosting; FedFTG: class",
    )
    anchor: bool = setting(
        False,
        "clients also send sums of features, and β times the ridge scores is added to the teacher's "
        "log-probabilities of whole images (not of patches, not in inversion); for every method that distils",
    )
    precision: Precision = precision_of("the teacher, for inversion and for labels")


class InversionSettings(SettingsBlock):
    """Sparse model inversion; without stops it is dense."""

    teacher: Literal["ensemble", "owners"] = setting(
        "ensemble",
        "what is inverted: the ensemble, or for each image one client, drawn by shares of the image's class",
        "paper",
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
        (0.16, 0.16, 0.16, 0.16),
        "share of the remaining patches that each stop removes; these leave half",
        "SMI: four times 0.3",
    )
    ce: NotNegative = setting(1.0, "weight of the cross-entropy to the target", "SMI")
    tv: NotNegative = setting(3e-3, "weight of the L2 total variation", "SMI: 1e-4")
    tv_norm: Literal["squares", "norms"] = setting(
        "squares",
        "total variation: squared differences of neighbours, image by image, or norms over the batch of "
        "differences in four directions",
        "ours; SMI: norms",
    )
    l2: NotNegative = setting(0.0, "weight of the squared norm of the pixels", "SMI")
    clip: bool = setting(
        False, "clip the pixels to the images' range after every step", "ours; SMI, DeepInversion: true"
    )
    jitter: Annotated[float, Field(ge=0, lt=0.5)] = setting(
        0.125, "largest shift of a view, as a share of the side; used where augment is 0", "SMI"
    )
    augment: Share = setting(
        0.0,
        "strength of random scale, rotation and shift of views, as in distillation; 0: only jitter",
        "SMI",
    )
    flip: bool = setting(False, "mirror views at random (letters and digits are not symmetric)", "SMI: true")
    background: Literal["keep", "zero", "noise", "mean"] = setting(
        "keep", "pixels of a stopped patch: kept, zero, noise, or the image's mean", "choice"
    )
    keep_best: bool = setting(
        True,
        "return the iterate of least loss after the last stop, image by image",
        "SMI's intent; its code returns the last one",
    )
    mask: Literal["survivors", "attention"] = setting(
        "survivors",
        "foreground of a finished image: the patches that survived the stops, or as many of all its patches, "
        "those that CLS attends to most",
        "ours; SMI: attention",
    )

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
    """The label that each patch token learns."""

    mode: Literal["relabel", "pseudo", "soft", "none"] = setting(
        "relabel", "the paper's relabelling, or an ablation of it", "paper"
    )
    source: Literal["token_logits", "background_cls"] = setting(
        "token_logits", "soft label of a patch", "choice"
    )
    head: Literal["shared", "own"] = setting(
        "shared",
        "classifier of the student's patch tokens: that of CLS, or one of their own, which starts as its "
        "copy and is dropped after distillation",
        "ours; LV-ViT: own",
    )
    temperature: Positive = setting(1.0, "softmax temperature of the soft token labels", "choice")
    foreground_soft: Share = setting(0.0, "share of the soft label mixed into the pseudo-label", "paper")


class DistillSettings(SettingsBlock):
    """Distillation of the global model."""

    steps: Count = setting(400, "steps of the student")
    batch_size: Count = setting(64, "synthetic images per step")
    lr: Positive = setting(6e-4, "peak learning rate of AdamW, one cycle; FedMITR's only")
    weight_decay: NotNegative = setting(0.05, "weight decay of AdamW", "DeiT")
    start: Literal["average", "initial", "statistics"] = setting(
        "average",
        "what the student starts from: the uploads' average, the initial model, or the initial model with β "
        "times the head of ridge regression on the features that clients sum; needs ensemble.anchor",
        "choice",
    )
    train: Literal["all", "head"] = setting(
        "all", "what of the student is trained: all of it, or its classifier alone", "choice; SMI: head"
    )
    temperature: Positive = setting(1.0, "T of the distillation loss", "choice")
    ce_weight: NotNegative = setting(
        0.0, "λ_ce, weight of the cross-entropy of CLS to the target; FedMITR's only", "choice"
    )
    calibrate: NotNegative = setting(
        0.0,
        "penalty λ of the class offsets that FedMITR adds to the ensemble's logits before it distils them, "
        "fitted to the targets of synthetic views; 0: no offsets",
        "ours",
    )
    token_weight: NotNegative = setting(0.1, "λ_tok, weight of the loss of the patch tokens", "choice")
    background: Literal["keep", "texture"] = setting(
        "keep",
        "pixels of stopped patches in each view: as they are, or new noise with natural images' spectrum",
        "choice",
    )
    views: int = setting(
        8,
        "random views of each image, drawn and labelled by the teacher once; 0: new ones in every step",
        ge=0,
    )
    per_class: int | None = setting(
        None,
        "clients that label a batch of views: so many per class, drawn by shares of the class; none: all. "
        "FedMITR's only; needs ensemble.mode=class",
        ge=1,
    )
    group: int | None = setting(
        None,
        "size of the groups of clients that are first distilled to one model each, which then takes their "
        "place; none: all clients at once. FedMITR's only",
        ge=2,
    )
    augment: Share = setting(1.0, "strength of random scale, rotation and shift of images and masks; 0: none")
    precision: Precision = precision_of("the student's training")


class FuseflSettings(SettingsBlock):
    """FuseFL: the network is trained, uploaded and fused stage by stage."""

    stages: Count = setting(2, "stages that the network is split into, with one exchange each", "FuseFL")
    adaptor: Literal["average", "linear"] = setting(
        "average", "how the clients' features are fused between stages", "FuseFL"
    )
