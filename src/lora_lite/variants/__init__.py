"""The variants that ship. `VARIANTS` is the only list of them; loading a file looks names up here."""

from lora_lite.core.config import AdapterConfig
from lora_lite.variants.adalora import AdaLoRAConfig
from lora_lite.variants.antipasto import AntiPaSTOConfig
from lora_lite.variants.asvd import ASVDConfig
from lora_lite.variants.bitfit import BitFitConfig
from lora_lite.variants.corda import CorDAConfig
from lora_lite.variants.delora import DeLoRAConfig
from lora_lite.variants.dora import DoRAConfig
from lora_lite.variants.eva import EVAConfig
from lora_lite.variants.full import FullConfig
from lora_lite.variants.hra import HRAConfig
from lora_lite.variants.ia3 import IA3Config
from lora_lite.variants.ia3_ff import IA3FFConfig
from lora_lite.variants.ln_tuning import LNTuningConfig
from lora_lite.variants.loftq import LoftQConfig
from lora_lite.variants.lora import LoRAConfig
from lora_lite.variants.lora_ga import LoRAGAConfig
from lora_lite.variants.lora_xs import LoRAXSConfig
from lora_lite.variants.loreft import LoReFTConfig
from lora_lite.variants.oft import OFTConfig
from lora_lite.variants.pissa import PiSSAConfig
from lora_lite.variants.road import ROADConfig
from lora_lite.variants.ssvd import SSVDConfig
from lora_lite.variants.vera import VeRAConfig

VARIANTS: dict[str, type[AdapterConfig]] = {
    "lora": LoRAConfig,
    "pissa": PiSSAConfig,
    "dora": DoRAConfig,
    "ia3": IA3Config,
    "ia3_ff": IA3FFConfig,
    "delora": DeLoRAConfig,
    "hra": HRAConfig,
    "road": ROADConfig,
    "oft": OFTConfig,
    "lora_xs": LoRAXSConfig,
    "antipasto": AntiPaSTOConfig,
    "ssvd": SSVDConfig,
    "bitfit": BitFitConfig,
    "eva": EVAConfig,
    "corda": CorDAConfig,
    "asvd": ASVDConfig,
    "loftq": LoftQConfig,
    "vera": VeRAConfig,
    "adalora": AdaLoRAConfig,
    "lora_ga": LoRAGAConfig,
    "loreft": LoReFTConfig,
    "ln_tuning": LNTuningConfig,
    "full": FullConfig,
}
