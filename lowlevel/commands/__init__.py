"""What people do with runs: one module a command of the command line."""
