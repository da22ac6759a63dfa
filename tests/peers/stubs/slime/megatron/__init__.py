"""A stub: slime's advantages ask Megatron for the size of a group only."""
