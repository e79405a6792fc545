"""The patch embedding, and checks of image sizes."""

from typing import Any

import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn


def check_img_size(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Raise a ValueError unless the image size is a multiple of the patch size."""
    for size, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True):
        if size < patch or size % patch:
            lower = max(size // patch, 1) * patch
            raise ValueError(
                f"img_size {size} is not a multiple of the patch size {patch}: "
                f"take {lower} or {lower + patch}"
            )


def check_images(model: Any, img_size: int) -> None:
    """Raise a ValueError unless the model takes square RGB images of img_size."""
    embed = getattr(model, "patch_embed", None)
    first = getattr(embed, "conv1", getattr(embed, "proj", None))  # LV-ViT's stem, or the patches
    if (channels := getattr(first, "in_channels", 3)) != 3:
        raise ValueError(f"model.in_chans={channels}: images are read as RGB, gray ones too: 3")
    size = getattr(embed, "img_size", None)
    if size not in (None, (img_size, img_size)):
        raise ValueError(f"model.img_size={list(size)}: images are squares, of img_size={img_size}")


class PatchConv2d(nn.Conv2d):
    """Non-overlapping convolution, computed as one matrix product on a GPU.

    Same sum in another order; cuDNN's convolution takes ten times as long on an H200.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Images (B, C, H, W) to patches (B, embed_dim, H / p, W / q)."""
        if not input.is_cuda:
            return super().forward(input)
        return self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """forward() as a matrix product."""
        (p, q), (H, W) = self.kernel_size, input.shape[2:]
        x = input[:, :, : H // p * p, : W // q * q].unflatten(3, (-1, q)).unflatten(2, (-1, p))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
