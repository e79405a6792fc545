"""Predict the classes of images: python src/predict.py checkpoint=PATH images=DIR"""

from evit.commands.cli import entry_point

main = entry_point("evit.commands.images:predict", config="predict")

if __name__ == "__main__":
    main()
