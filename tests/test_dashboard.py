"""The W&B dashboard as code, without W&B; and what it and `make sync` say who is not logged in."""

import json
import os
import subprocess
import sys

import pytest
import wandb
from omegaconf import OmegaConf

from evit.commands import report as dashboard
from evit.config import CONF_DIR
from tests.conftest import ROOT


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


def test_logged_in_the_workspace_is_saved(monkeypatch, capsys):
    import dashboard as command

    class Saved:
        url = "https://example.org/workspace"

        def save(self):
            return self

    made: list = []
    monkeypatch.setattr("evit.tracking.wandb_mode", lambda _: "online")
    monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), dict(default_entity="me")))
    monkeypatch.setattr(dashboard, "workspace", lambda *where: made.append(where) or Saved())
    monkeypatch.setattr(sys, "argv", ["dashboard.py", "project=mine"])
    command.main()
    assert made == [("me", "mine")]
    assert "https://example.org/workspace" in capsys.readouterr().out


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
    }
