"""PEFT's files, read and written directly: the package `peft` is never imported."""

from lora_lite.files.peft.read import from_peft as from_peft
from lora_lite.files.peft.write import to_peft as to_peft
