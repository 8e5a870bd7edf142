"""What passes share: blocks walked one by one, rounding, learning, the parts of layers that can go."""
