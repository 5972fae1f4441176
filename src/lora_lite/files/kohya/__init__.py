"""The one-file adapters of image tools: kohya's and LyCORIS', and diffusers'. None of these packages is imported."""

from lora_lite.files.kohya.read import from_diffusers as from_diffusers
from lora_lite.files.kohya.read import from_kohya as from_kohya
from lora_lite.files.kohya.write import to_diffusers as to_diffusers
from lora_lite.files.kohya.write import to_kohya as to_kohya
