"""Run a sweep: python src/sweep.py keeprate slots=2 data.root=DIR --dry-run"""

import gc
import sys

from hydra.errors import HydraException

import startup  # noqa: F401
from evit.ending import fail, program


def main():
    from evit.commands.sweep import run

    gc.enable()
    try:
        sys.exit(run(sys.argv[1:]))
    except (ValueError, HydraException) as error:
        fail(error)


if __name__ == "__main__":
    program(main)
