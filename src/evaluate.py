"""Evaluate a checkpoint: python src/evaluate.py checkpoint=PATH keep_rates=[1,0.7,0.5]"""

from evit.commands import main

if __name__ == "__main__":
    main()
