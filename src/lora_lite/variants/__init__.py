"""The variants that ship. `VARIANTS` is their only list: the public names, `functional` and the documentation follow from it."""

from typing import TYPE_CHECKING

from lora_lite.core.config import AdapterConfig as _AdapterConfig
from lora_lite.variants.abba import ABBAConfig as ABBAConfig
from lora_lite.variants.adalora import AdaLoRAConfig as AdaLoRAConfig
from lora_lite.variants.adamss import AdaMSSConfig as AdaMSSConfig
from lora_lite.variants.alora import ALoRAConfig as ALoRAConfig
from lora_lite.variants.antipasto import AntiPaSTOConfig as AntiPaSTOConfig
from lora_lite.variants.asvd import ASVDConfig as ASVDConfig
from lora_lite.variants.bitfit import BitFitConfig as BitFitConfig
from lora_lite.variants.boft import BOFTConfig as BOFTConfig
from lora_lite.variants.c3a import C3AConfig as C3AConfig
from lora_lite.variants.clover import CLOVERConfig as CLOVERConfig
from lora_lite.variants.corda import CorDAConfig as CorDAConfig
from lora_lite.variants.deft import DEFTConfig as DEFTConfig
from lora_lite.variants.delora import DeLoRAConfig as DeLoRAConfig
from lora_lite.variants.dora import DoRAConfig as DoRAConfig
from lora_lite.variants.ether import ETHERConfig as ETHERConfig
from lora_lite.variants.ether_plus import ETHERPlusConfig as ETHERPlusConfig
from lora_lite.variants.eva import EVAConfig as EVAConfig
from lora_lite.variants.fourierft import FourierFTConfig as FourierFTConfig
from lora_lite.variants.frod import FRoDConfig as FRoDConfig
from lora_lite.variants.full import FullConfig as FullConfig
from lora_lite.variants.glora import GLoRAConfig as GLoRAConfig
from lora_lite.variants.goft import GOFTConfig as GOFTConfig
from lora_lite.variants.gralora import GraLoRAConfig as GraLoRAConfig
from lora_lite.variants.hira import HiRAConfig as HiRAConfig
from lora_lite.variants.hra import HRAConfig as HRAConfig
from lora_lite.variants.ia3 import IA3Config as IA3Config
from lora_lite.variants.ia3_ff import IA3FFConfig as IA3FFConfig
from lora_lite.variants.kasa import KaSAConfig as KaSAConfig
from lora_lite.variants.lily import LilyConfig as LilyConfig
from lora_lite.variants.ln_tuning import LNTuningConfig as LNTuningConfig
from lora_lite.variants.loftq import LoftQConfig as LoftQConfig
from lora_lite.variants.loha import LoHaConfig as LoHaConfig
from lora_lite.variants.lokr import LoKrConfig as LoKrConfig
from lora_lite.variants.lora import LoRAConfig as LoRAConfig
from lora_lite.variants.lora_ga import LoRAGAConfig as LoRAGAConfig
from lora_lite.variants.lora_xs import LoRAXSConfig as LoRAXSConfig
from lora_lite.variants.loreft import LoReFTConfig as LoReFTConfig
from lora_lite.variants.mica import MiCAConfig as MiCAConfig
from lora_lite.variants.miss import MiSSConfig as MiSSConfig
from lora_lite.variants.oft import OFTConfig as OFTConfig
from lora_lite.variants.olora import OLoRAConfig as OLoRAConfig
from lora_lite.variants.osf import OSFConfig as OSFConfig
from lora_lite.variants.peanut import PEANuTConfig as PEANuTConfig
from lora_lite.variants.pissa import PiSSAConfig as PiSSAConfig
from lora_lite.variants.psoft import PSOFTConfig as PSOFTConfig
from lora_lite.variants.pvera import PVeRAConfig as PVeRAConfig
from lora_lite.variants.qgoft import QGOFTConfig as QGOFTConfig
from lora_lite.variants.randlora import RandLoRAConfig as RandLoRAConfig
from lora_lite.variants.road import ROADConfig as ROADConfig
from lora_lite.variants.shira import SHiRAConfig as SHiRAConfig
from lora_lite.variants.ssvd import SSVDConfig as SSVDConfig
from lora_lite.variants.supertuning import SuperTuningConfig as SuperTuningConfig
from lora_lite.variants.svft import SVFTConfig as SVFTConfig
from lora_lite.variants.tinylora import TinyLoRAConfig as TinyLoRAConfig
from lora_lite.variants.tokens import TokensConfig as TokensConfig
from lora_lite.variants.unilora import UniLoRAConfig as UniLoRAConfig
from lora_lite.variants.vblora import VBLoRAConfig as VBLoRAConfig
from lora_lite.variants.vera import VeRAConfig as VeRAConfig
from lora_lite.variants.waveft import WaveFTConfig as WaveFTConfig

VARIANTS: dict[str, type[_AdapterConfig]] = {
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
    "alora": ALoRAConfig,
    "loreft": LoReFTConfig,
    "lily": LilyConfig,
    "kasa": KaSAConfig,
    "ln_tuning": LNTuningConfig,
    "loha": LoHaConfig,
    "lokr": LoKrConfig,
    "hira": HiRAConfig,
    "gralora": GraLoRAConfig,
    "boft": BOFTConfig,
    "full": FullConfig,
    "olora": OLoRAConfig,
    "mica": MiCAConfig,
    "ether": ETHERConfig,
    "ether_plus": ETHERPlusConfig,
    "miss": MiSSConfig,
    "shira": SHiRAConfig,
    "c3a": C3AConfig,
    "fourierft": FourierFTConfig,
    "waveft": WaveFTConfig,
    "pvera": PVeRAConfig,
    "tinylora": TinyLoRAConfig,
    "unilora": UniLoRAConfig,
    "abba": ABBAConfig,
    "frod": FRoDConfig,
    "randlora": RandLoRAConfig,
    "vblora": VBLoRAConfig,
    "tokens": TokensConfig,
    "goft": GOFTConfig,
    "qgoft": QGOFTConfig,
    "svft": SVFTConfig,
    "psoft": PSOFTConfig,
    "clover": CLOVERConfig,
    "deft": DEFTConfig,
    "peanut": PEANuTConfig,
    "supertuning": SuperTuningConfig,
    "osf": OSFConfig,
    "glora": GLoRAConfig,
    "adamss": AdaMSSConfig,
}

if not TYPE_CHECKING:  # a type checker cannot compute the list, and without one takes the names that are imported as themselves
    __all__ = sorted(["VARIANTS", *(cls.__name__ for cls in VARIANTS.values())])
