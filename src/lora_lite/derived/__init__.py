"""What follows from a variant's function: merged weights, mixed batches, counts."""
