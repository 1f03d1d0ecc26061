"""One file per command of the command line: its help (the docstring), options and run. cli.py lists them."""
