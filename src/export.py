"""Models as files: python src/export.py checkpoint=PATH keep_rate=0.7 format=onnx"""

from evit.commands import main

if __name__ == "__main__":
    main()
