"""What the files of sweeps/ say: every run of the paper, once."""

import itertools
import json
import re

import pytest

from evit.commands import sweep as command
from evit.commands.jobs import Sweep, estimate, expand, make_jobs, names, read
from evit.config import CONF_DIR
from evit.report import paper, results

DOCS = (CONF_DIR.parent / "docs/sweeps.md").read_text()
# Which sweep is which tables of paper.yaml.
TABLES = dict(
    keeprate=["keep_rate_deit_s"],
    keeprate_lvvit=["keep_rate_lvvit_s"],
    resolution=["resolution_deit_s"],
    resolution_lvvit=["resolution_lvvit_s"],
    dynamicvit=["dynamicvit_deit_s"],
    offtheshelf=["off_the_shelf"],
    fusion=[],
    cifar10_keeprate=[],
    cifar10_resolution=[],
    cifar10_finetune=[],
    cifar10_reducers=[],
    cifar10_offtheshelf=[],
    cifar10_any_rate=[],
    any_rate=[],
    reducers=[],
    quick_reducers=[],
)


@pytest.fixture(scope="module")
def sweeps():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("IMAGENET_DIR", raising=False)
        return {name: make_jobs(name, read(name), []) for name in names() if "reducers" not in name}


def published(job) -> list[dict]:
    """The rows of the paper's tables that a run reproduces, with any table."""
    cfg = job.cfg
    if cfg.get("seed") != 0 or cfg.data.get("num_classes") != 1000:
        return []
    dynamic = "dynamicvit" in cfg.model.model_name
    rate = 1 if cfg.hydra.runtime.choices.model in ("deit", "lvvit") else cfg.keep_rate
    return paper.runs(
        cfg.model.model_name,
        keep_rate=rate,
        fusion=None if rate == 1 or dynamic else cfg.fusion,
        img_size=cfg.img_size,
        finetuned=cfg.recipe.finetune,
        epochs=cfg.recipe.epochs - cfg.recipe.cooldown_epochs,
    )


def test_a_line_is_a_product_and_lines_are_a_list():
    runs = expand("keep_rate=0.5 img_size=256,288 fusion=true,false", [])
    assert runs == [
        ["keep_rate=0.5", f"img_size={size}", f"fusion={fusion}"]
        for size, fusion in itertools.product([256, 288], ["true", "false"])
    ]


def test_what_is_given_for_all_runs_wins():
    assert expand("keep_rate=0.5,0.7 seed=1", ["keep_rate=0.9"]) == [["keep_rate=0.9", "seed=1"]]


def test_every_row_of_the_paper_is_in_the_sweep_of_its_table_and_each_of_its_runs_is_a_row(sweeps):
    assert set(TABLES) == set(names())
    for name, tables in TABLES.items():
        if name in ("offtheshelf", "reducers", "quick_reducers") or "cifar10" in name:
            continue
        rows = [row for row in paper.training_runs() if row["table"] in tables]
        found = [[row for row in published(job) if row["table"] in tables] for job in sweeps[name]]
        assert all(len(row) == bool(tables) for row in found), name
        assert sorted(map(repr, sum(found, []))) == sorted(map(repr, rows)), name


def test_every_table_of_the_paper_is_one_sweep():
    assert sorted(sum(TABLES.values(), [])) == sorted(paper.TABLES)


def test_off_the_shelf_is_one_pass_for_all_of_its_rows(sweeps):
    (job,) = sweeps["offtheshelf"]
    assert job.command[1].endswith("src/evaluate.py")
    rates = [row["keep_rate"] for row in paper.TABLES["off_the_shelf"]["rows"]]
    assert job.config["keep_rates"] == rates and job.config["fusion"] == [True, False]


def test_keeprate_is_the_ten_points_and_the_dense_model(sweeps):
    dense, *points = sweeps["keeprate"]
    assert dense.cfg.hydra.runtime.choices.model == "deit"
    found = {(job.cfg.keep_rate, job.cfg.fusion, job.cfg.img_size) for job in points}
    assert found == set(itertools.product([0.9, 0.8, 0.7, 0.6, 0.5], [True, False], [224]))
    assert len(points) == 10


def test_a_run_in_several_sweeps_is_one_run_and_no_two_share_a_folder(sweeps):
    folders: dict[str, set[str]] = {}
    for job in sum(sweeps.values(), []):
        what = json.dumps({k: v for k, v in job.config.items() if k != "name"})
        folders.setdefault(what, set()).add(str(job.folder))
    assert all(len(found) == 1 for found in folders.values()), folders.values()
    assert len(set.union(*folders.values())) == len(folders)


def test_fusion_is_not_multiplied_into_keep_rate_1():
    sweep = read("keeprate")
    sweep.runs = sweep.runs[1:]
    found = [job.name for job in make_jobs("x", sweep, ["keep_rate=1,0.5"])]
    assert sorted(found) == [
        "experiment=evit_deit_s keep_rate=0.5 fusion=false",
        "experiment=evit_deit_s keep_rate=0.5 fusion=true",
        "experiment=evit_deit_s keep_rate=1",
    ]


def test_fine_tuning_starts_from_the_best_of_a_run_of_the_sweep(sweeps):
    folders = [job.folder for job in sweeps["resolution_lvvit"]]
    found = [job for job in sweeps["resolution_lvvit"] if job.source]
    assert [job.source in folders for job in found] == [True, True]
    for job in found:
        assert job.cfg.checkpoint == f"{job.source}/checkpoints/best.ckpt"
    assert found[0].source.name == "experiment-lvvit_s"
    assert "keep_rate-0.7" in found[1].source.name and "img_size-272" in found[1].source.name


def test_with_overrides_for_all_runs_fine_tuning_starts_from_those_runs():
    sweep = read("resolution_lvvit")
    sweep.runs = [sweep.runs[0], sweep.runs[-2]]
    dense, tuned = make_jobs("x", sweep, ["recipe.drop_path=0.2"])
    assert tuned.source == dense.folder and "drop_path" in dense.folder.name
    assert make_jobs("x", sweep, ["checkpoint=a.ckpt"])[1].source is None


def test_a_run_goes_where_the_same_command_alone_would_go(sweeps):
    for job in sum(sweeps.values(), []):
        assert job.command[2:] == job.overrides
    assert str(sweeps["keeprate"][0].folder) == "outputs/deit_s/experiment-deit_s"


def test_a_run_is_finished_by_its_result_and_changed_by_another_configuration(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    job = make_jobs("keeprate_lvvit", read("keeprate_lvvit"), [])[0]
    assert job.state() == "missing"
    job.folder.mkdir(parents=True)
    (job.folder / "config.json").write_text(json.dumps(job.config))
    assert job.state() == "missing" and "overwrite=true" not in job.command
    (job.folder / "result.json").write_text("{}")
    assert job.state() == "finished"
    (job.folder / "config.json").write_text(json.dumps(job.config | dict(seed=7)))
    assert job.state() == "changed" and job.command[-1] == "overwrite=true"


def test_an_evaluation_is_finished_with_what_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (job,) = make_jobs("offtheshelf", read("offtheshelf"), ["checkpoint=a.ckpt"])
    job.folder.mkdir(parents=True)
    config = job.config | dict(crop_pct=0.875)
    (job.folder / "evaluation.json").write_text(json.dumps(dict(config=config)))
    assert job.state() == "finished"
    (job.folder / "evaluation.json").write_text(json.dumps(dict(config=config | dict(seed=3))))
    assert job.state() == "changed"


def test_a_run_that_does_not_compose_is_a_job_with_the_reason():
    runs = ["keep_rate=0.5,0.7", "keeprate=0.5", "model=deit,typo", "recipe.epochs=[", "seed=x"]
    found = make_jobs("mine", Sweep([*runs, dict(run="seed=1", starts_from="model=typo")]), [])
    errors = [job.error for job in found]
    assert [bool(error) for error in errors] == [False, False, True, False, True, True, True, True]
    assert "did you mean keep_rate" in errors[2] and "no model=typo" in errors[4]
    assert [job.number for job in found] == list(range(8))
    with pytest.raises(ValueError, match="did you mean keep_rate"):
        make_jobs("mine", Sweep(["keeprate=0.5"]), [])


def test_a_run_is_changed_by_another_result_of_the_run_that_it_starts_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["data.root=/x", "data.label_maps=/x"]
    first, *_, tuned, _ = make_jobs("resolution_lvvit", read("resolution_lvvit"), more)
    assert tuned.source == first.folder
    for top1 in (80.0, 81.0):
        results.start(first.folder, first.config)
        (first.folder / "result.json").write_text(json.dumps(dict(top1=top1, seconds=top1)))
        if top1 == 80:
            results.start(tuned.folder, tuned.config)
            (tuned.folder / "result.json").write_text("{}")
            assert tuned.state() == "finished"
    assert tuned.state() == "changed" and tuned.command[-1] == "overwrite=true"
    (first.folder / "result.json").unlink()
    assert tuned.state() == "finished"  # and is not lost with the files of the other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keeprat"], "no sweep 'keeprat'.*keeprate"),
        (["keeprate", "keeprate=0.5"], "did you mean keep_rate"),
        (["keeprate_lvvit"], "needs data.root=PATH, or IMAGENET_DIR"),
        (["keeprate_lvvit", "data.root=/x"], "needs data.label_maps=PATH$"),
        (["keeprate_lvvit", "job=[0,3]", "data.root=/x"], "from 0 to 2, got .0, 3."),
        (["keeprate", "launcher=cloud"], "local or slurm, got 'cloud'"),
    ],
)
def test_mistakes_are_said_before_anything_begins(arguments, message, monkeypatch):
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    with pytest.raises(ValueError, match=message):
        command.run(arguments)


def test_a_dry_run_lists_runs_states_hours_and_the_paper(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    assert command.run(["keeprate_lvvit", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if "missing" in line]
    assert [row[-2] for row in rows] == ["83.3", "83.0", "82.5"]
    assert all(float(row[-1]) > 50 for row in rows)
    assert "GPU hours" in shown and "0 finished" in shown


def test_a_list_is_shown_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert command.run(["offtheshelf", "--dry-run"]) == 0
    assert "keep_rates=[1,0.9,0.8,0.7,0.6,0.5] fusion=[true,false]" in capsys.readouterr().out


@pytest.mark.skipif(not (CONF_DIR / "reducer").is_dir(), reason="needs conf/reducer")
def test_reducers_are_trained_under_one_recipe_at_two_keep_rates():
    dense, *jobs = make_jobs("reducers", read("reducers"), [])
    assert not [job.error for job in (dense, *jobs) if job.error]
    assert len(jobs) == 20 and {job.cfg.keep_rate for job in jobs} == {0.7, 0.5}
    assert all(job.cfg.recipe == dense.cfg.recipe for job in jobs)


def test_one_line_that_cannot_be_planned_does_not_hide_the_list(capsys, monkeypatch):
    def plan(cfg):
        if cfg.seed == 1:
            raise ValueError("no such model")
        return dict(hours=None, paper=[])

    monkeypatch.setattr("evit.commands.plan.plan", plan)
    monkeypatch.setenv("COLUMNS", "200")
    assert command.run(["cifar10_resolution", "--dry-run", "keep_rate=1", "seed=0,1"]) == 1
    shown = capsys.readouterr()
    assert "seed=0" in shown.out and "missing" in shown.out and "broken" in shown.out
    assert "seed=1" in shown.err and "no such model" in shown.err and "seed=0" not in shown.err


def test_the_tables_of_the_docs_have_their_runs(sweeps):
    rows = dict(re.findall(r"^\| `make sweep-(\w+)` \|[^|]*\| (\d+) \|", DOCS, re.M))
    others = {name: make_jobs(name, read(name), []) for name in set(names()) - set(sweeps)}
    assert rows == {name: str(len(jobs)) for name, jobs in (sweeps | others).items()}


def test_the_hours_in_the_docs_are_those_of_the_sweeps(sweeps):
    row = r"^\| `make sweep-(\w+)` \|.*\| (\d+) \| (\d*) ?\| ([\d.]*) ?\|$"
    rows = re.findall(row, DOCS, re.M)
    on_imagenet = {name for name in names() if "data.root" in read(name).needs}
    assert {name for name, *_ in rows} == on_imagenet - {"reducers"}
    for name, runs, hours, days in rows:
        for job in sweeps[name]:
            estimate(job, read(name).needs)
        total = sum(job.hours for job in sweeps[name])
        assert (int(runs), int(hours or 0)) == (len(sweeps[name]), round(total))
        assert not hours or days == f"{total / 8 / 24:.1f}"
