"""Data sets as LightningDataModules."""

from evit.data.datasets import CIFAR10, CIFAR100, FashionMNIST, Folder, auto
from evit.data.module import Images

__all__ = ["CIFAR10", "CIFAR100", "FashionMNIST", "Folder", "Images", "auto"]
