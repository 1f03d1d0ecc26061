"""[trace]: what traced steps computed of each example, as parquet files that any reader of parquet can open.

RUN/trace/
  pairs-00000001-00000050.parquet      a row a pair and step (dpo), of steps 1 to 50
  examples-00000001-00000050.parquet   a row an example and step (sft)
  steps-00000001-00000050.parquet      a row a step; with trace.gradients also what its gradient was

    datasets.load_dataset("parquet", data_files="RUN/trace/pairs-*.parquet")     pandas.read_parquet(one of the files)

Every number is the one that the step computed: the loss hands its tensors over, and nothing runs twice. Only the two
weights, -dL/d(chosen reward) and dL/d(rejected reward), come from one more derivative of the same loss at the same four
log-probabilities.
"""

from lowlevel.tracing.files import drop_after, read_trace
from lowlevel.tracing.tracer import Tracer

__all__ = ["Tracer", "drop_after", "read_trace"]
