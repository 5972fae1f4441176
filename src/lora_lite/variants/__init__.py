"""The variants that ship. `VARIANTS` is the only list of them; loading a file looks names up here."""

from lora_lite.config import AdapterConfig
from lora_lite.variants.dora import DoRAConfig
from lora_lite.variants.ia3 import IA3Config
from lora_lite.variants.ia3_ff import IA3FFConfig
from lora_lite.variants.lora import LoRAConfig
from lora_lite.variants.pissa import PiSSAConfig

VARIANTS: dict[str, type[AdapterConfig]] = {
    "lora": LoRAConfig,
    "pissa": PiSSAConfig,
    "dora": DoRAConfig,
    "ia3": IA3Config,
    "ia3_ff": IA3FFConfig,
}
