"""`python -m lowlevel` and the console script."""

from lowlevel.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
