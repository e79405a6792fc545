"""A W&B workspace and report of a project's runs: python src/dashboard.py paper=true"""

from evit.commands.cli import entry_point

main = entry_point("evit.commands.dashboard:run", config="dashboard")

if __name__ == "__main__":
    main()
