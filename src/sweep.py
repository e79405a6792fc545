"""Run a sweep: python src/sweep.py keeprate slots=2 data.root=DIR --dry-run"""

import sys

from evit.commands.cli import ended_in_a_line


def main() -> None:
    with ended_in_a_line():
        from evit.commands.sweep import run

        sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
