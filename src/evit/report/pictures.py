"""Pictures of which patches survive, and which become one token."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from evit.models.follow import moved

MIN_SIDE = 112  # pixels, of a drawn image
GAP = 8  # pixels between images
FONT = 14  # pixels
FADED = 0.25  # how much of a discarded patch's colour is left, the rest is a checkerboard
SQUARE = 4  # pixels of its squares
MOST = 4  # reductions that are shown; of more, some spread evenly, the last included


@torch.no_grad()
def follow(model: Any, images: Tensor) -> tuple[list[str], list[Tensor], Tensor]:
    """Follow the patches of images through the reductions of a model in evaluation mode.

    Returns:
        A title for each place that reduces; the token (B, N) that each patch is in after it, -1 if
        it was dropped or fused; and the logits.
    """
    x = model.embed(images)  # not model(), which may be compiled, and would be again
    logits, found = model.classify(x)
    reductions, reducer, tokens = iter(found), model.reducer, model.patch_ids(x)
    patches = n = tokens.shape[1]
    when, titles, places = "before" if reducer.stage == "input" else "after", [], []
    for block, kept in zip(reducer.at, reducer.kept(n), strict=True):
        if kept < n:
            reduction = next(reductions)
            tokens = moved(reduction, tokens, n)
            if reduction.rest_BN is not None:  # the last token is the fused one
                tokens = torch.where(tokens == kept, -1, tokens)
            n = kept + reducer.extra
        titles.append(f"{when} block {block + 1}\n{kept} of {patches} tokens")
        places.append(tokens)
    return titles, places, logits


def draw_kept(model: Any, images: Tensor, pixels: Tensor, *classes: list[str]) -> Image.Image:
    """Draw a row for each image: the image, then its tokens after each reduction.

    Discarded patches fade into a checkerboard. Patches that have become one token have their mean
    colour, within an edge.

    Args:
        images: the model's input, (B, 3, H, W).
        pixels: the same as uint8, for drawing.
        classes: the names of all classes, to write predictions, and those of the images.
    """
    titles, places, logits = follow(model, images)
    # Small images are enlarged, so that their patches can be seen.
    large = F.interpolate(pixels.cpu().float(), scale_factor=-(-MIN_SIDE // pixels.shape[-1]))
    count, grid = min(len(places), MOST), model.patch_embed.grid_size
    shown = [(i + 1) * len(places) // count - 1 for i in range(count)]
    tokens = [places[i].cpu().unflatten(1, grid) for i in shown]
    cells = torch.stack([large, *(draw_tokens(found, large) for found in tokens)], 1)
    size = f"{pixels.shape[-1]} x {pixels.shape[-2]} px"
    return compose(cells, [size, *(titles[i] for i in shown)], captions(logits, *classes))


def captions(logits: Tensor, names: Sequence[str] = (), truths: Sequence[str] = ()) -> list[str]:
    """Write the class and the prediction of each image, as far as names are known."""
    best = zip(*(v.tolist() for v in logits.float().softmax(1).max(1)), strict=True)
    said = [f"predicted {names[label]}, {share:.0%}" for share, label in best] if names else []
    return [f"{own}: {text}" for own, text in zip(truths, said, strict=True)] if truths else said


def draw_tokens(tokens: Tensor, pixels: Tensor) -> Tensor:
    """Fade the patches of images (B, 3, H, W) without a token; draw those of one token as one.

    Args:
        tokens: (B, rows, columns), the token of each patch, -1 for none.
    """
    none, names = upsample(tokens[:, None] < 0, pixels), upsample(tokens[:, None], pixels)
    rows, columns = (torch.arange(side) // SQUARE % 2 for side in pixels.shape[-2:])
    board = torch.where(rows[:, None] == columns, 255.0, 170.0)
    shown = torch.where(none, pixels * FADED + board * (1 - FADED), pixels)
    member_BPK = F.one_hot(tokens.flatten(1) + 1)[..., 1:].float()
    size_B1K = member_BPK.sum(1, keepdim=True)
    shared = ((member_BPK * size_B1K).sum(2) > 1).view_as(tokens)
    if not shared.any():
        return shown
    grid: Any = tokens.shape[1:]
    patches_B3P = F.adaptive_avg_pool2d(pixels, grid).flatten(2)
    means_B3P = (patches_B3P @ member_BPK / size_B1K.clamp(1)) @ member_BPK.mT
    means = upsample(means_B3P.unflatten(2, grid), pixels)
    shown = torch.where(upsample(shared[:, None], pixels), means, shown)
    edge = torch.zeros_like(none)
    edge[:, :, 1:] |= names[:, :, 1:] != names[:, :, :-1]
    edge[..., 1:] |= names[..., 1:] != names[..., :-1]
    return torch.where(edge, 255.0, shown)


def upsample(values: Tensor, like: Tensor) -> Tensor:
    """Repeat a value per patch (B, C, rows, columns) for each pixel."""
    return F.interpolate(values.float(), size=like.shape[-2:], mode="nearest").to(values.dtype)


def compose(cells: Tensor, titles: list[str], captions: list[str]) -> Image.Image:
    """Join cells (rows, columns, 3, H, W), with a title per column and a caption per row."""
    cells = F.pad(cells, (0, 0, (FONT + GAP // 2) * bool(captions), 0), value=255)
    grid = make_grid(cells.flatten(0, 1), len(titles), padding=GAP, pad_value=255)
    top, width = 2 * FONT + 2 * GAP, cells.shape[-1] + GAP
    picture = to_pil_image(F.pad(grid, (0, 0, top, 0), value=255).round().byte())
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    for column, title in enumerate(titles):
        at = GAP + column * width + cells.shape[-1] // 2, top + GAP // 2
        draw.multiline_text(at, title, "black", font, anchor="md", align="center")
    for row, caption in enumerate(captions):
        draw.text((GAP, top + GAP + row * (cells.shape[-2] + GAP)), caption, "black", font)
    return picture
