"""Which patches survive: python src/visualize.py checkpoint=PATH images=DIR keep_rate=0.5"""

import startup  # noqa: F401
from evit.config import VisualizeConfig, entry_point


@entry_point("visualize", VisualizeConfig)
def main(cfg):
    from evit.commands.visualize import run

    run(cfg)


if __name__ == "__main__":
    main()
