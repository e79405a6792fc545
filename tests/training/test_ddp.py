"""Two processes on the CPU train as one, at the same number of images per step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evit import training
from tests.conftest import ROOT
from tests.training.two_processes import EVIT, evaluate, record

STEPS = 6  # of 4 images, in 2 epochs


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def two(root, shared_photos) -> list[dict]:
    """What each of two processes recorded, with 2 batches of 1 image per step in each."""
    folder = root / "two"
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    script = ["-m", "tests.training.two_processes", f"data.root={shared_photos}"]
    done = subprocess.run(
        [*command, *script],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "IMAGENET_DIR"}
    return kept | dict(PYTHONPATH=f"{ROOT / 'src'}:{ROOT}")


@pytest.fixture(scope="module")
def one(root, shared_photos) -> list[dict]:
    """What one process recorded, with a batch of 4 images per step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("IMAGENET_DIR", raising=False)
        folder = root / "one"
        folder.mkdir()
        patch.chdir(folder)
        return record([*EVIT, f"data.root={shared_photos}"], patch)


def result(folder: Path, name: str = "evit") -> dict:
    (path,) = folder.glob(f"outputs/{name}/*/result.json")
    return json.loads(path.read_text())


def test_the_shards_are_disjoint_and_together_the_steps_of_one_process(one, two):
    assert len(one) == STEPS
    for i, batch in enumerate(one):
        shares = [rank["evit"][2 * i + half]["images"] for half in range(2) for rank in two]
        assert [len(share) for share in shares] == [1] * 4
        assert sorted(sum(shares, [])) == pytest.approx(sorted(batch["images"]), abs=1e-6)
    seen = [image for rank in two for batch in rank["evit"][:STEPS] for image in batch["images"]]
    assert len(set(seen)) == len(seen) == 12  # each training image once in an epoch


def test_the_losses_and_the_weights_are_those_of_one_process(one, two, root):
    for i, batch in enumerate(one):
        losses = [rank["evit"][2 * i + half]["loss"] for half in range(2) for rank in two]
        assert sum(losses) / 4 == pytest.approx(batch["loss"], abs=1e-5)
    found = []
    for name in ("one", "two"):
        (path,) = root.glob(f"{name}/outputs/evit/*/checkpoints/last.ckpt")
        weights = torch.load(path, weights_only=True)["state_dict"]
        for key, value in weights.items():
            if key.endswith("qkv.bias"):
                # The keys' has no gradient but rounding errors, which AdamW takes for one.
                value.chunk(3)[1].zero_()
        found.append(weights)
    apart = torch.cat([(found[0][k] - found[1][k]).abs().flatten() for k in found[0]])
    # AdamW also makes steps of the rounding errors of a few gradients that are almost zero.
    assert (apart > 1e-5).float().mean() < 1e-4 and apart.max() < 1e-3


def test_each_validation_image_counts_once(one, two, root):
    results = [result(root / name) for name in ("one", "two")]
    assert [r["processes"] for r in results] == [1, 2]
    for name in ("top1", "top5", "loss"):
        assert results[0][name] == pytest.approx(results[1][name], abs=1e-4)


def test_a_process_without_an_image_to_evaluate_waits_for_the_others(two, root):
    assert 0 < result(root / "two", "lvvit")["loss"] < 10
    assert result(root / "two", "lvvit")["top5"] == 100  # of one image


def test_two_processes_evaluate_one_image_as_one_does(two, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate(root / "two", monkeypatch, "trainer=cpu")
    found = []
    for folder in (tmp_path, root / "two"):
        (path,) = folder.glob("outputs/evaluation/*/evaluation.json")
        found.append(json.loads(path.read_text()))
    assert [evaluation["processes"] for evaluation in found] == [1, 2]
    for one, both in zip(*(evaluation["settings"] for evaluation in found), strict=True):
        assert one["images"] == both["images"] == 1
        for name in ("top1", "top5", "loss"):
            assert one[name] == pytest.approx(both[name], abs=1e-4)


def test_the_processes_agree_on_the_model_and_not_on_the_augmentation(two):
    for first, second in zip(*(rank["evit"] for rank in two), strict=True):
        assert first["weights"] == pytest.approx(second["weights"], abs=1e-9)
        assert first["keep_rate"] == second["keep_rate"]
        assert first["seed"] != second["seed"]
    rates = [batch["keep_rate"][0] for batch in two[0]["evit"]]
    assert rates[0] == 1 and rates[0] > rates[2] > rates[4] > rates[-1] == 0.7
    assert rates[0::2] == rates[1::2]  # one for all batches of a step


def test_gradients_are_exchanged_once_per_step(two):
    for rank in two:
        counts = [batch["reductions"] for batch in rank["evit"]]
        assert counts[0::2] == [0] * STEPS and min(counts[1::2]) >= 1


def test_the_loss_that_is_logged_is_the_mean_of_the_processes(two, root):
    (path,) = root.glob("two/outputs/evit/*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    logged = [row["train/loss"] for row in rows if "train/loss" in row]
    last = zip(*(rank["evit"][1::2] for rank in two), strict=True)
    assert logged == pytest.approx([(a["loss"] + b["loss"]) / 2 for a, b in last], abs=1e-6)


def test_one_process_prints(two, root):
    shown = (root / "two/stdout").read_text()
    assert shown.count("epoch 2/2  train") == 2 and shown.count("  top-5 ") == 2  # runs


LAUNCHED = dict(TORCHELASTIC_RUN_ID="none", WORLD_SIZE="16", LOCAL_WORLD_SIZE="8")
SLURM = dict(SLURM_NTASKS="16", SLURM_NNODES="2", SLURM_STEP_ID="0", SLURM_JOB_NAME="train")


@pytest.mark.parametrize("environment", [LAUNCHED, SLURM], ids=["torchrun", "srun"])
def test_the_processes_are_those_that_were_started(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert training.processes("auto", "auto") == dict(devices=8, num_nodes=2)
    assert training.processes(8, 2) == dict(devices=8, num_nodes=2)
    for devices, nodes in (4, "auto"), ("auto", 1):
        with pytest.raises(ValueError, match="but 8 processes on each of 2 nodes were started"):
            training.processes(devices, nodes)


def test_without_a_launcher_they_are_as_configured():
    assert training.processes("auto", "auto") == dict(devices="auto", num_nodes=1)


def test_slurm_without_srun_is_refused_where_it_would_wait_for_ever(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID")
    with pytest.raises(ValueError, match="SLURM has 16 tasks .* begin the command with srun"):
        training.processes("auto", "auto")
