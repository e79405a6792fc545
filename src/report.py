"""Finished runs beside the paper: python src/report.py runs=outputs target=report"""

from evit.commands import main

if __name__ == "__main__":
    main()
