"""Work on tensors, in place and without synchronising, on any number of ranks."""
