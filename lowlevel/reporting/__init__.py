"""`lowlevel report` and `lowlevel compare`: a run folder as curves and tables.

`report` only reads files, unless `--displaced` asks for the run's model."""
