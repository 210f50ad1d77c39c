"""How a generator learns from a teacher: pure functions."""
