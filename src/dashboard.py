"""A W&B workspace of a project's runs: python src/dashboard.py project=NAME"""

from evit.commands import main

if __name__ == "__main__":
    main()
