"""Which keep rates lose least at a cost: python src/search.py checkpoint=PATH gmacs=3.0"""

from evit.commands.cli import entry_point

main = entry_point("evit.commands.search:run", config="search")

if __name__ == "__main__":
    main()
