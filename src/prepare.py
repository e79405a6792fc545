"""Write class folders as FFCV files: python src/prepare.py source=DIR"""

from evit.commands import main

if __name__ == "__main__":
    main()
