"""The command line: `python -m lora_lite`, and `lora-lite` where the package is installed."""

from lora_lite.cli.main import main as main
