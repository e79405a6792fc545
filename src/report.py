"""Finished runs beside the paper: python src/report.py runs=outputs target=report"""

from evit.commands.cli import entry_point

main = entry_point("evit.commands.report:run", config="report")

if __name__ == "__main__":
    main()
