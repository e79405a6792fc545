"""The commands: one file for each script of src/."""
