"""Which patches survive, and which become one token, as a picture."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MIN_SIDE = 112  # pixels: smaller images are enlarged, so that their patches can be seen
GAP = 8  # pixels between images
FONT = 14  # pixels
FADED = 0.25  # how much of a discarded patch's colour is left, the rest is white
MOST = 4  # reductions that are shown; of more, some spread evenly, the last included
EDGE = 255.0  # the colour of edges between merged tokens
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


class Followed(NamedTuple):
    """Where the P patches of B images go."""

    titles: list[str]  # of the places that reduce
    tokens: list[Tensor]  # (B, P) for each place: the token a patch is in; -1: dropped or fused
    left: Tensor  # (B, P): the weight of each patch in the final tokens; 1 if it survives, 0 if not


@torch.no_grad()
def follow(model: Any, images: Tensor) -> Followed:
    """Follow the patches of images through the reductions of a model in evaluation mode."""
    was_training = model.training
    model.eval()
    try:  # not model(), which may be compiled, and would be again for these few images
        x = model.embed(images)
        _, reductions = model.encode(x)
    finally:
        model.train(was_training)
    reducer, P, tokens = model.reducer, model.num_prefix_tokens, model.patch_ids(x)
    patches = n = tokens.shape[1]
    parts_BTN = F.pad(torch.eye(n, device=x.device), (0, 0, P, 0)).expand(len(x), -1, -1)
    when, left, found = "before" if reducer.stage == "input" else "after", iter(reductions), []
    titles = []
    for block, kept in zip(reducer.at, reducer.kept(n), strict=True):
        if kept < n:
            reduction = next(left)
            hosts = reduction.hosts(n)
            if reduction.rest_BN is not None:  # the last token is the fused one
                hosts = torch.where(hosts == kept, -1, hosts)
            tokens = torch.where(tokens < 0, -1, hosts.gather(1, tokens.clamp(0)))
            parts_BTN, n = reduction(parts_BTN), kept + reducer.extra
        titles.append(f"{when} block {block + 1}\n{kept} of {patches} tokens")
        found.append(tokens)
    return Followed(titles, found, parts_BTN[:, P:].sum(1))


def draw_kept(model: Any, images: Tensor, pixels: Tensor) -> Image.Image:
    """A row per image: the image, its tokens after each reduction, and weights of the rest.

    Discarded patches are faded. Patches that have become one token have their mean colour, within
    an edge. For reducers that fuse, the last column is a heat map of the weight with which each
    patch has entered the fused tokens, on a logarithmic scale; patches that survive are gray in it.

    Args:
        images: what the model takes, (B, 3, H, W).
        pixels: the same as uint8, for drawing.
    """
    found, grid = follow(model, images), model.patch_embed.grid_size
    tokens = [place.cpu().unflatten(1, grid) for place in found.tokens]
    large = pixels.cpu().float()
    large = F.interpolate(large, scale_factor=-(-MIN_SIDE // pixels.shape[-1]))
    columns, titles = [large], [f"{pixels.shape[-1]} x {pixels.shape[-2]} px"]
    count = min(len(tokens), MOST)
    for i in range(count):
        place = (i + 1) * len(tokens) // count - 1
        columns.append(draw_tokens(tokens[place], large))
        titles.append(found.titles[place])
    discarded = tokens[-1] < 0 if tokens else torch.zeros(0, dtype=torch.bool)
    scale = None
    if model.reducer.extra and discarded.any():
        weight = found.left.float().cpu().view_as(discarded).clamp(LOWEST)
        scale = spread(weight[discarded].min().item(), weight[discarded].max().item())
        colours = heat(weight.log10(), *map(math.log10, scale))
        colours = torch.where(discarded[:, None], colours, 225.0)
        columns.append(upsample(colours, large))
        titles.append("weight in\nfused tokens")
    return compose(torch.stack(columns, 1), titles, scale)


def draw_tokens(tokens: Tensor, pixels: Tensor) -> Tensor:
    """Images (B, 3, H, W), faded where a patch has no token, in mean colours where some share one.

    Args:
        tokens: (B, rows, columns), the token of each patch, -1 for none.
    """
    grid, none = tokens.shape[1:], upsample(tokens[:, None] < 0, pixels)
    shown = torch.where(none, pixels * FADED + 255 * (1 - FADED), pixels)
    member_BPK = F.one_hot(tokens.flatten(1) + 1)[..., 1:].float()
    size_B1K = member_BPK.sum(1, keepdim=True)
    shared = ((member_BPK * size_B1K).sum(2) > 1).view_as(tokens)
    if not shared.any():
        return shown
    patches_B3P = F.adaptive_avg_pool2d(pixels, (grid[0], grid[1])).flatten(2)
    means_B3P = (patches_B3P @ member_BPK / size_B1K.clamp(1)) @ member_BPK.mT
    colours = upsample(means_B3P.unflatten(2, grid), pixels)
    shown = torch.where(upsample(shared[:, None], pixels), colours, shown)
    names, edge = upsample(tokens[:, None], pixels), torch.zeros_like(none)
    edge[:, :, 1:] |= names[:, :, 1:] != names[:, :, :-1]
    edge[..., 1:] |= names[..., 1:] != names[..., :-1]
    return torch.where(edge, EDGE, shown)


def upsample(values: Tensor, like: Tensor) -> Tensor:
    """A value per patch (B, C, rows, columns) to one per pixel."""
    return F.interpolate(values.float(), size=like.shape[-2:], mode="nearest").to(values.dtype)


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
