"""Which patches survive: python src/visualize.py checkpoint=PATH images=DIR keep_rate=0.5"""

from evit.commands import main

if __name__ == "__main__":
    main()
