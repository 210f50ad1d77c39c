"""Ray at the edges."""
