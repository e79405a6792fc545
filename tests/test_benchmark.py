"""src/benchmark.py, run as a user runs it."""

import json
import re
import sys

import pytest
import torch

from evit.measure import speed
from tests.measure_gpu import measure
from tests.test_predict import sent

SMALL = "models=evit_deit_tiny_patch16 img_sizes=32 batch_sizes=2 "
SMALL += "repeats=3 min_seconds=0.001 device=cpu"


@pytest.fixture
def benchmark(monkeypatch, tmp_path, capfd):
    """Run src/benchmark.py in this process; benchmark.json and what was printed."""
    import benchmark

    monkeypatch.chdir(tmp_path)

    def run(arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments.split()])
        benchmark.main()
        (path,) = tmp_path.glob("outputs/*/*/benchmark.json")
        return json.loads(path.read_text()) | dict(printed=capfd.readouterr().out)

    return run


@pytest.fixture
def refused(benchmark, tmp_path, capfd):
    """Run src/benchmark.py, which fails and leaves nothing; its message."""

    def run(arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            benchmark(arguments)
        assert ended.value.code == 2 and not list(tmp_path.glob("outputs/**/*"))
        return capfd.readouterr().err

    return run


def test_every_setting_is_a_row_beside_its_dense_model(benchmark, tmp_path):
    result = benchmark(
        f"{SMALL} img_sizes=[32,48] keep_rates=[1,0.5] fusion=[true,false] "
        f"precisions=[fp32,bf16] target={tmp_path}/kept"
    )
    rows = result["rows"]
    found = [
        (r["precision"], r["img_size"], r["dense"], r["keep_rate"][0], r["fusion"]) for r in rows
    ]
    each = [(True, 1, None), (False, 1, None), (False, 0.5, True), (False, 0.5, False)]
    assert found == [(p, s, *e) for p in ("fp32", "bf16") for s in (32, 48) for e in each]
    assert [r["ratio"] for r in rows if r["dense"]] == [1] * 4
    assert len({r["compared_with"] for r in rows}) == 2
    kept = tmp_path / "kept"
    assert json.loads((kept / "benchmark.json").read_text())["rows"] == rows
    table = (kept / "table.md").read_text()
    cells = [[c.strip() for c in line.split("|")] for line in table.splitlines() if "|" in line]
    assert cells[0][1:6] == ["model", "keep rate", "px", "mode", "dtype"]
    names = ("dense", "dense, this code", "0.5 fuse", "0.5 drop")
    assert [c[2] for c in cells[2:]] == [*names] * 4 and result["commit"] in table
    assert {(c[4], c[5]) for c in cells[2:]} == {("eager", "fp32"), ("eager", "bf16")}
    assert "inference, batch 2, bf16, eager: 8 models\n" in result["printed"]
    assert table in result["printed"]


def test_the_numbers_of_a_row_belong_together(benchmark):
    result = benchmark(f"{SMALL} keep_rates=[0.5,[0.9,0.7,0.5]]")
    rows = result["rows"]
    assert [r["keep_rate"] for r in rows] == [[1] * 3, [1] * 3, [0.5] * 3, [0.9, 0.7, 0.5]]
    dense, whole, half, mixed = rows
    for row in rows:
        assert len(row["seconds"]) == 3
        speeds = sorted(2 / seconds for seconds in row["seconds"])
        assert row["images_per_s"] == pytest.approx(speeds[1], rel=1e-4)
        assert row["latency_ms"] == pytest.approx(2000 / speeds[1], rel=1e-4)
        done = row["macs_executed"] * row["images_per_s"] / result["matmul"][0]["macs_per_s"]
        assert done / 5 < row["peak_share"] < 5 * done  # of each round, on a machine that is busy
        ratios = sorted(d / s for d, s in zip(dense["seconds"], row["seconds"], strict=True))
        assert row["ratio"] == pytest.approx(ratios[1], rel=1e-4)
        assert row["memory_bytes"] > 4 * row["params"]
    assert half["macs"] < mixed["macs"] < whole["macs"] == dense["macs"]
    assert half["macs_executed"] < dense["macs_executed"]


def test_training_takes_more_than_inference(benchmark):
    rows = benchmark(f"{SMALL} what=[inference,training] keep_rates=0.5")["rows"]
    infer, train = (
        next(r for r in rows if r["what"] == w and r["keep_rate"][0] == 0.5)
        for w in ("inference", "training")
    )
    assert train["macs_executed"] > 2 * infer["macs_executed"]
    assert train["memory_bytes"] > 3.9 * infer["memory_bytes"]


def test_beside_the_paper_s_numbers_the_dense_model_has_224_px(benchmark):
    arguments = "models=dynamicvit_deit img_sizes=[64] keep_rates=[0.5] batch_sizes=1"
    result = benchmark(f"{arguments} repeats=1 min_seconds=0.001 device=cpu paper=true")
    dense, whole, *others = result["rows"]
    assert (dense["img_size"], dense["paper"]["macs"], dense["paper"]["ratio"]) == (224, 4.6, 1)
    assert {row["compared_with"] for row in others} == {dense["compared_with"]}
    assert whole["img_size"] == 224 and [row["paper"] for row in others] == [None]


def test_reducers_side_by_side_one_of_them_from_outside(benchmark, plug_in):
    """--config-dir and a YAML whose _target_ is a class of one's own, with an option of it."""
    rows = benchmark(f"{SMALL} keep_rates=0.5 reducer=[evit,mine] {plug_in}")["rows"]
    assert [(row["model"], row["reducer"]) for row in rows] == [
        ("deit_tiny_patch16_224", None),
        *(("evit_deit_tiny_patch16", name) for name in (None, "evit", "mine")),
    ]
    assert rows[3]["macs_executed"] < rows[2]["macs_executed"] < rows[1]["macs_executed"]


def test_a_run_s_checkpoint_is_its_model_size_and_reducer(benchmark, tmp_path):
    arguments = f"checkpoint={sent(tmp_path / 'sent.ckpt')} keep_rates=0.6 batch_sizes=2"
    rows = benchmark(f"{arguments} repeats=1 min_seconds=0.001 device=cpu")["rows"]
    assert [(row["reducer"], row["img_size"], row["params"] < 2e6) for row in rows] == [
        *[(None, 28, True)] * 2,
        ("merge", 28, True),
    ]


def test_names_of_conf_model_are_models_with_their_options(benchmark):
    names = "models=[evit_deit_micro,evit_deit_tiny] img_sizes=[112] keep_rates=1 batch_sizes=1"
    rows = benchmark(f"{names} repeats=1 min_seconds=0.001 device=cpu")["rows"]
    assert [(row["dense"], row["params"] < 2e6) for row in rows] == [
        *((True, True), (False, True), (True, False), (False, False))
    ]


def test_what_does_not_fit_into_memory_is_a_row_that_says_so(benchmark):
    result = benchmark(f"{SMALL} batch_sizes=[1,1000000000] keep_rates=0.5")
    assert {row["batch_size"] for row in result["rows"]} == {1}
    memory, *others = [row["reason"] for row in result["left_out"]]
    assert "allocate" in memory and others == ["no dense model to compare with"] * 2
    assert f"left out: deit_tiny_patch16_224 dense img_size=32: {memory}" in result["printed"]


def test_what_does_not_compile_is_a_row_that_says_why(benchmark, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a graph break\nand its long story")

    monkeypatch.setattr(torch, "compile", broken)
    result = benchmark(f"{SMALL} compile=[false,true] keep_rates=0.5")
    assert [row["compile"] for row in result["rows"]] == [False] * 3
    assert result["left_out"][0]["reason"] == "a graph break"
    assert re.search(r"compiled \| fp32 +\| a graph break +\|", result["printed"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("keep_rates=[0]", "keep_rate must be in"),
        ("models=evit_deit_smal", "Unknown model"),
        ("models=resnet18", "resnet18|ResNet"),
        ("img_sizes=[33]", "img_size 33 .* 32 or 48"),
        ("batch_sizes=[0]", "batch_sizes must be at least 1, got \\[0"),
        ("repeats=0", "repeats must be at least 1, got 0"),
        ("precisions=int8", "precisions must be of fp32, tf32, bf16, fp16, got 'int8'"),
        ("precisions=tf32", "tf32 needs a GPU"),
        ("compile=reduce-overhead", "reduce-overhead needs a GPU"),
        ("what=speed", "what must be of inference, training"),
        ("paper=deit_b", "paper must be of none, false, true, deit_s, lvvit_s"),
        ("paper=deit_s", "leave out img_sizes, models"),
        ("reducer=[evit,nosuch]", "nosuch"),
        ("checkpoint=nowhere", "'nowhere' does not exist"),
        ("device=tpu", "device must be of auto, cpu, cuda"),
        ("keeprates=[1]", "did you mean keep_rates"),
    ],
)
def test_what_cannot_be_timed_is_said_before_anything_is(refused, arguments, message):
    assert re.search(message, refused(f"{SMALL} {arguments}"))


def test_a_model_without_time_left_is_left_out():
    entry = speed.Entry("evit_deit_tiny_patch16", 0.5, True, 32)
    result: dict = dict(rows=[], matmul=[], left_out=[])
    group, found = speed.Group("inference", 1, "fp32", False), speed.compared([entry], False)
    config = dict(repeats=1, min_seconds=1e-9, paper=None)
    speed.compare(result, found, group, torch.device("cpu"), config, until=0)
    reasons = [row["reason"][:12] for row in result["left_out"]]
    assert reasons == ["no time left"] + ["no dense mod"] * 2 and not result["rows"]


def test_all_gpu_measurements_run_on_a_cpu_with_tiny_models(tmp_path):
    result = measure(tmp_path / "kept", gpu=False, repeats=1, min_seconds=0.001)
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {"table.md", "benchmark.json"}
    assert all(row["same_patches"] for row in result["correctness"]["rows"])
    assert result["training_run"]["rows"][0]["data_wait"] < 1
    kinds = {(row["what"], row["batch_size"]) for row in result["rows"]}
    assert kinds == {("inference", 1), ("inference", 2), ("training", 2)}
    assert {row["model"] for row in result["rows"]} == {
        *("deit_tiny_patch16_224", "evit_deit_tiny_patch16", "lvvit_t", "evit_lvvit_t")
    }
    assert not result["left_out"]
    table = (tmp_path / "kept/table.md").read_text()
    assert "agrees with the authors' code" in table and "Training run" in table
    assert "dense, this code" in table and result["packages"]["torch"] in table


@pytest.mark.slow
def test_compiled_models_take_turns_too(benchmark):
    rows = benchmark(f"{SMALL} compile=[false,true] keep_rates=0.5")["rows"]
    assert [row["compile"] for row in rows] == [False] * 3 + [True] * 3
