"""EDM mathematics and networks, in plain torch."""
