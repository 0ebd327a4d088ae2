"""What several methods share: start weights, importance, kept answers."""
