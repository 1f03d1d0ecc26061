"""Did it help, and what was lost: tasks of the LM Evaluation Harness, and loss and KL on general text, by stage."""
