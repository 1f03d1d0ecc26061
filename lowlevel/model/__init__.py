"""The model: 4-bit base, adapters on one flat buffer, and the policy and reference passes."""

import os

# bitsandbytes 0.50 gives kernels that no run uses to torch.compile, which imports torch's compiler for them: 0.5 s.
_disabled = os.environ.get("TORCHDYNAMO_DISABLE", "")
os.environ["TORCHDYNAMO_DISABLE"] = "1"
import bitsandbytes as bitsandbytes  # noqa: E402

os.environ["TORCHDYNAMO_DISABLE"] = _disabled
