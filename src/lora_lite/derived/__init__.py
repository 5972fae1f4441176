"""Derivations from a variant's pure function: merged weights, mixed batches, counts."""
