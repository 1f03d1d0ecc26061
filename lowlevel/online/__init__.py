"""Training on sampled completions: reward functions, the rollouts of a step, and where they are kept."""
