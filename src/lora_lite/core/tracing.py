"""Whether something traces or transforms the code that runs."""

import torch


def transformed() -> bool:
    """Whether a torch.func transform is active."""
    return torch._C._are_functorch_transforms_active()  # `peek_interpreter_stack() is None` is never true while compiling


def in_transform() -> bool:
    """Whether a transform, a compilation or inference mode is active. In inference mode plain autograd records nothing."""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or transformed()
