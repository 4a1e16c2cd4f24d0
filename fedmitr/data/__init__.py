"""What is learnt and who holds what: tasks, scenes, image files, partitions. Only clients see it.

`register` makes a data set of image files known by its record: a `TorchvisionSet` or a `FolderSet`.
"""

from . import catalogue
from .image_sets import IMAGE_SETS, FolderSet, Part, TorchvisionSet, register

__all__ = ["IMAGE_SETS", "FolderSet", "Part", "TorchvisionSet", "catalogue", "register"]
