"""Taking a logged step again, from the checkpoint before it, and holding it against what the run wrote down.

session   the run's own parts, and the weights of a checkpoint before the step
compare   logged and saved numbers beside those of the replay
dump      every intermediate of one step as safetensors
what_if   the same step under other settings
"""
