"""Taking a logged step again from the checkpoint before it, and comparing it with the log.

session   the run set up again at a checkpoint before the step; the same step under other settings
compare   logged and saved numbers against those of the replay
dump      every intermediate of one step as safetensors
"""
