"""Which patches survive, as a picture."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evit.models.vit import EViT

MIN_SIDE = 112  # pixels: smaller images are enlarged, so that their patches can be seen


@torch.no_grad()
def draw_kept(model: EViT, images: Tensor, pixels: Tensor) -> Tensor:
    """A row per image: the image, then its surviving patches after each reorganization.

    The discarded patches are faded.

    Args:
        images: what the model takes, (B, 3, H, W).
        pixels: the same as uint8, for drawing.

    Returns:
        uint8 (3, height, width), on the CPU.
    """
    was_training = model.training
    _, kept = model.eval()(images, return_kept=True)
    model.train(was_training)
    grid = model.patch_embed.grid_size
    columns = [pixels.float()]
    for ids in kept:
        mask = torch.zeros(len(images), grid[0] * grid[1] + 1, device=images.device)
        mask.scatter_(1, ids + 1, 1.0)  # column 0 takes the fused tokens' -1
        mask = mask[:, 1:].reshape(-1, 1, *grid)
        mask = F.interpolate(mask, size=pixels.shape[-2:], mode="nearest")
        columns.append(pixels * (0.25 + 0.75 * mask) + 255 * 0.75 * (1 - mask))
    zoom = -(-MIN_SIDE // pixels.shape[-1])
    cells = torch.stack([F.interpolate(c, scale_factor=zoom) for c in columns], 1)
    cells = F.pad(cells, (4, 4, 4, 4), value=255.0)
    rows = cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return rows.round().to(torch.uint8).cpu()
