"""A W&B workspace and report of a project's runs: python src/dashboard.py paper=true"""

from evit.commands import main

if __name__ == "__main__":
    main()
