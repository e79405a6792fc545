"""One file for each command of src/."""
