"""Models as files: python src/export.py checkpoint=PATH keep_rate=0.7 format=onnx"""

import startup  # noqa: F401
from evit.config import ExportConfig, entry_point


@entry_point("export", ExportConfig)
def main(cfg):
    from evit.commands.export import run

    run(cfg)


if __name__ == "__main__":
    main()
