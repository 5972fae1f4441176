"""Fits for other libraries. Nothing here is imported by `lora_lite` itself."""
