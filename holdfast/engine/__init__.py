"""A recipe at work: the contract of methods, and the `Bound` that carries it out."""
