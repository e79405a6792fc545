"""Which dense model a setting is compared with, and how settings are told apart."""

import json
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from evit.report import collect, page, paper, results, tables
from evit.report.collect import read
from tests.report import fake
from tests.test_conf import composed, resolvers

__all__ = ["resolvers"]  # a fixture


def points(folder: Path, **runs: dict) -> pd.DataFrame:
    """The settings of these runs, beside their dense ones."""
    for name, content in runs.items():
        fake.write(folder / "outputs" / name, content)
    return tables.ours(read(folder))


def baseline(found: pd.DataFrame) -> pd.Series | None:
    """The dense setting of the only sparse one."""
    ((_, sparse),) = found[found.rate != "dense"].iterrows()
    return None if sparse.dense == -1 else found.loc[sparse.dense]


def frame(found: pd.DataFrame) -> pd.DataFrame:
    """The table of settings of one section."""
    (table,) = tables.of_settings(found)
    return table["frame"]


def sheet(content: collect.Found, name: str) -> list[list[str]]:
    """A table of the paper."""
    made = tables.of_paper(content, tables.ours(content))
    return made[list(paper.TABLES).index(name)]["frame"].values.tolist()


def view(chart: dict, name: str) -> list[dict]:
    """The traces of a view of a chart."""
    return next(shown["data"] for shown in chart["views"] if shown["name"] == name)


def accuracy(folder: Path, title: str = "fashion-mnist, 28 px") -> dict:
    return page.accuracy("key", title, tables.ours(read(folder)))


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
    assert found is not None and found.top1 == 80.0


def test_the_baseline_is_the_mean_over_the_dense_seeds(tmp_path):
    dense = {f"d{seed}": fake.fashion(1.0, 80.0 + seed, seed=seed) for seed in range(3)}
    found = points(tmp_path, evit=fake.fashion(0.7, 79.0, seed=7), **dense)
    assert baseline(found).top1 == 81.0 and baseline(found).runs == 3
    dense, sparse = frame(found).values.tolist()
    assert dense[:5] == ["dense", "", "3", "81.00 ± 1.00", "+0.00"]
    assert sparse[:5] == ["0.7", "fused", "1", "79.00", "-2.00"]


def test_the_spread_over_seeds_is_a_bar_and_the_keep_rate_is_the_hover_text(tmp_path):
    runs = {
        f"{rate}-{seed}": fake.fashion(rate, 80.0 + rate + seed, seed=seed)
        for rate in (1.0, 0.5)
        for seed in range(3)
    }
    points(tmp_path, **runs)
    dense, own = view(accuracy(tmp_path), "GMACs")
    assert own["error_y"]["array"] == [1.0] and (own["y"], dense["y"]) == ([81.5], [82.0])
    assert own["hovertext"] == ["0.5, 28 px"]


def test_several_seeds_of_a_row_of_the_paper_have_mean_spread_and_number_in_its_table(tmp_path):
    for seed in range(3):
        fake.write(tmp_path / f"{seed}", fake.result(top1=79.0 + 0.5 * seed, seed=seed))
    rows = sheet(read(tmp_path), "keep_rate_deit_s")
    line = next(row for row in rows if row[:2] == ["0.7", "fused"])
    assert line[2:5] == ["79.5", "79.50 ± 0.50, 3 runs", "+0.00"]


def test_the_runs_of_a_setting_are_curves_of_one_colour(tmp_path):
    for seed, top1 in enumerate((80.0, 84.0)):
        fake.write(tmp_path / f"{seed}", fake.fashion(0.7, top1, seed=seed))
    content = read(tmp_path)
    chart = page.curves("key", content, tables.ours(content))
    first, second = view(chart, "top-1")
    assert [line["y"][-1] for line in (first, second)] == pytest.approx([79.8, 83.79])
    assert first["line"] == second["line"] and len(first["x"]) == 4
    assert (first["showlegend"], second["showlegend"]) == (True, False)
    assert "seed 1" in second["hovertext"][0]


def test_no_two_lines_of_a_chart_look_the_same(tmp_path):
    for rate in (1.0, 0.7):
        for epochs in (1, 2, 3):
            run = fake.fashion(rate, 80.0 + rate, epochs=epochs)
            fake.write(tmp_path / f"{rate}-{epochs}", run)
    for chart in accuracy(tmp_path, "ImageNet"), accuracy(tmp_path):
        for shown in chart["views"]:
            looks = [(one["line"]["color"], one["marker"]["symbol"]) for one in shown["data"]]
            assert len(set(looks)) == len(looks) > 5


def training(*overrides: str) -> str:
    config = OmegaConf.to_container(composed(*overrides), resolve=True)
    experiment = overrides[0].removeprefix("experiment=")
    return collect.training(config, experiment)


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
    points(tmp_path, **runs)
    found = tables.ours(read(tmp_path))
    named = set(found.recipe)
    assert {name.split(", ")[-1] for name in page.line_names(found)} == named
    assert len(view(accuracy(tmp_path), "GMACs")) == 4
    assert set(frame(found)["recipe"]) == named


def test_an_evaluation_is_compared_with_its_own_dense_model(tmp_path):
    for i, sha in enumerate("ab"):
        content = fake.evaluation() | dict(checkpoint_sha256=sha)
        content["settings"] = [row | dict(top1=row["top1"] - i) for row in content["settings"]]
        (tmp_path / sha).mkdir()
        (tmp_path / sha / "evaluation.json").write_text(json.dumps(content))
    found = points(tmp_path).sort_values(["recipe", "macs"], ascending=[True, False])
    assert list(found.change.round(2)) == 2 * [0, -1.26, -6.01]


def test_a_fine_tuned_run_is_compared_with_what_it_began_with(tmp_path):
    long = fake.fashion(1.0, 85.0, epochs=9)
    dense = fake.fashion(1.0, 80.0)
    checkpoint = fake.write(tmp_path / "outputs/dense", dense) / "checkpoints/last.ckpt"
    tuned = fake.fashion(0.7, 81.0, epochs=1, checkpoint=str(checkpoint))
    tuned |= dict(started_from=results.started_from(str(checkpoint)))
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
    assert results.started_from(str(path)) == results.sha256(path)
    content = fake.evaluation() | dict(checkpoint_sha256=results.sha256(path))
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/evaluation.json").write_text(json.dumps(content))
    tuned = fake.result(checkpoint=str(path), epochs=30, started_from=results.sha256(path))
    found = points(tmp_path, tuned=tuned)
    assert found.loc[found.dense[found.start == "fine-tuned"]].top1.item() == 79.81


def evaluate(folder: Path, **changes) -> dict:
    """Write an evaluation, and return it."""
    content = fake.evaluation("photos", 10) | dict(checkpoint_sha256="a") | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(content))
    return content


def test_evaluations_of_fewer_images_are_rows_of_their_own_beside_their_own_dense_model(tmp_path):
    evaluate(tmp_path / "all")
    few = [row | dict(top1=row["top1"] + 9) for row in fake.evaluation()["settings"]]
    evaluate(tmp_path / "few", settings=few, config=dict(max_val_images=100, model={}))
    found = points(tmp_path).sort_values(["images", "macs"], ascending=[True, False])
    assert list(found.images) == 3 * [""] + 3 * ["100 validation"]
    assert list(found.change.round(2)) == 2 * [0, -1.26, -6.01]
    shown = frame(tables.ours(read(tmp_path)))
    assert sorted(set(shown["images"])) == ["100 validation", "all"]
    assert page.line_names(found).nunique() == 4


@pytest.mark.parametrize(
    ("said", "start"),
    [
        (dict(trained_keep_rate=1.0), "off the shelf"),
        (dict(trained_keep_rate=None), "off the shelf"),
        (dict(trained_keep_rate=[0.7] * 3), "trained at 0.7"),
        (dict(trained_keep_rate=[0.9, 0.8, 0.7]), "trained at 0.9,0.8,0.7"),
    ],
    ids=str,
)
def test_a_checkpoint_trained_at_a_keep_rate_is_not_beside_the_paper_s_dense_one(
    tmp_path, said, start
):
    evaluate(tmp_path, data=dict(name="imagenet", num_classes=1000), **said)
    content = read(tmp_path)
    found = tables.ours(content)
    assert set(found.start) == {start}
    own = {row[3] for row in sheet(content, "off_the_shelf")}
    assert (own != {"not run"}) == (start == "off the shelf")


def test_selections_and_reducers_are_columns_and_lines(tmp_path):
    kinds = (("evit", "random"), ("evit", "inattentive"), ("tome", None), ("evit", "attentive"))
    dense, *_ = fake.evaluation()["settings"]
    made = [
        dense
        | dict(keep_rate=[rate] * 3, reducer=reducer, selection=kept, fusion=False, kl=0.25)
        | dict(top1=70.0 + i + rate)
        for i, (reducer, kept) in enumerate(kinds)
        for rate in (0.5, 0.7)
    ]
    evaluate(tmp_path, settings=[dense | dict(kl=0.0), *made])
    found = tables.ours(read(tmp_path))
    shown = frame(found)
    key = shown["reducer"] + " " + shown["kept"]
    assert sorted(set(key)) == [" ", "evit attentive", "evit inattentive", "evit random", "tome "]
    assert list(shown["KL to dense"]).count("0.2500") == 8
    chart = page.accuracy("key", "photos", found)
    assert [shown["name"] for shown in chart["views"]] == ["GMACs"]
    lines = {trace["name"]: len(trace["x"]) for trace in view(chart, "GMACs")}
    assert lines.pop("dense") == 1 and set(lines.values()) == {2} and len(lines) == 4
    assert "tome" in lines and "evit, dropped, random" in lines


def test_models_of_timm_are_told_apart_by_their_names(tmp_path):
    for i, name in enumerate(("deit3_small_patch16_224", "vit_small_patch16_224")):
        run = fake.fashion(0.7, 80.0 + i)
        run["choices"]["model"] = "timm_vit"
        run["config"]["model"]["model_name"] = name
        fake.write(tmp_path / name, run)
    found = tables.ours(read(tmp_path))
    assert set(found.model) == {"deit3_small_patch16_224", "vit_small_patch16_224"}
    assert page.line_names(found).nunique() == 2
