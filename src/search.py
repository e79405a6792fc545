"""Which keep rates lose least at a cost: python src/search.py checkpoint=PATH gmacs=3.0"""

from evit.commands import main

if __name__ == "__main__":
    main()
