"""What stands around the code cannot be turned against it: shells, caches, dependencies."""

import os
import re
import stat
import subprocess
import tomllib
from pathlib import Path
from unittest import mock

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from evit.commands.prepare import train_command
from tests.conftest import ROOT

ODD = "it's $(touch owned) `touch owned` \"; touch owned; $$(shell touch owned)"


def makefile(folder: Path, status: int = 0) -> Path:
    """A folder with our Makefile and, instead of Python, what shows its arguments."""
    (folder / ".venv").mkdir()
    for name in ("Makefile", "setup.sh", "requirements.txt", ".venv/.ready"):
        (folder / name).write_text((ROOT / "Makefile").read_text() if name == "Makefile" else "")
    shown = folder / "show"
    shown.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@"\nexit {status}\n')
    shown.chmod(0o755)
    return folder


def test_a_folder_s_name_is_not_run_by_make(tmp_path):
    options = dict(cwd=makefile(tmp_path), capture_output=True, text=True)
    arguments = [f"ROOT={ODD}", f"TARGET={ODD}", "PYTHON=./show", "-o", "setup", "-s"]
    done = subprocess.run(["make", "imagenet", *arguments], **options)
    assert done.stdout.splitlines()[1:3] == [f"source='{ODD}'", f"target='{ODD}'"], done.stderr
    done = subprocess.run(["make", "sync", f"RUNS={ODD}", "-o", "setup"], **options)
    assert "No such file" in done.stderr
    assert not (tmp_path / "owned").exists()


def test_a_folder_s_name_is_not_run_by_who_copies_a_command(tmp_path):
    printed = train_command(tmp_path / ODD, False).replace("python src/train.py", "printf %s")
    done = subprocess.run(["bash", "-c", printed], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"data.root={tmp_path / ODD}"  # which the command takes as it is
    assert not (tmp_path / "owned").exists()


def test_the_cache_of_torch_compile_is_in_the_home_folder(monkeypatch, tmp_path):
    """And not in /tmp, under a name that other users can guess."""
    from evit.commands import plan

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    model = torch.nn.Linear(1, 1)
    plan.compile_all(model, mock.Mock(losses=model.forward))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(f"{tmp_path}/")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def test_what_is_compiled_of_ours_is_loaded_from_no_folder_of_all_users():
    from evit.data.ffcv import augment as operations
    from evit.data.ffcv import decode

    library = re.search(r"'(\S+\.so)'", str(decode._library()))[1]
    for path in (Path(library), Path(operations.augment_batch._cache.cache_path)):
        for folder in (path, *path.parents):
            mode = folder.stat().st_mode
            assert not mode & 0o002 or mode & stat.S_ISVTX, folder  # /tmp has that bit


LIGHTNING = ["2.6.2", "2.6.3"]  # with malware: GHSA-w37p-236h-pfx3


def test_dependencies_are_pinned_and_the_malicious_ones_excluded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras.pop("imagenet") == ["scipy"]  # not installed unless it is wanted
    assert extras.pop("all") == [f"evit-lab[{','.join(name for name in extras if name != 'dev')}]"]
    groups = [project["dependencies"], *extras.values()]
    needed = [Requirement(text) for group in groups for text in group]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pinned)
    for pin in pinned:
        version = str(pin.specifier).removeprefix("==")
        assert not (pin.name in ("lightning", "pytorch-lightning") and version in LIGHTNING)
        for need in needed:
            if canonicalize_name(need.name) == canonicalize_name(pin.name):
                assert version in need.specifier, pin
    (lightning,) = (need for need in needed if need.name == "lightning")
    assert not any(version in lightning.specifier for version in LIGHTNING)
    assert {"!=2.6.2", "!=2.6.3"} <= set(map(str, lightning.specifier))
    assert {canonicalize_name(n.name) for n in needed} <= {
        canonicalize_name(p.name) for p in pinned
    }


def test_an_audit_is_of_all_that_is_pinned_and_fails_where_one_cannot_be_looked_up(tmp_path):
    command = ["make", "audit", "PYTHON=./show", "-o", "setup", "-s"]
    options = dict(cwd=makefile(tmp_path, status=1), capture_output=True, text=True)
    done = subprocess.run(command, **options)
    assert {"pip_audit", "--strict", "requirements.txt"} <= set(done.stdout.split())
    assert done.returncode and "could not be looked up" in done.stderr
