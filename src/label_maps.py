"""Make token labels: python src/label_maps.py source=DIR target=LABELS model_name=NAME"""

from evit.commands.cli import entry_point

main = entry_point("evit.commands.label_maps:run", config="label_maps")

if __name__ == "__main__":
    main()
