"""Where a teacher comes from, and how models lie on disk."""
