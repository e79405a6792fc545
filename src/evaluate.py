"""Evaluate a checkpoint: python src/evaluate.py checkpoint=PATH keep_rates=[1,0.7,0.5]"""

import startup  # noqa: F401
from evit.config import EvaluateConfig, entry_point


@entry_point("evaluate", EvaluateConfig)
def main(cfg):
    from evit.commands.evaluate import run

    run(cfg)


if __name__ == "__main__":
    main()
