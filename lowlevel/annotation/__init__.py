"""A person in the loop: two replies to a prompt, judged blind on a local page, become preference pairs."""
