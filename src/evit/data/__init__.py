"""Data sets as LightningDataModules."""

from evit.data.module import FashionMNIST, Folder, Images, auto

__all__ = ["FashionMNIST", "Folder", "Images", "auto"]
