"""Run a sweep: python src/sweep.py keeprate slots=2 data.root=DIR --dry-run"""

from evit.commands import main

if __name__ == "__main__":
    main()
