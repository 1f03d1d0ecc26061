"""What a run saves as it goes: checkpoints, verified by SHA-256 before they are read; tables that are cut at them."""
