"""The commands, one file each; src/*.py start them."""
