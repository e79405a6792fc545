"""Finished runs beside the paper: python src/report.py runs=outputs target=report"""

import startup  # noqa: F401
from evit.config import ReportConfig, entry_point


@entry_point("report", ReportConfig)
def main(cfg):
    from pathlib import Path

    from evit.commands import report

    report.write(Path(cfg.runs), Path(cfg.target) if cfg.target else None, cfg.page)


if __name__ == "__main__":
    main()
