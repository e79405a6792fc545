"""Train a model: python src/train.py model=evit_deit keep_rate=0.5 img_size=304"""

from evit.commands import main

if __name__ == "__main__":
    main()
