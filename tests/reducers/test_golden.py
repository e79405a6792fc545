"""Each method against outputs of its authors' code: logits, surviving patches, what merged."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import evit
from tests.models import golden

NOT_TAKEN = ("dpcknn", "kmedoids", "sit", "patchmerger", "cropr", "tofu")
CASES = sorted(path.stem for path in golden.FOLDER.glob("r_*.npz"))
CASES = [name for name in CASES if name.split("_")[1] not in NOT_TAKEN]
SIZES = "img_size patch_size embed_dim depth num_heads num_classes"


def powers(meta: dict) -> dict[str, Any]:
    """Counts of a single rate as powers of it, rounded down: Top-K's, ATS's and TPS's."""
    n = (meta["img_size"] // meta["patch_size"]) ** 2
    (rate,) = np.atleast_1d(meta["keep_rate"])
    counts = [math.floor(rate**s * n) for s in range(1, len(meta["drop_loc"]) + 1)]
    return dict(counts=counts, at=meta["drop_loc"])


def tome(meta: dict) -> dict[str, Any]:
    r = meta["r"]
    return dict(r=tuple(r["pair"]) if isinstance(r, dict) else r, prop_attn=meta["prop_attn"])


def mctf(meta: dict) -> dict[str, Any]:
    assert meta["one_step_ahead"]
    same = {key: meta[key] for key in ("r", "prop_attn", "tau_sim", "tau_info", "tau_size")}
    return same | dict(at=meta["merge_loc"])


# kind in the file: (name here, options from the file's meta)
TRANSLATED = {
    "ats": ("ats", powers),
    "topk": ("topk", powers),
    "tps_dynamicvit": ("squeeze", lambda meta: powers(meta) | dict(score="predictor")),
    "tome": ("tome", tome),
    "mctf": ("mctf", mctf),
    # The authors' code for timm's ViTs never hands the sizes to the attention.
    "pitome": ("pitome", lambda meta: dict(ratio=meta["ratio"], prop_attn=False)),
    "diffrate": (
        "diffrate",
        lambda meta: dict(prune_counts=meta["prune_kept"], merge_counts=meta["merge_kept"]),
    ),
}


def build(meta: dict) -> Any:
    method, options = TRANSLATED[meta["kind"]]
    model = VisionTransformer(**{key: meta[key] for key in SIZES.split()})
    return evit.reduce(model, method, **options(meta)).eval()


def partition(row: np.ndarray) -> list[int]:
    """Groups numbered by their first patch: equal for equal partitions; -1, dropped, stays."""
    numbers = {-1: -1}
    return [numbers.setdefault(int(group), len(numbers)) for group in row]


def test_there_are_cases_of_every_method():
    assert {golden.load(name)[0]["kind"] for name in CASES} == set(TRANSLATED)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_are_those_of_the_authors_code(name):
    meta, expected = golden.load(name)
    model, images = build(meta), golden.images(meta)
    evit.load_checkpoint(model, {"model": golden.weights(meta)})
    logits, source = model(images, return_source=True)
    worst = np.abs(logits.numpy() - expected["logits"]).max()
    print(f"{name}: logits differ by {worst:.1e} at most")
    assert worst < 1e-4
    torch.testing.assert_close(model(images), logits)
    source = source.numpy()
    if "source" in expected:
        assert [*map(partition, source)] == [*map(partition, expected["source"])]
    if "size" in expected and meta["kind"] != "diffrate":  # whose sizes are weighted by similarity
        tokens = expected["size"].shape[1]
        sizes = [np.bincount(row, minlength=tokens) + np.eye(1, tokens)[0] for row in source]
        np.testing.assert_array_equal(np.sort(sizes), np.sort(expected["size"]))
    if meta["kind"] in ("ats", "topk"):
        _, kept = model(images, return_kept=True)
        places = [key for key in expected if key.startswith("kept_")]
        assert len(kept) == len(places)
        for i, ids in enumerate(kept):
            pairs = zip(ids.tolist(), expected[f"kept_{i}"].tolist(), strict=True)
            assert all(set(a) - {-1} == set(b) - {-1} for a, b in pairs)
        for row, ids in zip(source, kept[-1].tolist(), strict=True):
            assert set(np.flatnonzero(row >= 0)) == set(ids) - {-1}


@pytest.mark.parametrize("name", [name for name in CASES if "_ats_" not in name])
def test_every_block_passes_on_as_many_tokens(name):
    """ATS pads to the most that can stay; the file has the most that did."""
    meta, _ = golden.load(name)
    with torch.device("meta"):
        model = build(meta)
    assert [1 + n for n in model.tokens_per_block()] == meta["tokens"]
