"""The data sets of the notebooks: how each is recognised on disk, fetched and read."""

from src.datasets.cifar10 import CIFAR10, Cifar10, load_cifar10
from src.datasets.coco import COCO, coco_mask, load_coco
from src.datasets.photos import PHOTOS, list_photos

__all__ = [
    *("CIFAR10", "Cifar10", "load_cifar10"),
    *("COCO", "coco_mask", "load_coco"),
    *("PHOTOS", "list_photos"),
]
