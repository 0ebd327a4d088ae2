"""Learning rates by part: search for them, record the trials, fuse several searches' results."""
