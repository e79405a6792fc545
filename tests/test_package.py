"""The importable package."""

import subprocess
import sys

import evit
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


def test_everything_public_is_there():
    assert all(hasattr(evit, name) for name in evit.__all__)
