"""Predict the classes of images: python src/predict.py checkpoint=PATH images=DIR"""

from evit.commands import main

if __name__ == "__main__":
    main()
