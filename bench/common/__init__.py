"""The parts that benchmarks share: models, data, methods, the clock, results files and tables."""
