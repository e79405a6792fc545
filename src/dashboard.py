"""A W&B workspace and report of a project's runs: python src/dashboard.py paper=true"""

import startup  # noqa: F401
from evit.config import DashboardConfig, entry_point


@entry_point("dashboard", DashboardConfig)
def main(cfg):
    from evit.commands.dashboard import run

    run(cfg)


if __name__ == "__main__":
    main()
