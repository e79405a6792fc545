"""Which patches survive: python src/visualize.py checkpoint=PATH images=DIR keep_rate=0.5"""

from evit.commands.cli import entry_point

main = entry_point("evit.commands.images:visualize", config="visualize")

if __name__ == "__main__":
    main()
