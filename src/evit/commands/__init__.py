"""One file, one command: what src/*.py call."""
