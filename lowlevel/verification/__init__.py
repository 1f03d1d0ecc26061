"""Verification: does a run compute what its formulas say, on this device and with its own data?

Every check runs functions of the training path (`method.micro_batches`, `method.loss`, `optimizer_step`) and compares
them with a recomputation that shares no code with them: float64, closed forms, rows rendered again. A user's own loss
is its own formula: its function is called in float64.
"""
