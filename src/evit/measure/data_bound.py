"""Is training bound by its data? The loader alone, the model alone, both together."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from evit.data import Images
from evit.measure import steps
from evit.measure.contest import Contestant, Entry, Group, spread
from evit.measure.speed import quartiles, take_turns, warm_up

NOT_BOUND = 0.95  # the share of the model's own speed from which on nothing is said to be lost


def data_bound(
    config: dict[str, Any],
    entry: Entry,
    data: Images,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Images/s of the loader, of training on one batch, and of training on the loader's batches.

    They take turns; a turn with the loader is one pass over the training images, from its start.
    Of batch sizes, precisions and compile the first in the configuration is taken.

    Args:
        data: with such batches, and no more images.
    """
    first: Any = (config[name][0] for name in ("batch_sizes", "precisions", "compile"))
    group = Group("training", *first)
    loader = data.train_dataloader()
    title = f"{entry} on {data.name}, read by {data.backend}: {group}"
    images = len(loader) * group.batch_size
    say(f"{title}; {images} images, {config['repeats']} rounds")
    contestant = Contestant(entry, group, device)

    def load() -> None:
        for _ in batches(data, loader, device):
            pass

    def learn() -> None:
        for pictures, labels in batches(data, loader, device):
            contestant.step.learn(pictures, labels)

    with steps.float32_products(group.precision):
        calls = warm_up(contestant.step, config["min_seconds"], device)
        load()
        turns = [load, contestant.step, learn]
        seconds = take_turns(turns, [1, calls, 1], config["repeats"], device)
    counts = images, group.batch_size, images
    names = "loader alone", "model alone", "both"
    speeds = [count / row for count, row in zip(counts, seconds, strict=True)]
    share = quartiles(speeds[2] / speeds[1])[1]
    return dict(
        title=title,
        images=images,
        rows=[
            dict(name=name) | spread("images_per_s", speed)
            for name, speed in zip(names, speeds, strict=True)
        ],
        share=share,
        verdict=verdict(share, quartiles(speeds[0] / speeds[1])[1]),
    )


def verdict(share: float, loader: float) -> str:
    """What the speeds of training and of the loader, as shares of the model's own, say."""
    if share >= NOT_BOUND:
        found = "Training does not wait for its images"
    elif loader < 1:
        found = "Training waits for its images, which come slower than it would take them"
    else:
        found = "Images come fast enough, but loading takes time from training (the same cores?)"
    return f"{found}: it has {100 * share:.0f} % of the model's own speed."


def compare_readers(
    config: dict[str, Any], img_size: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """FFCV beside torchvision's ImageFolder, on the images of data.root; nothing without one."""
    data = config["data"]
    if not data.get("root"):
        return []
    from evit.measure.loader import time_loaders

    say(f"FFCV and ImageFolder on {data['root']}: {config['repeats']} rounds")
    return time_loaders(
        data["root"], img_size, config["repeats"], config["max_images"], data["num_workers"]
    )


def batches(data: Images, loader: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels, on the device."""
    for images, labels, *_ in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        yield data.on_after_batch_transfer((images, labels), 0)
