"""The data sets of the notebooks: how each is recognised on disk, fetched and read."""

from src.datasets.cifar10 import CIFAR10, Cifar10, load_cifar10
from src.datasets.coco import COCO, coco_mask, load_coco
from src.datasets.photos import PHOTOS, list_photos

__all__ = [
    "CIFAR10",
    "COCO",
    "PHOTOS",
    "Cifar10",
    "coco_mask",
    "list_photos",
    "load_cifar10",
    "load_coco",
]
