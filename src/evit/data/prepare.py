"""A tree of class folders to train.beton and val.beton."""

import re
from pathlib import Path
from typing import Any

from evit.data.label_maps import label_map_paths, require_label_maps
from evit.data.module import available_cores, require_ffcv
from evit.data.sources import SPLITS, ClassFolders, tree_classes


def prepare(
    source: str | Path,
    target: str | Path | None = None,
    num_workers: int | None = None,
    label_maps: str | Path | None = None,
    **options: Any,
) -> Path:
    """Write SOURCE/train and SOURCE/val to TARGET/train.beton and TARGET/val.beton; return TARGET.

    Args:
        target: a folder; None: SOURCE-ffcv beside SOURCE.
        num_workers: processes; None: one per core.
        label_maps: a folder with a label map for each training image; train.beton will hold them.
        **options: evit.data.writer.write_beton's mode, max_resolution, jpeg_quality, skip_bad.

    Raises:
        ValueError: the tree or an image in it is not as it should be. A file that was whole
            before stays; a half-made one is never left.
    """
    require_ffcv()
    from evit.data.writer import write_beton

    source = Path(source).expanduser().resolve()
    classes = tree_classes(source)
    folder = Path(target).expanduser() if target else source.with_name(source.name + "-ffcv")
    for split in SPLITS:
        samples, maps = ClassFolders(source / split, classes).samples, None
        if label_maps and split == "train":
            images, labels = [path for path, _ in samples], Path(label_maps).expanduser().resolve()
            maps = label_map_paths(images, source / split, labels)
            require_label_maps(maps)
        info = write_beton(
            folder / f"{split}.beton",
            samples,
            classes=classes,
            source=f"{source.name}/{split}",
            num_workers=num_workers or available_cores(),
            progress=True,
            label_maps=maps,
            **options,
        )
        print(
            f"{folder / split}.beton: {info['num_samples']} images in {info['num_classes']} "
            f"classes, {info['bytes'] / 1e6:.1f} MB, {info['kept_original']} as they were, "
            f"{len(info['skipped'])} left out"
        )
    plain = re.fullmatch(r"[\w/.+-]+", str(folder))
    print(
        "Train on them: python src/train.py",
        f"data.root={folder}" if plain else f"\"data.root='{folder}'\"",
    )
    return folder
