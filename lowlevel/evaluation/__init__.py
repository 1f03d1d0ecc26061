"""Did it help, and what was lost: tasks of the LM Evaluation Harness, a judge of replies, forgetting, by stage."""
