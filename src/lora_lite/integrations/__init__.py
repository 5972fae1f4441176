"""Adapters to other libraries. `lora_lite` itself imports nothing from here."""
