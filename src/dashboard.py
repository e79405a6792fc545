"""A W&B workspace and report of a project's runs: python src/dashboard.py paper=true"""

from evit.commands.cli import main

if __name__ == "__main__":
    main()
