"""What the server's methods start from: the shared initial model, and the ensemble of the uploads."""

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer

from ..core.machine import device
from ..server.ensemble import Ensemble
from ..settings import Settings
from ..upload import ModelShape, Upload
from ..vision.vit import create_vit


def global_shape(uploads: Sequence[Upload], settings: Settings) -> ModelShape:
    """Return the global model's shape: `model.name`, for the images and classes of the uploads."""
    return uploads[0].shape.model_copy(update={"name": settings.model.name})


def build_ensemble(uploads: Sequence[Upload], settings: Settings) -> Ensemble:
    """Build the ensemble of the uploads, on the global model's patch grid."""
    return Ensemble(uploads, settings.ensemble, like=global_shape(uploads, settings).build()).to(device())


def initial_model(uploads: Sequence[Upload], settings: Settings) -> VisionTransformer:
    """Build the shared model that the clients started from, for the images and classes of the uploads."""
    shape, model = global_shape(uploads, settings), settings.model
    vit = create_vit(
        shape.name,
        shape.num_classes,
        pretrained=model.pretrained,
        checkpoint=model.checkpoint,
        image_size=shape.image_size,
        in_chans=shape.in_chans,
    )
    return vit.to(device())
