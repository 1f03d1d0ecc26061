"""Verification: whether what a run computes is what its formulas say, here, on this device, with its own data.

Every check runs functions of the training path (`method.micro_batches`, `method.loss`, `optimizer_step`) and compares
them with a recomputation that shares no code with them: float64, closed forms, rows rendered again.
"""

from lowlevel.verification.check import Check
from lowlevel.verification.report import run_checks
from lowlevel.verification.subject import Subject

__all__ = ["Check", "Subject", "run_checks"]
