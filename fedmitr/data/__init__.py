"""Tasks, scenes, image files and their partition among clients: the data that no server reads.

`register` adds a data set of image files by its record, a `TorchvisionSet` or a `FolderSet`.
"""

from . import catalogue
from .image_sets import IMAGE_SETS, FolderSet, Part, TorchvisionSet, register

__all__ = ["IMAGE_SETS", "FolderSet", "Part", "TorchvisionSet", "catalogue", "register"]
