"""Train a model: python src/train.py model=evit_deit keep_rate=0.5 img_size=304"""

import startup  # noqa: F401

# isort: split
import wandb.apis.public  # noqa: F401  wandb.init() does it, for 0.5 s once PyTorch is there

from evit.config import RunConfig, entry_point


@entry_point("config", RunConfig)
def main(cfg):
    if cfg.dry_run:
        from evit.dry_run import run
    else:
        from evit.experiment import run

    run(cfg)


if __name__ == "__main__":
    main()
