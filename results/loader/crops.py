"""How far crops are from those of a whole decode, or PIL's: python results/loader/crops.py DIR"""

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from evit.config import Recipe
from evit.data import Folder
from evit.data.folders import SPLITS
from evit.data.module import require_ffcv
from evit.data.order import choose_samples

PAIRS = ("decoded in part", "decoded whole"), ("Pillow bilinear", "Pillow bicubic")


def crop_differences(
    root: str | Path, img_size: int = 224, max_images: int | None = None
) -> list[dict[str, Any]]:
    """Compare training's crops of JPEGs with the same of a whole decode, one random crop of each
    image of ROOT/train/CLASS/*.jpg or ROOT/CLASS/*.jpg; and two of Pillow's filters as a measure.

    Returns:
        A row for each pair of ways, and for each fraction of the size at which training decodes:
        `decoded_at` 1, 1/2, 1/4 or 1/8; `pair`; `crops`, how many; `grey_levels`, the mean absolute
        difference of a crop on the scale of 255, the median over the crops; `psnr`, likewise, in
        dB, infinite for equal crops.
    """
    require_ffcv()
    root = Path(root).expanduser()
    folder = ImageFolder(str(root / SPLITS[0] if (root / SPLITS[0]).is_dir() else root))
    found: dict[tuple[int, tuple[str, str]], list[tuple[float, float]]] = {}
    for seed in choose_samples(len(folder), max_images):
        shrink, ways = _crops(Path(folder.samples[seed][0]).read_bytes(), img_size, int(seed))
        for pair in PAIRS if ways else ():
            error = ways[pair[0]].astype(float) - ways[pair[1]]
            with np.errstate(divide="ignore"):
                psnr = 10 * np.log10(255**2 / np.square(error).mean())
            found.setdefault((shrink, pair), []).append((np.abs(error).mean(), psnr))
    rows = []
    for (shrink, pair), differences in sorted(found.items()):
        grey_levels, psnr = np.median(differences, axis=0).tolist()
        at = "1" if shrink == 1 else f"1/{shrink}"
        row = {"decoded_at": at, "pair": " against ".join(pair), "crops": len(differences)}
        rows.append(row | {"grey_levels": grey_levels, "psnr": psnr})
    return rows


def evaluation_differences(
    root: str | Path, img_size: int = 224, crop_pct: float = 0.875
) -> dict[str, float]:
    """How far the images of an evaluation with data.backend=ffcv, and those of PIL's bilinear
    filter, are from the published protocol's (data.backend=imagefolder: PIL, bicubic): the root of
    the mean squared difference of an image's pixels, in grey levels of 255, the median over
    ROOT/val/CLASS/*.jpg.
    """
    images: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as cache_dir:
        for backend in "imagefolder", "ffcv":
            options: Any = dict(cache_dir=cache_dir, num_workers=0, splits=["val"])
            recipe = Recipe(epochs=1, lr=1, batch_size=64, crop_pct=crop_pct)
            data = Folder(root, img_size=img_size, recipe=recipe, backend=backend, **options)
            data.prepare_data()
            data.setup()
            images[backend] = torch.cat([batch[0] for batch in data.val_dataloader()])
    resize = T.Resize(int(img_size / crop_pct), T.InterpolationMode.BILINEAR)
    bilinear = T.Compose([resize, T.CenterCrop(img_size), T.PILToTensor()])
    folder = ImageFolder(str(Path(root).expanduser() / "val"), bilinear)
    images["PIL bilinear"] = torch.stack([image for image, _ in folder])
    published = images.pop("imagefolder").float()
    return {
        name: float((found - published).square().mean((1, 2, 3)).sqrt().median())
        for name, found in images.items()
    }


def _crops(data: bytes, img_size: int, seed: int) -> tuple[int, dict[str, np.ndarray]]:
    """The fraction's denominator, and (img_size, img_size, 3) by each way; none if not a JPEG."""
    from evit.data.ffcv.decode import crop_image, decode_jpeg, random_crops

    image = Image.open(io.BytesIO(data))
    size = image.height, image.width
    whole = decode_jpeg(data, *size) if image.format == "JPEG" else None
    if whole is None:
        return 1, {}
    height_1, width_1 = (np.array([side]) for side in size)
    scale, ratio = np.array([0.08, 1.0]), np.array([3 / 4, 4 / 3])
    boxes, _ = random_crops(height_1, width_1, np.array([seed], np.uint32), scale, ratio, 0.0)
    box = boxes[0]
    top, left, height, width = box.tolist()
    ways = {name: np.empty((img_size, img_size, 3), np.uint8) for name in PAIRS[0]}
    jpeg, pixels = np.frombuffer(data, np.uint8), np.ascontiguousarray(whole).reshape(-1)
    crop_image(jpeg, True, size, box, False, True, ways["decoded in part"])
    crop_image(pixels, False, size, box, False, False, ways["decoded whole"])
    cut = image.convert("RGB").crop((left, top, left + width, top + height))
    filters = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
    for name, resample in zip(PAIRS[1], filters, strict=True):
        ways[name] = np.asarray(cut.resize((img_size, img_size), resample))
    enough = min(height, width) // (2 * img_size)
    return max(s for s in (1, 2, 4, 8) if s <= max(enough, 1)), ways


if __name__ == "__main__":
    for size in 224, 64, 32, 16:
        print(size, *crop_differences(sys.argv[1], size), sep="\n")
    for size, crop_pct in (224, 0.875), (224, 1.0), (384, 1.0):
        print(size, crop_pct, evaluation_differences(sys.argv[1], size, crop_pct))
