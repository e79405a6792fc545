"""Write class folders as FFCV files: python src/prepare.py source=DIR"""

from evit.commands.cli import entry_point

main = entry_point("evit.commands.prepare:run", config="prepare")

if __name__ == "__main__":
    main()
