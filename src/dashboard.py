"""A W&B workspace of a project's runs: python src/dashboard.py"""

from evit.commands import main

if __name__ == "__main__":
    main()
