"""What a network is made of: its parts, stacks and layers, and how fast each part learns."""
