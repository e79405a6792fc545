"""Pictures of which patches survive, and which become one token."""

from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evit.reducers.tokens import moved

MIN_SIDE = 112  # pixels, of a drawn image
GAP = 8  # pixels between images
FONT = 14  # pixels
FADED = 0.25  # how much of a discarded patch's colour is left, the rest is a checkerboard
SQUARE = 4  # pixels of its squares
MOST = 4  # reductions that are shown; of more, some spread evenly, the last included
LOWEST = 1e-6  # weights below it are shown as it


@torch.no_grad()
def follow(model: Any, images: Tensor) -> tuple[list[str], list[Tensor], Tensor, Tensor]:
    """Follow patches: a title for each place that reduces, the token (B, N) of each patch after it,
    -1 if dropped or fused; the weight (B, N) of each in the final tokens; and the logits."""
    x = model.embed(images)  # not model(), which may be compiled, and would be again
    logits, found = model.classify(x)
    reductions, reducer, tokens = iter(found), model.reducer, model.patch_ids(x)
    n = patches = tokens.shape[1]
    parts_TN = F.pad(torch.eye(n, device=x.device), (0, 0, model.num_prefix_tokens, 0))
    parts_BTN = parts_TN.expand(len(x), -1, -1)
    when, titles, places = "before" if reducer.stage == "input" else "after", [], []
    for block, kept in zip(reducer.at, reducer.kept(n), strict=True):
        if kept < n:
            reduction = next(reductions)
            tokens = moved(reduction, tokens, n)
            tokens[tokens == kept] = -1  # a fused one
            parts_BTN, n = reduction(parts_BTN), kept + reducer.extra
        titles.append(f"{when} block {block + 1}\n{kept} of {patches} tokens")
        places.append(tokens)
    return titles, places, parts_BTN[:, model.num_prefix_tokens :].sum(1), logits


def draw_kept(model: Any, images: Tensor, pixels: Tensor, *classes: list[str]) -> Image.Image:
    """Draw a row for each image: it, its tokens after each reduction, and weights of the rest.

    Discarded patches fade into a checkerboard; those of one token have their mean colour, within an
    edge. Fused ones have a heat map (logarithmic) of their weights. images: (B, 3, H, W), for the
    model; pixels: the same as uint8; classes: names of all, for predictions, and the images'."""
    titles, places, left, logits = follow(model, images)
    large = F.interpolate(pixels.cpu().float(), scale_factor=-(-MIN_SIDE // pixels.shape[-1]))
    columns = {f"{pixels.shape[-1]} x {pixels.shape[-2]} px": large}
    for i in range(count := min(len(places), MOST)):
        at = (i + 1) * len(places) // count - 1
        tokens = places[at].cpu().unflatten(1, model.patch_embed.grid_size)
        columns[titles[at]] = draw_tokens(tokens, large)
    discarded = tokens < 0
    if model.reducer.extra and discarded.any():
        weight = left.float().cpu().view_as(discarded).clamp(LOWEST)
        low, high = weight[discarded].min(), weight[discarded].max()
        share = (weight / low).log() / (1.01 * high / low).log()
        ramp = 2.6 * share[:, None] - torch.arange(3).view(3, 1, 1)  # black, red, yellow, pale
        heat = torch.where(discarded[:, None], 255 * ramp.clamp(0, 1), 225.0)
        columns[f"fused weight\n{low:.1g} to {high:.1g}"] = upsample(heat, large)
    return compose(columns, captions(logits, *classes))


def captions(logits: Tensor, names: list[str] | None = None, truths: Any = ()) -> list[str]:
    """Write the class and the prediction of each image, as far as names are known."""
    best = zip(*(v.tolist() for v in logits.float().softmax(1).max(1)), strict=True)
    said = [f"predicted {names[label]}, {share:.0%}" for share, label in best] if names else []
    return [f"{own}: {text}" for own, text in zip(truths, said, strict=True)] if truths else said


def upsample(values: Tensor, like: Tensor) -> Tensor:
    """Repeat a value per patch (B, C, rows, columns) for each pixel."""
    return F.interpolate(values.float(), size=like.shape[-2:]).to(values.dtype)


def draw_tokens(tokens: Tensor, pixels: Tensor) -> Tensor:
    """Fade patches of images whose token (B, rows, columns) is -1; draw those of one as one."""
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
    down, across = (names.diff(dim=side) != 0 for side in (2, 3))
    edge = F.pad(down, (0, 0, 1, 0)) | F.pad(across, (1, 0))
    return torch.where(edge, 255.0, shown)


def compose(columns: dict[str, Tensor], captions: list[str]) -> Image.Image:
    """Join columns (B, 3, H, W) with their titles, and a caption above each row."""
    cells = torch.stack([*columns.values()], 1)
    cells = F.pad(cells, (0, 0, (FONT + GAP // 2) * bool(captions), 0), value=255)
    grid = torchvision.utils.make_grid(cells.flatten(0, 1), len(columns), GAP, pad_value=255)
    top, width = 2 * FONT + 2 * GAP, cells.shape[-1] + GAP
    grid = F.pad(grid, (0, 0, top, 0), value=255).round().byte()
    picture = torchvision.transforms.functional.to_pil_image(grid)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    for column, title in enumerate(columns):
        at = GAP + column * width + cells.shape[-1] // 2, top + GAP // 2
        draw.multiline_text(at, title, "black", font, anchor="md", align="center")
    for row, caption in enumerate(captions):
        draw.text((GAP, top + GAP + row * (cells.shape[-2] + GAP)), caption, "black", font)
    return picture
