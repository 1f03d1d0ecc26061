"""Data: rows from files and the hub, chat rendering, token ids with supervised spans, and the data report."""
