"""Models as files: python src/export.py checkpoint=PATH keep_rate=0.7 format=onnx"""

from evit.commands.cli import entry_point

main = entry_point("evit.commands.export:run", config="export")

if __name__ == "__main__":
    main()
