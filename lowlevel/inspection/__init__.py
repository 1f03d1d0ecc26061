"""The parts of a loss: each scored token of a step or a row, and the path from log-probabilities to the loss.

records = inspect_pairs(policy, method, examples)     # of records.py; inspect_sequences (sft), and in kto_and_reward.py
                                                      # inspect_labelled, inspect_rewards; `opening.inspect_run`: a run
records[0].chosen.contributions                       # (n,): beta * log-ratio of each token; together with the rejected
records[0].margin                                     # ones they sum to the margin
records[0].displacement                               # tokens that gained what the chosen completion lost, or None
"""
