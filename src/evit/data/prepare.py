"""A tree of class folders, or ImageNet as it is downloaded, to train.beton and val.beton."""

import re
import shlex
from pathlib import Path
from typing import Any

from evit.data.archives import TarMember
from evit.data.imagenet import Labelled, find_images, require_imagenet, strange_counts
from evit.data.label_maps import label_map_paths, require_label_maps
from evit.data.module import available_cores, require_ffcv


def prepare(
    source: str | Path,
    target: str | Path | None = None,
    num_workers: int | None = None,
    label_maps: str | Path | None = None,
    imagenet: bool = False,
    **options: Any,
) -> Path:
    """Write SOURCE's images to TARGET/train.beton and TARGET/val.beton, and return TARGET.

    A file that is there is kept, and an interrupted one gone on with.

    Args:
        source: train/ and val/ of class folders, or the files of ImageNet (evit.data.imagenet).
        target: a folder; None: SOURCE-ffcv beside SOURCE.
        num_workers: processes; None: one per core.
        label_maps: a folder with a label map for each training image; train.beton will hold them.
        imagenet: refuse other classes than ImageNet-1k's, and warn of other numbers of images.
        **options: evit.data.writer.write_beton's mode, max_resolution, jpeg_quality, skip_bad.

    Raises:
        ValueError: the tree or an image in it is not as it should be. A file that was whole
            before stays.
    """
    require_ffcv()
    from evit.data.writer import write_beton

    source = Path(source).expanduser().resolve()
    folder = Path(target).expanduser() if target else source.with_name(source.name + "-ffcv")
    classes, samples = find_images(source)
    if imagenet:
        require_imagenet(classes, source)
        for warning in strange_counts(classes, samples):
            print(f"warning: {warning}", flush=True)
    maps = None
    if label_maps:
        images = _names(samples["train"], source / "train")
        maps = label_map_paths(images, source / "train", Path(label_maps).expanduser().resolve())
        require_label_maps(maps)
    # The small one first, so that the room for both is known soon.
    for split in "val", "train":
        info = write_beton(
            folder / f"{split}.beton",
            samples[split],
            classes=classes,
            source=f"{source.name}/{split}",
            num_workers=num_workers or available_cores(),
            progress=True,
            label_maps=maps if split == "train" else None,
            **options,
        )
        print(
            f"{folder / split}.beton: {info['num_samples']} images in {info['num_classes']} "
            f"classes, {info['bytes'] / 1e6:.1f} MB, {info['kept_original']} as they were, "
            f"{len(info['skipped'])} left out"
        )
    print(f"Train on them: {train_command(folder, imagenet)}")
    return folder


def train_command(folder: Path, imagenet: bool) -> str:
    """What trains on the files in a folder, to be copied into a shell."""
    if imagenet:
        return f"IMAGENET_DIR={shlex.quote(str(folder))} python src/train.py"
    root = f"data.root={folder}"
    if not re.fullmatch(r"[\w/.+-]+", str(folder)):  # Hydra's quotes, and the shell's around them
        root = shlex.quote("data.root='{}'".format(str(folder).replace("'", "\\'")))
    return f"python src/train.py {root}"


def _names(samples: Labelled, root: Path) -> list[str]:
    """CLASS/NAME of each image, in a folder or not, as paths under root."""
    images = (image for image, _ in samples)
    return [str(root / i.name) if isinstance(i, TarMember) else i for i in images]


def run(cfg: Any) -> None:
    """What src/prepare.py does."""
    prepare(**cfg)
