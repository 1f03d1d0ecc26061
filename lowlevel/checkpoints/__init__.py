"""What a run saves: sealed by hashes, complete or absent, verified before it is read."""
