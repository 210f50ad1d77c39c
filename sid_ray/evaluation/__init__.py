"""Features, FID, reference statistics, pictures."""
