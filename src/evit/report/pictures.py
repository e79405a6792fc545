"""Which patches survive, as a picture."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evit import tokens
from evit.models.dynamicvit import DynamicViT
from evit.models.vit import EViT

MIN_SIDE = 112  # pixels: smaller images are enlarged, so that their patches can be seen
GAP = 8  # pixels between images
FONT = 14  # pixels
FADED = 0.25  # how much of a discarded patch's colour is left, the rest is white
LOWEST = 1e-6  # weights below it are shown as it
# From little to much, over a logarithmic scale.
HEAT = (
    (20, 11, 52),
    (101, 21, 110),
    (188, 55, 84),
    (241, 105, 19),
    (252, 180, 26),
    (252, 255, 164),
)


@torch.no_grad()
def follow(model: EViT, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The ids of the surviving patches, and what is left of each patch in the end.

    Both are of the model as it evaluates.

    Returns: `kept` of model(images, return_kept=True), and (B, P): 1 for a patch that survives; for
    another the weight with which it has entered the last fused tokens, that is the product of its
    score and those of the fused tokens that it was in; without fusion 0.
    """
    parts = torch.eye(model.patch_embed.num_patches, device=images.device)
    parts_BNP = parts.expand(len(images), -1, -1)  # of each patch in each token

    def observe(score_BN: Tensor, index_BK: Tensor) -> None:
        nonlocal parts_BNP
        parts_BNP = tokens.reorganize(parts_BNP, score_BN, index_BK, model.fusion)

    was_training = model.training
    model.eval().observer = observe
    try:
        # Not model(), which may be compiled, and would be again for these few images.
        _, kept = model.forward(images, return_kept=True)
    finally:
        model.train(was_training).observer = None
    return kept, parts_BNP.sum(1)


def kept_mask(model: EViT, ids: Tensor) -> Tensor:
    """Where of the grid the patches survive, (B, rows, columns), from ids (B, k)."""
    rows, columns = model.patch_embed.grid_size
    mask = torch.zeros(len(ids), rows * columns + 1, dtype=torch.bool, device=ids.device)
    mask.scatter_(1, ids + 1, True)  # column 0 takes the fused tokens' -1
    return mask[:, 1:].unflatten(1, (rows, columns))


def draw_kept(model: EViT, images: Tensor, pixels: Tensor) -> Image.Image:
    """A row per image: the image, what survives each reorganization, and weights of the rest.

    Discarded patches are faded. The last column, of models that fuse, is a heat map of the weight
    with which each patch has entered the fused tokens, on a logarithmic scale; in it the patches
    that survive are gray.

    Args:
        images: what the model takes, (B, 3, H, W).
        pixels: the same as uint8, for drawing.
    """
    kept, left_BP = follow(model, images)
    masks = [kept_mask(model, ids) for ids in kept]
    pixels = pixels.cpu()
    zoom = -(-MIN_SIDE // pixels.shape[-1])
    columns, titles = [pixels.float()], [f"{pixels.shape[-1]} x {pixels.shape[-2]} px"]
    for mask in masks:
        shown = upsample(mask[:, None].float().cpu(), pixels)
        columns.append((pixels * shown + 255 * (1 - shown)) * (1 - FADED) + pixels * FADED)
    when = "before" if isinstance(model, DynamicViT) else "after"
    patches = model.patch_embed.num_patches
    titles += [
        f"{when} block {i + 1}\n{ids.shape[1]} of {patches} tokens"
        for i, ids in zip(model.drop_loc, kept, strict=True)
    ]
    discarded = ~masks[-1] if masks else torch.zeros(0, dtype=torch.bool)
    scale = None
    if model.fusion and discarded.any():
        weight = left_BP.float().view_as(discarded).clamp(LOWEST)
        scale = spread(weight[discarded].min().item(), weight[discarded].max().item())
        colours = heat(weight.cpu().log10(), *map(math.log10, scale))
        colours = torch.where(discarded[:, None].cpu(), colours, 225.0)
        columns.append(upsample(colours, pixels))
        titles.append("weight in\nfused tokens")
    cells = F.interpolate(torch.stack(columns, 1).flatten(0, 1), scale_factor=zoom)
    return compose(cells.unflatten(0, (len(pixels), len(columns))), titles, scale)


def upsample(values: Tensor, like: Tensor) -> Tensor:
    """A value per patch (B, C, rows, columns) to one per pixel."""
    return F.interpolate(values, size=like.shape[-2:], mode="nearest")


def spread(low: float, high: float) -> tuple[float, float]:
    """The ends of the colour scale: not the same where all weights are."""
    return (low, high) if high > 1.01 * low else (low / 2, high * 2)


def heat(values: Tensor, low: float, high: float) -> Tensor:
    """Colours (B, 3, ...) of values (B, ...), from 0 to 255."""
    table = torch.tensor(HEAT).float()
    place = ((values - low) / (high - low)).clamp(0, 1) * (len(HEAT) - 1)
    below = place.floor().long().clamp(max=len(HEAT) - 2)
    share = (place - below)[..., None]
    return (table[below] * (1 - share) + table[below + 1] * share).movedim(-1, 1)


def compose(cells: Tensor, titles: Sequence[str], scale: tuple[float, float] | None) -> Image.Image:
    """The cells (rows, columns, 3, H, W) with titles above them and, with a scale, a colour bar."""
    cells = F.pad(cells, (0, GAP, 0, GAP), value=255.0)
    grid = cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    height, width = cells.shape[-2:]
    top, bar = 2 * FONT + 3 * GAP, 8 * FONT if scale else 0
    size = (GAP + grid.shape[1] + bar, top + grid.shape[0])
    picture = Image.new("RGB", size, "white")
    picture.paste(Image.fromarray(grid.round().byte().numpy()), (GAP, top))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    for column, title in enumerate(titles):
        x = GAP + column * width + (width - GAP) // 2
        draw.multiline_text((x, top - GAP // 2), title, "black", font, anchor="md", align="center")
    if scale:
        left, length = GAP + grid.shape[1], min(grid.shape[0] - GAP, 4 * MIN_SIDE)
        values = torch.linspace(1, 0, length)[None, :, None]
        colours = heat(values, 0, 1)[0].expand(-1, -1, FONT)
        picture.paste(Image.fromarray(colours.permute(1, 2, 0).byte().numpy()), (left, top))
        low, high = map(math.log10, scale)
        for place in torch.linspace(0, 1, 5).tolist():
            y = top + (1 - place) * (length - 1)
            text = f"{10 ** (low + place * (high - low)):.1g}"
            draw.text((left + FONT + GAP, y), text, "black", font, anchor="lm")
    return picture
