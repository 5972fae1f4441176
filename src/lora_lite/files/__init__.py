"""Adapter files: the library's own and PEFT's."""
