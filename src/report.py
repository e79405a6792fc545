"""Tables of finished runs: python src/report.py runs=outputs/NAME"""

from evit.config import ReportConfig, entry_point


@entry_point("report", ReportConfig)
def main(cfg):
    from pathlib import Path

    from evit.report import tables

    tables.write(Path(cfg.runs), Path(cfg.target) if cfg.target else None)


if __name__ == "__main__":
    main()
