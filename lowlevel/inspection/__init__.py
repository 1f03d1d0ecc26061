"""The parts of a loss: each scored token of a step or a row, and the way from log-probabilities to the loss.

example.py describes an example of any method; sft, pairs, labelled, rewards and sampled.py say what its numbers are;
terminal.py and page.py draw it. In Python, `found = run.inspect(step=5)`:

found.examples[0].numbers["margin"]                   # of the example; of a text: .texts[0].numbers["reward"]
found.examples[0].texts[0].columns["log-ratio"]       # (n,), of each scored token
found.examples[0].equation["margin"]                  # what the number is
"""
