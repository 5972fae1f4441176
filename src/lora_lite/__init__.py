"""Parameter-efficient fine-tuning as pure functions: adapters on `torch.func`, for any module, without touching it."""

from lora_lite import functional as functional
from lora_lite import testing as testing
from lora_lite._check import checked as checked
from lora_lite._check import set_typecheck as set_typecheck
from lora_lite._tree import tree_leaves as tree_leaves
from lora_lite._tree import tree_map as tree_map
from lora_lite.adapt import Adapt as Adapt
from lora_lite.build import build as build
from lora_lite.config import AdapterConfig as AdapterConfig
from lora_lite.frozen import Frozen as Frozen
from lora_lite.io import load as load
from lora_lite.io import save as save
from lora_lite.targets import Target as Target
from lora_lite.targets import Targets as Targets
from lora_lite.targets import find_targets as find_targets
from lora_lite.transforms import value_and_grad as value_and_grad
from lora_lite.variants import VARIANTS as VARIANTS
from lora_lite.variants.adalora import AdaLoRAConfig as AdaLoRAConfig
from lora_lite.variants.antipasto import AntiPaSTOConfig as AntiPaSTOConfig
from lora_lite.variants.bitfit import BitFitConfig as BitFitConfig
from lora_lite.variants.delora import DeLoRAConfig as DeLoRAConfig
from lora_lite.variants.dora import DoRAConfig as DoRAConfig
from lora_lite.variants.hra import HRAConfig as HRAConfig
from lora_lite.variants.ia3 import IA3Config as IA3Config
from lora_lite.variants.ia3_ff import IA3FFConfig as IA3FFConfig
from lora_lite.variants.lora import LoRAConfig as LoRAConfig
from lora_lite.variants.lora_xs import LoRAXSConfig as LoRAXSConfig
from lora_lite.variants.oft import OFTConfig as OFTConfig
from lora_lite.variants.pissa import PiSSAConfig as PiSSAConfig
from lora_lite.variants.road import ROADConfig as ROADConfig
from lora_lite.variants.ssvd import SSVDConfig as SSVDConfig
from lora_lite.variants.vera import VeRAConfig as VeRAConfig

__version__ = "0.1.0"
