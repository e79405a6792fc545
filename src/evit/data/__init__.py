"""Images: data sets, both backends of their loaders, augmentation."""

from evit.data.module import Downloaded, FashionMNIST, Folder, Images, auto

__all__ = ["Downloaded", "FashionMNIST", "Folder", "Images", "auto"]
