"""[trace]: the values that traced steps computed for each example, as parquet files.

RUN/trace/
  pairs-00000001-00000050.parquet      one row per pair and step (dpo), steps 1 to 50
  examples-00000001-00000050.parquet   one row per example and step (other methods)
  steps-00000001-00000050.parquet      one row per step; with trace.gradients also norms of its gradient

    datasets.load_dataset("parquet", data_files="RUN/trace/pairs-*.parquet")     pandas.read_parquet(one of the files)

The loss returns the tensors of the step, so every number is the step's own and nothing is computed twice. Only the two
weights, -dL/d(chosen reward) and dL/d(rejected reward), come from one more derivative of the same loss at the same
log-probabilities. They are NaN for a custom loss that reads token log-probabilities.
"""

from lowlevel.tracing.tracer import Tracer

__all__ = ["Tracer"]
