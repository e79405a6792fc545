"""Time models: python src/benchmark.py keep_rates=[1,0.7,0.5] batch_sizes=[1,8]"""

from evit.commands import main

if __name__ == "__main__":
    main()
