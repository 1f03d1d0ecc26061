"""How the built-in base of the demo was made: its corpus and the script that pre-trains it."""
