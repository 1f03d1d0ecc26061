"""Where a step's time goes: a clock, the phases of a step, and steps taken through the loop that trains."""
