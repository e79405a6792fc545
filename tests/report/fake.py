"""Folders as runs, evaluations and benchmarks leave them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PACKAGES = dict(torch="2.15.0", timm="1.0.31", lightning="2.6.6", wandb=None)
TIMM = dict(
    evit_deit="evit_deit_small_patch16",
    evit_lvvit="evit_lvvit_s",
    evit_deit_micro="evit_deit_tiny_patch16",
)


def result(
    model: str = "evit_deit",
    keep_rate: float = 0.7,
    fusion: bool = True,
    img_size: int = 224,
    seed: int = 0,
    top1: float = 79.43,
    macs: int = 3032105162,
    data: str = "imagenet",
    num_classes: int = 1000,
    epochs: int = 300,
    checkpoint: str | None = None,
    max_train_images: int | None = None,
    recipe: dict[str, Any] | None = None,
    architecture: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What result.json holds."""
    knobs = dict(keep_rate=keep_rate, fusion=fusion, img_size=img_size)
    size: dict[str, Any] = dict(embed_dim=96) if model.endswith("micro") else {}
    config = knobs | dict(
        name="sweep",
        seed=seed,
        checkpoint=checkpoint,
        pretrained=False,
        model=dict(_target_="evit.models.create_model", model_name=TIMM[model], pretrained=False)
        | knobs
        | size
        | (architecture or {}),
        data=dict(root="/secret/place", seed=seed, img_size=img_size),
        recipe=dict(epochs=epochs, max_train_images=max_train_images, max_val_images=None)
        | dict(lr=1e-3, batch_size=64, shrink_epochs=epochs * (keep_rate < 1))
        | (recipe or {}),
    )
    facts = dict(img_size=img_size, params=22050664, macs_executed=macs, macs=macs)
    facts |= dict(reducer="evit")
    return dict(
        top1=top1,
        top5=95.125,
        loss=0.9,
        train_images_per_s=812.5,
        model=facts | dict(keep_rate=3 * [keep_rate], drop_loc=[3, 6, 9], fusion=fusion),
        data=dict(name=data, num_classes=num_classes),
        choices=dict(model=model, data="imagenet", recipe="deit", experiment=None),
        config=config,
        processes=1,
        precision="bf16-mixed",
        device="CPU (x86_64, 2 threads)",
        seconds=99.5,
        wandb_id="abc",
        commit="0123abc",
        packages=PACKAGES,
        python="3.11.7",
    ) | dict(more)


def fashion(keep_rate: float, top1: float, **changes: Any) -> dict[str, Any]:
    given = dict(model="evit_deit_micro", img_size=28, data="fashion-mnist", num_classes=10)
    given |= dict(epochs=2, macs=int(23_504_580 * (0.4 + 0.6 * keep_rate)))
    return result(keep_rate=keep_rate, top1=top1, **given | changes)


def write(folder: Path, content: dict[str, Any], curves: int = 40) -> Path:
    """A run's folder: result.json, config.json, metrics.jsonl and kept_patches.png."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps(content["config"]))
    rate = content["config"]["keep_rate"]
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(9, 10 * curves, 10):
            done = step / (10 * curves)
            row = dict(step=step, tokens_per_image=196 - 60 * done, lr=1e-3 * (1 - done), epoch=0)
            row |= {"keep_rate": 1 - (1 - rate) * done, "train/loss": 2.3 - done}
            file.write(json.dumps(row) + "\n")
            if step % 100 == 99:
                row = {"val/top1": content["top1"] * done, "val/loss": 2.2 - done, "epoch": 0}
                file.write(json.dumps(row | dict(step=step)) + "\n")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "kept_patches.png")
    return folder


def benchmark(*rows: dict[str, Any]) -> dict[str, Any]:
    """What benchmark.json holds, of one contest at batch 8."""
    given = dict(what="inference", batch_size=8, precision="fp32", compile=False, macs=3032105162)
    given |= dict(compared_with="deit_small_patch16_224 dense img_size=224", dense=False)
    given |= dict(keep_rate=[0.7] * 3, fusion=True, img_size=224, model="evit_deit_small_patch16")
    return dict(rows=[given | row for row in rows], device="CPU (x86_64, 2 threads)")


def evaluation(data: str = "imagenet", num_classes: int = 1000) -> dict[str, Any]:
    """What evaluation.json holds: a trained dense model at three keep rates."""
    rows = [
        dict(keep_rate=3 * [rate], fusion=fusion, selection=None if rate == 1 else "attentive")
        | dict(reducer=None if rate == 1 else "evit", kl=0.0)
        | dict(top1=top1, top5=94.5, loss=0.9, macs=int(4.6e9 * rate), macs_executed=1)
        for rate, fusion, top1 in ((1.0, None, 79.81), (0.7, True, 78.55), (0.5, True, 73.8))
    ]
    return dict(
        settings=rows,
        checkpoint="/secret/place/best.ckpt",
        checkpoint_sha256="abc",
        trained_keep_rate=None,
        model=dict(name="evit_deit", img_size=224, params=22050664),
        data=dict(name=data, num_classes=num_classes),
        config=dict(max_val_images=None, model={}),
    )


def write_all(root: Path) -> Path:
    """Runs on two data sets, one without metrics; a benchmark and an evaluation."""
    for rate, top1 in ((1.0, 79.9), (0.7, 79.43), (0.5, 78.61)):
        write(root / f"keeprate/{rate}", result(keep_rate=rate, top1=top1, macs=int(4.6e9 * rate)))
    for rate, top1 in ((1.0, 84.5), (0.7, 83.9), (0.5, 83.4)):
        for seed in (0, 1):
            content = fashion(rate, top1 + 0.1 * seed, seed=seed)
            write(root / f"fashion/data.root-_secret_place+keep_rate-{rate}+seed-{seed}", content)
    next(root.glob("fashion/*0.5+seed-1")).joinpath("metrics.jsonl").unlink()
    dense = dict(model="deit_small_patch16_224", keep_rate=[1.0] * 3, fusion=None, dense=True)
    (root / "benchmark.json").write_text(
        json.dumps(
            benchmark(
                dense | dict(images_per_s=27.5, ratio=1.0, macs=4603567752),
                dict(images_per_s=41.1, ratio=1.52),
                dict(images_per_s=50.2, ratio=1.9, keep_rate=[0.5] * 3, macs=2310968064),
            )
        )
    )
    (root / "evaluation.json").write_text(json.dumps(evaluation()))
    return root
