"""What several methods share: anchors, importance, kept answers, Gram matrices."""
