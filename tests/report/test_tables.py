"""Tables of finished runs, for the terminal and as Markdown."""

import json
import sys

import pytest

from evit.commands import report
from evit.report import collect, page, results, tables
from tests.report import fake


def frame(folder, *runs):
    """The table of these runs on Fashion-MNIST, and its note."""
    for i, run in enumerate(runs):
        fake.write(folder / f"runs/{i}", run)
    (table,) = tables.of_settings(tables.ours(collect.read(folder)))
    return table


def test_seeds_of_one_setting_are_one_line_with_mean_and_deviation(tmp_path):
    runs = [fake.fashion(0.7, 80.0 + seed, seed=seed) for seed in range(3)]
    assert list(frame(tmp_path, *runs)["frame"]["top-1 (%)"]) == ["81.00 ± 1.00"]


def test_every_setting_has_a_line_the_most_expensive_first(tmp_path):
    table = frame(
        tmp_path,
        fake.fashion(0.5, 80.0),
        fake.fashion(1.0, 80.0),
        fake.fashion(0.7, 80.0, fusion=False, macs=2),
        fake.fashion(0.7, 80.0),
        fake.fashion(0.7, 80.0, checkpoint="a.ckpt"),
    )["frame"]
    assert table[["keep rate", "the rest", "weights"]].values.tolist() == [
        ["0.7", "fused", "fine-tuned"],
        ["dense", "", "from scratch"],
        ["0.7", "fused", "from scratch"],
        ["0.5", "fused", "from scratch"],
        ["0.7", "dropped", "from scratch"],
    ]


def test_settings_differ_by_the_recipe_and_not_by_chance():
    config = dict(seed=0, name="a", data=dict(seed=0, root="r"), recipe=dict(lr=1e-3))
    other = dict(seed=1, name="b", data=dict(seed=1, root="r"), recipe=dict(lr=1e-3))
    assert results.setting(config) == results.setting(other)
    assert results.setting(config) != results.setting(config | dict(recipe=dict(lr=1e-4)))


def test_what_is_the_same_in_all_rows_is_said_once_and_what_differs_is_a_column(tmp_path):
    same = frame(tmp_path / "a", fake.fashion(1.0, 84.0), fake.fashion(0.7, 83.0))
    assert same["title"] == "fashion-mnist, 28 px"
    assert "Epochs: 2; images: all; kept: attentive" in same["note"]
    assert not {"epochs", "images", "reducer", "weights", "px"} & set(same["frame"])
    runs = fake.fashion(1.0, 84.0), fake.fashion(0.7, 83.0, epochs=9, max_train_images=500)
    table = frame(tmp_path / "b", *runs)["frame"]
    assert list(table["epochs"]) == ["2", "9"] and list(table["images"]) == ["all", "500 training"]


def test_runs_of_limited_images_are_marked(tmp_path):
    runs = [fake.fashion(rate, 80.0, max_train_images=500) for rate in (1.0, 0.7)]
    assert "images: 500 training" in frame(tmp_path, *runs)["note"]


def test_the_terminal_has_a_table_for_each_data_set_and_size(tmp_path, capsys):
    for size in (28, 56):
        fake.write(tmp_path / f"{size}", fake.fashion(0.7, 80.0, img_size=size, commit=f"c{size}"))
    report.write(tmp_path, None)
    shown = capsys.readouterr().out
    assert "**fashion-mnist, 28 px**" in shown and "**fashion-mnist, 56 px**" in shown
    assert "CPU (x86_64, 2 threads); commit c28, c56; torch 2.15.0." in shown


def test_the_table_of_a_run_has_both_speeds(tmp_path, capsys):
    result = fake.fashion(0.7, 83.14, throughput=1234.4, train_images_per_s=None)
    results.show(result, tmp_path)
    lines = [line.strip().split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    shown = {line[0]: line[1] for line in lines if len(line) == 2}
    assert shown["inference"] == "1234 images/s"
    assert shown["training"] == "not measured"
    assert (shown["reducer"], shown["epochs"]) == ("evit, fused", "2")


def test_a_folder_without_finished_runs_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run has finished in .*no result.json"):
        collect.read(tmp_path)


def test_tables_and_charts_can_be_made_again_from_runs_json_alone(tmp_path):
    for rate, seed in ((1.0, 0), (1.0, 1), (0.7, 0), (0.7, 1)):
        run = fake.fashion(rate, 83.0 + rate + seed, seed=seed)
        fake.write(tmp_path / f"outputs/fashion/{rate}-{seed}", run)
    report.write(tmp_path / "outputs", tmp_path / "results", page=False)
    before, again = collect.read(tmp_path / "outputs"), collect.read(tmp_path / "results")
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "runs.json",
        "table.md",
    ]
    texts, drawn = [], []
    for content in (before, again):
        points = tables.ours(content)
        papers = tables.of_paper(content, points)
        texts.append(tables.report(content, tables.of_settings(points), papers))
        drawn.append(page.accuracy("key", "fashion-mnist, 28 px", points))
    assert texts[0] == texts[1]
    assert drawn[0] == drawn[1] and drawn[0]["views"]


def test_the_command_writes_the_table_of_runs_and_can_read_it_again(tmp_path, monkeypatch, capsys):
    import report as script

    monkeypatch.chdir(tmp_path)
    fake.write(tmp_path / "outputs/dev", fake.fashion(0.7, 83.0))
    shown = []
    for words in ("runs=outputs target=table page=false", "runs=table/runs.json"):
        monkeypatch.setattr(sys, "argv", ["report.py", *words.split()])
        script.main()
        shown.append(capsys.readouterr().out)
    table = (tmp_path / "table/table.md").read_text()
    assert all(table in text for text in shown)
    assert "| 0.7       | fused    |" in table and "model: evit_deit_micro" in table
    found = json.loads((tmp_path / "table/runs.json").read_text())
    assert len(found) == 1 and str(tmp_path) not in json.dumps(found)
