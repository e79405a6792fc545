"""src/benchmark.py, run as a user runs it."""

import json
import sys

import pytest
import timm
import torch
from omegaconf import OmegaConf

from evit.benchmark import choose
from evit.config import CONF_DIR
from evit.measure.contest import Contestant, Entry, Group, build, dense_entry, facts
from evit.models import EViT

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
    assert table.count("| dense |") == 4 and result["commit"] in table
    low = [line for line in result["printed"].splitlines() if "bf16" in line]
    assert "2/2 inference, batch 2, bf16, eager: 8 models, 3 rounds" in low


def test_the_numbers_of_a_row_belong_together(benchmark):
    rows = benchmark(f"{SMALL} keep_rates=[0.5,[0.9,0.7,0.5]]")["rows"]
    assert [row["keep_rate"] for row in rows] == [[1] * 3, [0.5] * 3, [0.9, 0.7, 0.5]]
    dense = rows[0]
    for row in rows:
        assert len(row["seconds"]) == 3
        speeds = sorted(2 / seconds for seconds in row["seconds"])
        assert row["images_per_s"] == pytest.approx(speeds[1], rel=1e-4)
        assert row["latency_ms"] == pytest.approx(2000 / speeds[1], rel=1e-4)
        ratios = sorted(d / s for d, s in zip(dense["seconds"], row["seconds"], strict=True))
        assert row["ratio"] == pytest.approx(ratios[1], rel=1e-4)
        assert row["memory_bytes"] > 4 * row["params"]
    assert rows[1]["macs"] < rows[2]["macs"] < dense["macs"]
    assert rows[1]["macs_executed"] < dense["macs_executed"]


def test_training_takes_more_than_inference(benchmark):
    rows = benchmark(f"{SMALL} what=[inference,training] keep_rates=0.5")["rows"]
    infer, train = (
        next(r for r in rows if r["what"] == w and not r["dense"])
        for w in ("inference", "training")
    )
    assert train["macs_executed"] > 2 * infer["macs_executed"]
    assert train["memory_bytes"] > 3.9 * infer["memory_bytes"]


def test_beside_the_paper_s_numbers_the_dense_model_has_224_px(benchmark):
    models = "models=[evit_deit_small_patch16,dynamicvit_deit_small_patch16]"
    arguments = f"{models} img_sizes=[64] keep_rates=[0.5] fusion=[true,false] batch_sizes=1"
    result = benchmark(f"{arguments} repeats=1 min_seconds=0.001 device=cpu paper=true")
    dense, *others = result["rows"]
    assert (dense["img_size"], dense["paper"]["macs"], dense["paper"]["ratio"]) == (224, 4.6, 1)
    assert {row["compared_with"] for row in others} == {dense["compared_with"]}
    assert {row["paper"] for row in others} == {None}
    (ruler,) = (line for line in result["printed"].splitlines() if line.startswith("───"))
    assert len(ruler) < 100 and "…" not in result["printed"]


def test_a_shortcut_chooses_the_rows_of_the_paper(monkeypatch):
    from evit.benchmark import choose

    entries = choose(dict(paper="lvvit_s"))
    assert len(entries) == 10
    assert set(entries.values()) == {dense_entry("evit_lvvit_s", 224)}
    assert Entry("evit_lvvit_s", 0.7, True, 448) in entries
    assert [entry.img_size for entry in entries if entry.dense] == [224, 384]


@pytest.mark.parametrize(
    ("model", "dense"),
    [
        ("evit_deit_base_patch16", "deit_base_patch16_224"),
        ("dynamicvit_deit_small_patch16", "deit_small_patch16_224"),
        ("evit_lvvit_m", "lvvit_m"),
        ("dynamicvit_lvvit_s", "lvvit_s"),
        ("deit3_small_patch16_224", "deit3_small_patch16_224"),
    ],
)
def test_every_family_has_its_dense_model(model, dense):
    assert dense_entry(model, 32).model == dense


def test_the_field_is_other_models_and_evit():
    knobs: dict = dict.fromkeys(("models", "img_sizes", "keep_rates", "fusion"), [])
    entries = choose(dict(paper="field") | knobs)
    others = [entry for entry in entries if entry.dense]
    assert len(others) == 30 and all(timm.is_model(entry.model) for entry in others)
    rates = [entry.keep_rate for entry in entries if not entry.dense]
    assert rates == [0.9, 0.8, 0.7, 0.6, 0.5, 0.7, 0.5]
    bases = {str(base) for entry, base in entries.items() if "lvvit" in entry.model}
    assert bases == {"lvvit_s dense img_size=224"}


@pytest.mark.parametrize("model", ["cait_xxs24_224", "efficientnet_b0", "twins_svt_small"])
def test_models_of_other_kinds_have_the_macs_that_are_done(model):
    entry = Entry(model, img_size=64, dense=True)
    contestant = Contestant(entry, Group("inference", 1, "fp32", False), torch.device("cpu"))
    contestant.step()
    assert contestant.macs_executed == facts(entry)["macs"] > 1e6
    assert facts(entry)["keep_rate"] == []


def test_any_timm_model_is_timed_as_its_evit_beside_timm_s_own():
    name = "deit_tiny_patch16_224"
    assert isinstance(build(Entry(name, 0.5, True, 32)), EViT)
    assert not isinstance(build(dense_entry(name, 32)), EViT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("keep_rates=[0]", "keep_rate must be in"),
        ("models=evit_deit_smal", "Unknown model"),
        ("models=resnet18", "resnet18"),
        ("models=vit_base_patch16_gap_224", "no class token"),
        ("img_sizes=[33]", "img_size 33 .* 32 or 48"),
        ("batch_sizes=[0]", "batch_sizes must be at least 1, got 0"),
        ("repeats=0", "repeats must be at least 1, got 0"),
        ("precisions=int8", "precisions must be of fp32, tf32, bf16, fp16, got 'int8'"),
        ("precisions=tf32", "tf32 is a GPU's"),
        ("compile=reduce-overhead", "CUDA graphs, for a GPU"),
        ("what=speed", "what must be of inference, training, loader"),
        ("fusion=1", "fusion must be of true, false"),
        ("what=training precisions=fp16", "loss scaling"),
        ("paper=deit_b", "paper must be of false, true, deit_s, lvvit_s"),
        ("paper=deit_s", "leave out img_sizes, models"),
        ("device=tpu", "device must be auto, cpu or cuda"),
        ("keeprates=[1]", "did you mean keep_rates"),
    ],
)
def test_what_cannot_be_timed_is_said_before_anything_is(refused, arguments, message):
    import re

    assert re.search(message, refused(f"{SMALL} {arguments}"))


def test_the_loader_the_model_and_both_have_their_speeds(tmp_path, shared_photos):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from evit.benchmark import open_data
    from evit.measure.data_bound import data_bound

    overrides = "data.backend=imagefolder data.num_workers=0 max_images=9".split()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("benchmark", [*SMALL.split(), *overrides, f"data.root={shared_photos}"])
    cfg.data.img_size = None
    config = OmegaConf.to_container(cfg, resolve=True)
    config |= dict(batch_sizes=[2], precisions=["fp32"], compile=[False])
    said: list[str] = []
    entry = Entry("evit_deit_tiny_patch16", 0.5, True, 32)
    data = open_data(config, 32, torch.device("cpu"), tmp_path)
    result = data_bound(config, entry, data, torch.device("cpu"), said.append)
    assert result["images"] == 8 and "photos, read by imagefolder" in said[0]
    assert [row["name"] for row in result["rows"]] == ["loader alone", "model alone", "both"]
    assert all(row["images_per_s"] > 0 for row in result["rows"])
    assert "% of the model's own speed" in result["verdict"]


@pytest.mark.parametrize(
    ("share", "loader", "said"),
    [(0.99, 1.2, "does not wait"), (0.5, 0.6, "waits for"), (0.8, 9, "takes time from training")],
)
def test_what_the_speeds_say(share, loader, said):
    from evit.measure.data_bound import verdict

    assert said in verdict(share, loader) and f"{100 * share:.0f} %" in verdict(share, loader)


@pytest.mark.slow
def test_compiled_models_take_turns_too(benchmark):
    rows = benchmark(f"{SMALL} compile=[false,true] keep_rates=0.5")["rows"]
    assert [row["compile"] for row in rows] == [False, False, True, True]


def test_the_knobs_are_these():
    assert set(OmegaConf.load(CONF_DIR / "benchmark.yaml")) - {"defaults", "hydra"} == {
        *("name", "what", "models", "keep_rates", "fusion", "img_sizes", "batch_sizes"),
        *("precisions", "compile", "paper", "repeats", "min_seconds", "threads", "device"),
        *("max_images", "seed", "target"),
    }
