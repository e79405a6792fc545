"""Time models: python src/benchmark.py keep_rates=[1,0.7,0.5] batch_sizes=[1,8]"""

import startup  # noqa: F401
from evit.config import BenchmarkConfig, entry_point


@entry_point("benchmark", BenchmarkConfig)
def main(cfg):
    from evit.commands.benchmark import run

    run(cfg)


if __name__ == "__main__":
    main()
