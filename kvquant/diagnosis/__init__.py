"""What a machine can run, what it does with a model, and what fits in its memory."""
