"""Make token labels: python src/label_maps.py source=DIR target=LABELS model_name=NAME"""

from evit.commands import main

if __name__ == "__main__":
    main()
