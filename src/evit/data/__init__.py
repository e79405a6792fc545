"""Data sets as LightningDataModules."""

from evit.data.datasets import FashionMNIST, Folder, auto
from evit.data.module import Images

__all__ = ["FashionMNIST", "Folder", "Images", "auto"]
