"""Make token labels: python src/label_maps.py source=DIR target=LABELS model_name=NAME"""

import startup  # noqa: F401
from evit.config import LabelMapsConfig, entry_point


@entry_point("label_maps", LabelMapsConfig)
def main(cfg):
    from evit.commands.label_maps import make_label_maps

    make_label_maps(**cfg)


if __name__ == "__main__":
    main()
