"""Which dense model a setting is compared with, and how settings are told apart."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from evit.report import charts, compare, results, sheets, tables
from evit.report.curves import curves
from evit.report.found import read
from evit.report.points import Point, dense_of
from tests.report import fake
from tests.test_conf import composed, resolvers

__all__ = ["resolvers"]  # a fixture


def points(folder: Path, **runs: dict) -> list[Point]:
    """Of these runs."""
    for name, content in runs.items():
        fake.write(folder / "outputs" / name, content)
    return [point for found in compare.ours(read(folder)).values() for point in found]


def baseline(found: list[Point]) -> Point | None:
    """Of the only sparse setting."""
    (sparse,) = (point for point in found if not point.dense)
    return dense_of(sparse, found)


@pytest.mark.parametrize(
    "other",
    [
        dict(epochs=9),
        dict(max_train_images=1000),
        dict(recipe=dict(lr=1e-2)),
        dict(recipe=dict(batch_size=32)),
        dict(recipe=dict(mixup=0.8)),
        dict(architecture=dict(embed_dim=192)),
        dict(img_size=56),
        dict(checkpoint="a.ckpt"),
    ],
    ids=str,
)
def test_a_run_is_compared_with_a_dense_one_by_the_same_recipe_or_with_none(tmp_path, other):
    def run(rate, top1, **changes):
        return fake.fashion(rate, top1, **changes)

    runs = dict(evit=run(0.7, 79.0), other=run(1.0, 85.0, **other))
    assert baseline(points(tmp_path / "a", **runs)) is None
    found = baseline(points(tmp_path / "b", **runs, dense=run(1.0, 80.0)))
    assert found and found.top1 == 80.0


def test_the_baseline_is_the_mean_over_the_dense_seeds(tmp_path):
    dense = {f"d{seed}": fake.fashion(1.0, 80.0 + seed, seed=seed) for seed in range(3)}
    found = points(tmp_path, evit=fake.fashion(0.7, 79.0, seed=7), **dense)
    assert baseline(found).top1 == 81.0 and baseline(found).runs == 3
    dense, sparse = sheets.runs("", found).rows
    assert dense[:5] == ["dense", "", "3", "81.00 ± 1.00", "+0.00"]
    assert sparse[:5] == ["0.7", "fused", "1", "79.00", "-2.00"]


def test_the_spread_over_seeds_is_a_bar_and_in_the_hover_text(tmp_path):
    runs = {
        f"{rate}-{seed}": fake.fashion(rate, 80.0 + rate + seed, seed=seed)
        for rate in (1.0, 0.5)
        for seed in range(3)
    }
    chart = charts.relative(0, points(tmp_path, **runs))
    (own,) = (series for series in chart.views[0].series if series.ours)
    assert own.spread == [1.0, 1.0] and own.y == [-0.5, 0.0]
    assert "81.50 ± 1.00 % (mean and standard deviation of 3 runs)" in own.hover[0]


def test_several_seeds_of_a_row_of_the_paper_have_mean_spread_and_number_in_its_table(tmp_path):
    for seed in range(3):
        fake.write(tmp_path / f"{seed}", fake.result(top1=79.0 + 0.5 * seed, seed=seed))
    sheet = sheets.paper_sheet(read(tmp_path), "keep_rate_deit_s")
    line = next(row for row in sheet.rows if row[:2] == ["0.7", "fused"])
    assert line[2:5] == ["79.5", "79.50 ± 0.50, 3 runs", "+0.00"]


def test_the_curve_of_a_setting_is_the_mean_and_its_runs_are_faint(tmp_path):
    for seed, top1 in enumerate((80.0, 84.0)):
        fake.write(tmp_path / f"{seed}", fake.fashion(0.7, top1, seed=seed))
    runs = read(tmp_path).runs
    chart = curves(0, runs, {runs[0].row["setting"]: "EViT"})
    *single, mean = next(view for view in chart.views if view.name == "top-1").series
    assert [line.faint for line in single] == [True, True] and not mean.faint
    assert mean.y[0] == sum(line.y[0] for line in single) / 2
    assert "mean of 2 runs" in mean.template


def test_no_two_lines_of_a_chart_look_the_same(tmp_path):
    for rate in (1.0, 0.7):
        for epochs in (1, 2, 3):
            run = fake.fashion(rate, 80.0 + rate, epochs=epochs)
            fake.write(tmp_path / f"{rate}-{epochs}", run)
    content = read(tmp_path)
    found = compare.ours(content)
    for chart in charts.imagenet(content), charts.relative(0, *found.values()):
        for view in chart.views:
            looks = [(one.family, one.ours, one.marker) for one in view.series]
            assert len(set(looks)) == len(looks) > 5


def training(*overrides: str) -> str:
    config = OmegaConf.to_container(composed(*overrides), resolve=True)
    experiment = overrides[0].removeprefix("experiment=")
    return tables.training(config, experiment)


@pytest.mark.parametrize(
    ("sparse", "dense"),
    [
        (["evit_deit_s"], ["deit_s"]),
        (["evit_deit_s", "keep_rate=0.5", "seed=1", "fusion=false"], ["deit_s"]),
        (["evit_deit_s"], ["evit_deit_s", "keep_rate=1"]),
        (["dynamicvit_deit_s_scratch"], ["deit_s"]),
        (["evit_lvvit_s"], ["lvvit_s"]),
        (["evit_lvvit_s_448", "img_size=384"], ["lvvit_s_384"]),
        (["fashion_mnist", "model=dynamicvit_deit_micro"], ["fashion_mnist", "keep_rate=1"]),
    ],
    ids=str,
)
def test_the_experiments_of_one_table_have_one_recipe(sparse, dense, monkeypatch):
    monkeypatch.setenv("IMAGENET_DIR", "/images")
    sparse, dense = (training(f"experiment={run[0]}", *run[1:]) for run in (sparse, dense))
    assert sparse == dense
    assert training("experiment=evit_deit_s", "recipe.batch_size=512") not in (sparse, dense)


def test_two_recipes_are_two_lines_with_names(tmp_path):
    runs = {
        f"{name}/{rate}": fake.fashion(rate, 80.0 + rate, recipe=dict(lr=lr))
        for name, lr in dict(low=1e-4, high=1e-3).items()
        for rate in (1.0, 0.7)
    }
    found = points(tmp_path, **runs)
    assert {charts.group(p).split(", ")[-1] for p in found} == {"outputs/low", "outputs/high"}
    view = charts.relative(0, found).views[0]
    assert sum(series.ours for series in view.series) == 2
    sheet = sheets.runs("", found)
    assert {row[sheet.columns.index("recipe")] for row in sheet.rows} == {
        "outputs/low",
        "outputs/high",
    }


def test_runs_of_older_files_are_compared_within_their_folder(tmp_path):
    for i, name in enumerate(("a", "b")):
        runs = [fake.fashion(rate, 80 + i + rate, recipe=dict(lr=i)) for rate in (1.0, 0.7)]
        rows = [tables.row(run) for run in runs]
        older = [{k: v for k, v in r.items() if k not in ("recipe", "started_from")} for r in rows]
        (tmp_path / name).mkdir()
        (tmp_path / name / "runs.json").write_text(json.dumps(older))
    ((_, found),) = compare.ours(read(tmp_path)).items()
    dense = {p.top1: dense_of(p, found).top1 for p in found if not p.dense}
    assert dense == {80.7: 81.0, 81.7: 82.0}


def test_an_evaluation_is_compared_with_its_own_dense_model(tmp_path):
    for i, sha in enumerate("ab"):
        content = fake.evaluation() | dict(checkpoint_sha256=sha)
        content["settings"] = [row | dict(top1=row["top1"] - i) for row in content["settings"]]
        (tmp_path / sha).mkdir()
        (tmp_path / sha / "evaluation.json").write_text(json.dumps(content))
    found = compare.ours(read(tmp_path))["ImageNet"]
    changes = [round(p.top1 - dense_of(p, found).top1, 2) for p in found]
    assert changes == 2 * [0, -1.26, -6.01]


def test_a_fine_tuned_run_is_compared_with_what_it_began_with(tmp_path):
    long = fake.fashion(1.0, 85.0, epochs=9)
    dense = fake.fashion(1.0, 80.0)
    checkpoint = fake.write(tmp_path / "outputs/dense", dense) / "checkpoints/last.ckpt"
    tuned = fake.fashion(0.7, 81.0, epochs=1, checkpoint=str(checkpoint))
    tuned |= dict(started_from=tables.started_from(str(checkpoint)))
    found = points(tmp_path, long=long, tuned=tuned)
    assert baseline(found).top1 == 80.0
    unknown = points(tmp_path / "b", long=long, tuned=tuned | dict(started_from=None))
    assert baseline(unknown) is None


def test_weights_outside_a_checkpoints_folder_are_no_runs(tmp_path):
    fake.write(tmp_path / "run", fake.fashion(1.0, 80.0))
    for checkpoint in ("/deit.pth", str(tmp_path / "run/weights/deit.pth")):
        results.start(tmp_path / "tuned", dict(checkpoint=checkpoint))
        assert not (tmp_path / "tuned" / results.START).exists()
    results.start(tmp_path / "tuned", dict(checkpoint=str(tmp_path / "run/checkpoints/last.ckpt")))
    assert (tmp_path / "tuned" / results.START).exists()


def test_a_checkpoint_that_no_run_left_is_known_by_its_content(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints/published.pth"
    path.write_bytes(b"weights")
    (tmp_path / "config.json").write_text('{"architectures": ["another"]}')
    assert tables.started_from(str(path)) == results.sha256(path)
    content = fake.evaluation() | dict(checkpoint_sha256=results.sha256(path))
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/evaluation.json").write_text(json.dumps(content))
    tuned = fake.result(checkpoint=str(path), epochs=30, started_from=results.sha256(path))
    found = points(tmp_path, tuned=tuned)
    assert dense_of(next(p for p in found if p.epochs), found).top1 == 79.81
