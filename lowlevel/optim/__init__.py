"""The optimizer with its schedule, the fp16 loss scale, and the counters that change during training."""
