"""The same job in other tools: each file measures one case in a process of its own (`python -m ... JOB.json`)."""
