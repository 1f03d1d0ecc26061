"""The time of a step and of its phases, measured on steps of the training loop."""
