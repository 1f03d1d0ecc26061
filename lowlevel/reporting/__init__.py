"""`lowlevel report`: what a run folder holds, as curves and tables. Reads files alone: no model, no data, no GPU,
unless it is asked which tokens took the probability of displaced pairs."""
