"""Commands around the program."""
