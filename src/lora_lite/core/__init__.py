"""What variants are written against; it imports nothing else of the package."""
