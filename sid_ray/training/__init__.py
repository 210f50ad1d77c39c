"""One worker's life; runs under Ray, under torchrun or alone."""
