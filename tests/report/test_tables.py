"""Tables of finished runs."""

import json

import pytest

from evit.report import figures, files, found, page, results, sheets, tables
from tests.conftest import QUICK, command
from tests.report import fake


def row(**changes) -> dict:
    given = dict(
        top1=80.0,
        top5=95.0,
        train_images_per_s=100.0,
        params=22e6,
        macs=3.0321e9,
        model="evit_deit",
        keep_rate=0.7,
        fusion=True,
        img_size=224,
        data="photos",
        epochs=2,
        from_checkpoint=False,
        seed=0,
        seconds=9.0,
        device="CPU",
        precision="32-true",
        commit="abc",
        packages=dict(torch="2.15.0"),
    )
    given |= changes
    return given | dict(setting=f"{given['keep_rate']}{given['fusion']}")


def cells(rows: list[dict]) -> list[list[str]]:
    lines = tables.markdown(rows).split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_seeds_of_one_setting_are_one_line_with_mean_and_deviation():
    found = cells([row(top1=80.0), row(top1=81.0, seed=1), row(top1=82.0, seed=2)])
    assert [line[3] for line in found] == ["81.00 ± 1.00"]


def test_every_setting_has_a_line_the_most_expensive_first():
    rows = [
        row(keep_rate=0.5, macs=2.3e9),
        row(keep_rate=1.0, fusion=False, macs=4.6e9),
        row(fusion=False, macs=2.9997e9),
        row(),
        row(from_checkpoint=True),
    ]
    found = [line[:3] for line in cells(rows)]
    assert found == [
        ["evit_deit", "1.0", "-"],
        ["evit_deit", "0.7", "fused"],
        ["evit_deit, fine-tuned", "0.7", "fused"],
        ["evit_deit", "0.7", "dropped"],
        ["evit_deit", "0.5", "fused"],
    ]


def test_two_runs_of_one_setting_and_seed_are_not_averaged():
    with pytest.raises(ValueError, match="2 runs of evit_deit at keep rate 0.7 share a seed"):
        tables.markdown([row(), row()])


def test_settings_differ_by_the_recipe_and_not_by_chance():
    config = dict(seed=0, name="a", data=dict(seed=0, root="r"), recipe=dict(lr=1e-3))
    other = dict(seed=1, name="b", data=dict(seed=1, root="r"), recipe=dict(lr=1e-3))
    assert tables.setting(config) == tables.setting(other)
    assert tables.setting(config) != tables.setting(config | dict(recipe=dict(lr=1e-4)))


def test_where_the_numbers_come_from_is_below_the_table():
    note = tables.markdown([row(), row(seed=1, commit="def")])
    assert "photos, 224 px, 2 epochs. Mean and standard deviation of 2 runs" in note
    assert "CPU; commit abc, def; torch 2.15.0" in note


def test_the_table_of_a_run_has_both_speeds(tmp_path, capsys):
    result = fake.fashion(0.7, 83.14, throughput=1234.4, train_images_per_s=None)
    results.show(result, tmp_path)
    lines = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines()]
    shown = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    assert shown["inference"] == "1234 images/s on CPU (x86_64, 2 threads)"
    assert shown["training"] == "- images/s on CPU (x86_64, 2 threads)"


def test_a_folder_without_finished_runs_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run has finished in .*no result.json"):
        found.read(tmp_path)


def test_tables_and_charts_can_be_made_again_from_runs_json_alone(tmp_path):
    for rate, seed in ((1.0, 0), (1.0, 1), (0.7, 0), (0.7, 1)):
        run = fake.fashion(rate, 83.0 + rate + seed, seed=seed)
        fake.write(tmp_path / f"outputs/fashion/{rate}-{seed}", run)
    files.write(tmp_path / "outputs", tmp_path / "results", page=False)
    before, again = found.read(tmp_path / "outputs"), found.read(tmp_path / "results")
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "runs.json",
        "table.md",
    ]
    sections = [page.build(content)[1] for content in (before, again)]
    texts = [
        sheets.markdown(c, [s.sheet for s in own])
        for c, own in zip((before, again), sections, strict=True)
    ]
    assert texts[0] == texts[1]
    drawn = [figures.interactive(own[0].charts[0]) for own in sections]
    assert drawn[0] == drawn[1]


def test_the_command_writes_the_table_of_runs_and_can_read_it_again(tmp_path, shared_photos):
    done = command("train.py", *QUICK, f"data.root={shared_photos}", "logger=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arguments = "runs=outputs/dev", "target=table", "page=false"
    done = command("report.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table/table.md").read_text()
    assert table in done.stdout and "| evit_deit_micro | 0.7 | fused |" in table
    rows = json.loads((tmp_path / "table/runs.json").read_text())
    assert len(rows) == 1 and str(tmp_path) not in json.dumps(rows)
    again = command("report.py", "runs=table/runs.json", cwd=tmp_path)
    assert table in again.stdout
