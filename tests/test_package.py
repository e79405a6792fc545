"""The importable package."""

import subprocess
import sys
import tomllib

import evit
from evit import commands as cli
from evit.config import CONF_DIR
from tests.conftest import ROOT


def test_importing_evit_needs_torch_and_timm_alone():
    heavy = "lightning hydra ffcv numba torchmetrics rich".split()
    code = f"import sys, evit; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_pinned_versions_have_names_and_versions_only():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert len(lines) > 50
    assert not [line for line in lines if "://" in line or "@" in line]


def test_each_installed_command_is_one_of_src(monkeypatch):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    started = []
    monkeypatch.setattr(cli, "start", lambda *names: started.append(names))
    for name, function in scripts.items():
        assert function == "evit.commands:main"
        monkeypatch.setattr(sys, "argv", [f"/venv/bin/{name}"])
        cli.main()
    for name, config in started:
        assert (ROOT / f"src/{name}.py").is_file() and (CONF_DIR / f"{config}.yaml").is_file()
    rest = {path.stem for path in (ROOT / "src").glob("*.py")} - {name for name, _ in started}
    assert rest == {"sweep"}  # whose runs are started in a checkout


def test_an_installed_command_imports_torch_only_when_it_works():
    code = "import sys; sys.argv = ['/bin/evit-train']; import evit; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_everything_public_is_there():
    assert all(hasattr(evit, name) for name in evit.__all__)
