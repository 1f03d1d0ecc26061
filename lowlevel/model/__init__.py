"""The model: 4-bit base, adapters on one flat buffer, and the policy and reference passes."""
