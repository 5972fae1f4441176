"""Functions of a params tree: gradients, curvature, conversions."""
