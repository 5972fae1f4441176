"""Parameter-efficient fine-tuning as pure functions: adapters on `torch.func`, for any module, without touching it."""

import typing as _typing

from lora_lite import functional as functional
from lora_lite import testing as testing
from lora_lite.adapt import Adapt as Adapt
from lora_lite.build import build as build
from lora_lite.core import elsewhere as _elsewhere
from lora_lite.core import linalg as linalg
from lora_lite.core.certificate import Start as Start
from lora_lite.core.checked import checked as checked
from lora_lite.core.checked import set_typecheck as set_typecheck
from lora_lite.core.config import AdapterConfig as AdapterConfig
from lora_lite.core.fields import Count as Count
from lora_lite.core.fields import Even as Even
from lora_lite.core.fields import NonNegative as NonNegative
from lora_lite.core.fields import Positive as Positive
from lora_lite.core.fields import Probability as Probability
from lora_lite.core.fields import Rank as Rank
from lora_lite.core.fields import Size as Size
from lora_lite.core.fields import Within as Within
from lora_lite.core.frozen import Constants as Constants
from lora_lite.core.frozen import Frozen as Frozen
from lora_lite.core.plan import Target as Target
from lora_lite.core.plan import Targets as Targets
from lora_lite.core.statistics import Gradient as Gradient
from lora_lite.core.statistics import Statistics as Statistics
from lora_lite.core.tree import tree_leaves as tree_leaves
from lora_lite.core.tree import tree_map as tree_map
from lora_lite.files.adapter_file import load as load
from lora_lite.files.adapter_file import save as save
from lora_lite.files.card import model_card as model_card
from lora_lite.files.kohya import from_diffusers as from_diffusers
from lora_lite.files.kohya import from_kohya as from_kohya
from lora_lite.files.kohya import to_diffusers as to_diffusers
from lora_lite.files.kohya import to_kohya as to_kohya
from lora_lite.files.peft import from_peft as from_peft
from lora_lite.files.peft import to_peft as to_peft
from lora_lite.layers.fused import FusedKind as FusedKind
from lora_lite.layers.kind import Kind as Kind
from lora_lite.layers.quantised import FrozenQuantised as FrozenQuantised
from lora_lite.prepare.targets import find_targets as find_targets
from lora_lite.transforms.all_reduce import all_reduce_mean as all_reduce_mean
from lora_lite.transforms.combine import combine as combine
from lora_lite.transforms.curvature import fisher_diag as fisher_diag
from lora_lite.transforms.curvature import ggn_vp as ggn_vp
from lora_lite.transforms.curvature import hvp as hvp
from lora_lite.transforms.gradients import set_grads as set_grads
from lora_lite.transforms.gradients import value_and_grad as value_and_grad
from lora_lite.transforms.lora_plus import lora_plus as lora_plus
from lora_lite.transforms.per_example import per_example_grad as per_example_grad
from lora_lite.transforms.per_example import per_example_norm as per_example_norm
from lora_lite.transforms.preconditioned import lora_fa as lora_fa
from lora_lite.transforms.preconditioned import riemannian as riemannian
from lora_lite.transforms.stacks import stack as stack
from lora_lite.transforms.stacks import unstack as unstack
from lora_lite.transforms.to_lora import to_lora as to_lora
from lora_lite.variants import *  # noqa: F403

__version__ = "0.1.0"


if not _typing.TYPE_CHECKING:  # else every name would be known

    def __getattr__(name: str) -> _typing.NoReturn:
        """Raise, and name the way to what other libraries have under this name."""
        _elsewhere.refuse_name(__name__, name, __dir__())


def __dir__() -> list[str]:
    """Return the public names; the packages inside are reached by imports."""
    modules = ("functional", "linalg", "testing")
    inner = type(functional)
    return sorted(name for name, value in globals().items() if name in modules or not (isinstance(value, inner) or name == "__builtins__"))
