"""Write class folders as FFCV files: python src/prepare.py source=DIR"""

import startup  # noqa: F401
from evit.config import PrepareConfig, entry_point


@entry_point("prepare", PrepareConfig)
def main(cfg):
    from evit.commands.prepare import prepare

    prepare(**cfg)


if __name__ == "__main__":
    main()
