"""The W&B dashboard as code, without W&B; and what it and `make sync` say who is not logged in."""

import json
import os
import subprocess
import sys

import pytest
import wandb
import wandb_workspaces.reports.v2.interface as reports
from omegaconf import OmegaConf

from evit.commands import report as dashboard
from evit.config import CONF_DIR
from evit.report import paper
from tests.conftest import ROOT


@pytest.fixture
def offline(monkeypatch):
    """A report asks the server for the project's id when it is serialised: the answer."""
    monkeypatch.setattr(reports, "_get_api", lambda: None)
    monkeypatch.setattr(
        reports, "execute_graphql", lambda *_: {"project": {"id": "1", "internalId": "2"}}
    )


def test_the_workspace_serialises_with_its_panels_and_columns():
    model = dashboard.workspace("me", "mine")._to_model()
    content = json.loads(model.model_dump_json(by_alias=True))
    assert (content["entity"], content["project"]) == ("me", "mine")
    section = content["spec"]["section"]
    sections = {s["name"]: s["panels"] for s in section["panelBankConfig"]["sections"]}
    assert list(sections) == ["Accuracy and cost", "Training", "Patches that survive"]
    scatters = [p["config"] for p in sections["Accuracy and cost"] if "xAxis" in p["config"]]
    assert [(c["xAxis"], c["yAxis"]) for c in scatters] == [
        ("summary:macs", "summary:top1"),
        ("summary:throughput", "summary:top1"),
    ]
    (pictures,) = sections["Patches that survive"]
    assert pictures["config"]["mediaKeys"] == ["kept_patches"]
    text = json.dumps(section["runSets"])
    assert all(f"summary:{key}" in text for key in dashboard.KEYS)


def test_the_report_shows_runs_and_the_paper_apart(offline):
    report = dashboard.report("me", "mine")
    content = json.loads(report._to_model().spec.model_dump_json(by_alias=True))
    grids = [block for block in content["blocks"] if block["type"] == "panel-grid"]
    names = [[runs["name"] for runs in grid["metadata"]["runSets"]] for grid in grids]
    assert names == [["runs", "paper"], ["runs"], ["runs"]]
    filters = [runs["filters"]["filters"][0] for runs in grids[0]["metadata"]["runSets"]]
    assert [(f["key"]["name"], f["op"], f["value"]) for f in filters] == [
        ("jobType", "!=", "paper"),
        ("jobType", "=", "paper"),
    ]


def test_the_rows_of_the_paper_have_the_keys_of_runs():
    rows = dashboard.paper_runs()
    tables = paper.TABLES
    assert len({row["name"] for row in rows}) == len(rows)
    assert all(set(dashboard.KEYS) <= set(row) for row in rows)
    assert {row["model"] for row in rows} <= {p.stem for p in CONF_DIR.glob("model/*.yaml")}
    published = {
        (row["top1"], row["throughput"], row["macs"])
        for name, table in tables.items()
        if name != "off_the_shelf"
        for part in table.values()
        for row in ([part] if isinstance(part, dict) else part if isinstance(part, list) else [])
    }
    found = {(row["top1"], row["throughput"], row["macs"] / 1e9) for row in rows}
    assert {(a, b, round(c, 1)) for a, b, c in found} == published


def test_a_row_of_the_paper_is_a_run_that_can_be_told_from_ours(monkeypatch, tmp_path):
    made, summaries = [], []
    init, finish = wandb.init, wandb.Run.finish

    def start(**kwargs):
        made.append((kwargs, init(**kwargs | dict(dir=tmp_path))))
        return made[-1][1]

    def end(run):
        summaries.append(dict(run.summary))
        finish(run)

    monkeypatch.setattr(wandb, "init", start)
    monkeypatch.setattr(wandb.Run, "finish", end)
    row = dashboard.paper_runs()[1]
    dashboard.log_paper([row], project="p", entity=None, mode="offline")
    ((kwargs, run),) = made
    assert (run.group, run.job_type, run.name) == ("paper", "paper", row["name"])
    assert run.id == "paper-evit_deit_s-09-224-px-dropped" and kwargs["resume"] == "allow"
    assert summaries[0] | dict(name=row["name"]) == row


def saved(calls: list, what: str) -> object:
    class Saved:
        url = f"https://example.org/{what}"

        def save(self):
            calls.append(what)
            return self

    return Saved()


def test_logged_in_both_are_saved_and_with_paper_the_rows_first(monkeypatch, capsys):
    import dashboard as command

    calls: list = []
    monkeypatch.setattr("evit.tracking.wandb_mode", lambda _: "online")
    monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), dict(default_entity="me")))
    monkeypatch.setattr(dashboard, "log_paper", lambda rows, **k: calls.append((len(rows), k)))
    monkeypatch.setattr(dashboard, "workspace", lambda *a: saved(calls, "workspace"))
    monkeypatch.setattr(dashboard, "report", lambda *a: saved(calls, "report"))
    monkeypatch.setattr(sys, "argv", ["dashboard.py", "paper=true", "project=mine"])
    command.main()
    count = len(dashboard.paper_runs())
    where = dict(project="mine", entity="me", mode="online")
    assert calls == [(count, where), "workspace", "report"]
    assert "https://example.org/report" in capsys.readouterr().out


@pytest.mark.parametrize("reason", ["not logged in", "unreachable"])
def test_without_wandb_it_is_said_what_to_do(monkeypatch, capsys, reason):
    import dashboard as command

    def unreachable():
        raise wandb.errors.CommError("no network")

    logged_in = reason == "unreachable"
    monkeypatch.setattr("evit.tracking.wandb_mode", lambda _: "online" if logged_in else "offline")
    monkeypatch.setattr(wandb, "Api", unreachable)
    monkeypatch.setattr(sys, "argv", ["dashboard.py"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert ("no network" if logged_in else "run wandb login") in message


def test_sync_takes_what_was_not_uploaded_and_says_how_to_log_in(tmp_path):
    for name, content in (("aaaaaaaa", b"records"), ("bbbbbbbb", b"records"), ("cccccccc", b"")):
        folder = tmp_path / f"runs/x/wandb/offline-run-20260101_000000-{name}"
        folder.mkdir(parents=True)
        (folder / f"run-{name}.wandb").write_bytes(b":W&B\xe1\xbe\x00" + content)
    next(tmp_path.rglob("run-bbbbbbbb.wandb")).with_suffix(".wandb.synced").touch()
    env = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY" and k != "MAKEFLAGS"}
    env |= dict(HOME=str(tmp_path), WANDB_CONFIG_DIR=str(tmp_path))
    command = ["make", "--old-file=setup", "sync", f"RUNS={tmp_path}/runs"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "Syncing 1 run(s)" in done.stderr and "run-aaaaaaaa" in done.stderr
    assert "run-bbbbbbbb" not in done.stderr and "wandb login" in done.stderr
    assert "run-cccccccc" not in done.stderr  # killed before W&B wrote any record
    assert done.returncode


def test_the_knobs_are_these():
    assert set(OmegaConf.load(CONF_DIR / "dashboard.yaml")) - {"defaults", "hydra"} == {
        "project",
        "entity",
        "paper",
    }
