"""Learning rates by part: search them, write down what was tried, fuse what several found."""
