"""The plan of a run, as evit.dry_run finds it, for people."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

GPUS = 8  # of the estimate of hours
# What is done to training images, in this order, and the words for it.
AUGMENTATION = dict(
    repeated_augmentations="views of an image in an epoch: {}",
    crop_scale="random resized crop of {} of the area",
    flip="horizontal flip with probability {}",
    rand_augment="RandAugment {}",
    color_jitter="colour jitter {}",
    random_erasing="random erasing with probability {}",
    mix_token="MixToken",
    mixup="mixup, alpha {}",
    cutmix="CutMix, alpha {}",
    mixup_switch_prob="CutMix instead of mixup with probability {}",
    mixup_mode="mixed anew for each {}",
    label_smoothing="label smoothing {}",
)
RATES = dict(lr="lr", backbone_lr="of the backbone", keep_rate="keep rate")
SCHEDULES = dict(
    plain="every step its own lr; cosine after warm-up",
    timm="one lr for each epoch, as timm steps it",
    deit="one lr for each epoch, an epoch late, as DeiT's loop steps it",
)
LOSSES = dict(
    Classification="cross-entropy",
    TokenLabels="cross-entropy of the class token, and of each patch with its token label",
    DynamicTokens="cross-entropy, and DynamicViT's",
)


def show(found: dict[str, Any], title: str) -> None:
    """Print a plan."""
    console = Console(markup=False)
    table = Table(box=box.ROUNDED, show_header=False, title=title, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, text in lines(found):
        table.add_row(name, text)
    console.print(table)
    schedule = found["schedule"]
    names = [name for name in RATES if name in schedule]
    chosen = turning_points(schedule, names)
    width = sum(max(len(RATES[name]), len(at(schedule, 0, [name])[0])) + 2 for name in names) + 7
    rows = -(-len(chosen) // max(1, min(3, (console.width - 2) // width)))
    blocks = [chosen[i : i + rows] for i in range(0, len(chosen), rows)]
    rates = Table(box=box.SIMPLE_HEAD, title="at the beginning of an epoch", title_justify="left")
    for _ in blocks:
        for name in ("epoch", *(RATES[name] for name in names)):
            rates.add_column(name, justify="right", no_wrap=True)
    for i in range(rows):
        cells: list[str] = []
        for block in blocks:
            epoch = block[i : i + 1]
            cells += [text for e in epoch for text in (str(e), *(at(schedule, e, names)))]
        rates.add_row(*cells)
    console.print(rates)


def at(schedule: dict[str, Any], epoch: int, names: list[str]) -> list[str]:
    """The rates of an epoch, as text."""
    texts = []
    for name in names:
        value = schedule[name][epoch]
        if name != "keep_rate":
            texts.append(f"{value:.2e}")
        else:
            texts.append(" ".join(f"{v:.3f}" for v in dict.fromkeys(value)) or "-")
    return texts


def turning_points(schedule: dict[str, Any], names: list[str]) -> list[int]:
    """Every tenth epoch, the last, and those where a rate begins or ceases to move or to rise."""
    last = len(schedule["lr"]) - 1
    chosen = {0, last, *range(0, last, 10)}
    for name in names:
        values = schedule[name]
        trends = [(a > b) - (a < b) for a, b in zip(values, values[1:], strict=False)]
        chosen |= {i + 1 for i in range(len(trends) - 1) if trends[i] != trends[i + 1]}
    return sorted(chosen)


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """A plan as (name, text), for people."""
    data, optimizer, ema = found["data"], found["optimizer"], found["ema"]
    starts = dict(
        random="random weights",
        checkpoint="the checkpoint's weights",
        pretrained="timm's weights of the dense model",
        missing="to be given: checkpoint=PATH, or pretrained=true",
    )
    images = f"{data['name']}: {data['train_images']:,} images of {data['num_classes']} classes, "
    images += f"{data['val_images']:,} to evaluate on"
    groups = "\n".join(
        f"{g['tensors']:,} tensors, {g['parameters']:,} parameters: "
        f"weight decay {g['weight_decay']:g}, lr x {g['lr_scale']:g}"
        for g in optimizer["groups"]
    )
    betas = ", ".join(f"{beta:g}" for beta in optimizer["betas"])
    clip = f"clipped at {optimizer['clip_grad']:g}" if optimizer["clip_grad"] else "not clipped"
    done = [
        AUGMENTATION[name].format(" to ".join(map(str, v)) if isinstance(v, list) else v)
        for name, v in found["augmentation"].items()
    ]
    loss = [f"{name} {value}" for name, value in found["loss"].items() if name != "name"]
    batches = "\n".join(
        f"{b['per_process']} on {b['processes']:>2} process{'es' * (b['processes'] > 1):<2}, "
        f"{b['accumulation']} accumulated"
        for b in found["batches"]
    )
    averaged = "evaluated" if ema["evaluated"] else "kept, not evaluated"
    rows = dict.fromkeys(f"{row['top1']} top-1 ({row['table']})" for row in found["paper"])
    time = "no images/s of the paper to tell from"
    if found["hours"]:
        time = f"about {found['hours']:.0f} h on {GPUS} A100, from the paper's images/s"
    mode = ", in eval mode" if found["train_in_eval_mode"] else ""
    return [
        ("data", images + (", with label maps" if data["label_maps"] else "")),
        ("start", starts[found["start"]]),
        ("epochs", f"{found['epochs']}, each of {found['steps_per_epoch']:,} steps{mode}"),
        ("batch", f"{found['batch_size']} images a step:\n{batches}"),
        ("optimizer", f"{optimizer['name']}, betas {betas}, eps {optimizer['eps']:g}, {clip}"),
        ("parameters", groups),
        ("schedule", SCHEDULES[found["schedule"]["name"]]),
        ("loss", "; ".join([LOSSES[found["loss"]["name"]], *loss])),
        ("augmentation", "\n".join(done)),
        ("drop path", f"{found['drop_path']:g}"),
        ("EMA", f"{ema['decay']:g}, {averaged}" if ema["decay"] else "none"),
        ("the paper", "\n".join(rows) or "has no such row"),
        ("time", time),
    ]
