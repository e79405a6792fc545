"""Outputs of the authors' code, and the weights and images that gave them."""

import json
from pathlib import Path

import numpy as np
import torch

import evit.models

FOLDER = Path(__file__).parents[1] / "golden"


def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """(meta, arrays): what the model was, and its logits and kept patches."""
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    return json.loads(str(arrays.pop("meta"))), arrays


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def weights(meta: dict) -> dict[str, torch.Tensor]:
    """The authors' state dict: entries filled in sorted order from one generator."""
    g, filled = generator(meta["seed"]), {}
    for name, shape in sorted(dict(meta["state_dict"]).items()):
        if name.endswith("num_batches_tracked"):
            filled[name] = torch.tensor(0)
            continue
        z = g.standard_normal(shape, dtype=np.float32)
        if name.endswith("running_var"):
            value = 1 + 0.1 * abs(z)
        elif name in ("pos_embed", "cls_token"):
            value = 0.2 * z
        elif len(shape) == 1:
            value = 1 + 0.1 * z if name.endswith("weight") else 0.02 * z
        else:
            value = z * np.float64(np.prod(shape[1:])) ** -0.5
        filled[name] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return filled


def images(meta: dict) -> torch.Tensor:
    shape = (meta["batch"], 3, meta["img_size"], meta["img_size"])
    return torch.from_numpy(generator(meta["seed"] + 1).standard_normal(shape, dtype=np.float32))


@torch.no_grad()
def compare(model: torch.nn.Module, name: str) -> tuple[float, bool]:
    """Given a case's weights: how far its logits are, and whether the same patches are kept."""
    meta, expected = load(name)
    evit.load_checkpoint(model.eval(), {"model": weights(meta)})
    logits, kept = model(images(meta).to(next(model.parameters()).device), return_kept=True)
    apart = np.abs(logits.float().cpu().numpy() - expected["logits"]).max()
    same = [
        np.array_equal(np.sort(ids.cpu().numpy(), 1), np.sort(expected[f"kept_{i}"], 1))
        for i, ids in enumerate(kept)
        if f"kept_{i}" in expected
    ]
    return float(apart), all(same)


def table(cases: list[str], device: torch.device) -> list[dict]:
    """For each case the largest difference of the logits, and whether the patches are the same."""
    rows = []
    for case in cases:
        meta, _ = load(case)
        kind = "evit_lvvit_s" if "lvvit" in case else "evit_deit_small_patch16"
        names = ("img_size", "num_classes", "keep_rate", "fusion", "embed_dim", "num_heads")
        model = evit.models.create_model(kind, **{name: meta[name] for name in names}).to(device)
        apart, same = compare(model, case)
        with torch.autocast(device.type, torch.bfloat16):
            low, _ = compare(model, case)
        rows.append(dict(case=case, float32=f"{apart:.1e}", bf16=f"{low:.1e}", same_patches=same))
    return rows


def assert_agrees(model: torch.nn.Module, name: str) -> None:
    """The model, given the case's weights, has its logits to 1e-4 and keeps its patches."""
    apart, same = compare(model, name)
    assert apart < 1e-4 and same
