"""Trained tokens in PEFT's files: of `TrainableTokensConfig`, and of `trainable_token_indices` beside another method.

PEFT keeps full rows, we displacements. The ids are in the config: one list for all, or one for each name of an embedding. Of modules that
share a weight PEFT may write each, with the same rows.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.core.errors import listed
from lora_lite.core.tree import Tree, join
from lora_lite.files.peft import twice
from lora_lite.files.peft.layers import LOAD, is_packed
from lora_lite.files.peft.whole import ambiguous
from lora_lite.prepare.targets import sharing
from lora_lite.variants.tokens import TokensConfig

TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
BESIDE = ("LORA", "ADALORA")
"""The PEFT types whose config has the field `trainable_token_indices`."""
_ROWS, _INSIDE, _BASE = "trainable_tokens_delta", "token_adapter.", "base_layer.weight"


_APART = (
    "PEFT trains both apart, and here a row moves in all modules that have it. Run the adapter by PEFT, or train one without either of them"
)


class Rows(NamedTuple):
    """The rows that a file has for one table."""

    ids: tuple[int, ...]
    values: Tensor

    @property
    def config(self) -> TokensConfig:
        """Our config, without the table's name."""
        return TokensConfig(token_ids=self.ids, dtype=torch.float64 if self.values.dtype == torch.float64 else torch.float32)

    def once(self) -> "Rows":
        """Return a row for each token that a file names several times, whose rows are alike: they have the same gradients in PEFT."""
        last = {token: k for k, token in enumerate(self.ids)}
        return self if len(last) == len(self.ids) else Rows(tuple(last), self.values[list(last.values())])


def split(
    model: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Rows], dict[str, Tensor], list[str]]:
    """Split a file's tensors into the rows of tokens, by the path of their table, and the rest; with the faults of the former."""
    inside = "" if fields["peft_type"] == TRAINABLE_TOKENS else _INSIDE
    rest, found, faults, shared = dict(tensors), dict[str, Rows](), list[str](), sharing(model)
    for path, module in model.named_modules():
        at = join(path, inside)
        values = rest.get(prefix + at + _ROWS)
        first = next((other for other in shared.get(path, ()) if other in found), None)
        own = _ids(model, fields, path)
        ids = found[first].ids if first else own
        weight = module._parameters.get("weight")
        if values is None or ids is None or weight is None:
            continue
        del rest[prefix + at + _ROWS]
        base = rest.pop(prefix + at + _BASE, None)
        if first and own not in (None, ids):
            faults.append(f'"{path}": its tokens are others than those of "{first}", whose weight it shares: {_APART}')
            continue
        faults += _unlike(module, path) or _faults(path, ids, values, weight, base)
        if first is None:
            found[path] = Rows(ids, values)
            left = [] if faults else unfollowed(model, path)
            faults += [f'"{path}": PEFT leaves {listed(left)} as it was, which share its weight and follow here'] if left else []
        elif not torch.equal(values, found[first].values):
            faults.append(f'"{prefix + at + _ROWS}": expected the rows of "{first}", whose weight it shares, found others')
    if _promised(fields) and not found:
        faults.append(f"{_field(fields)}: expected the rows of tokens {listed(map(str, _all_ids(fields)))}, found none")
    return found if faults else {path: rows.once() for path, rows in found.items()}, rest, faults


def _unlike(module: nn.Module, path: str) -> list[str]:
    """Return the reason why PEFT's rows at a layer are none of it: they are of the stored weight, and its product leaves a bias out."""
    name = type(module).__name__
    if is_packed(module):
        return [f'"{path}": TokensConfig: PEFT moves rows of a `weight` as it is stored, and the {name}\'s is packed']
    if getattr(module, "bias", None) is not None:
        return [f'"{path}": TokensConfig: PEFT multiplies by the weight alone there, without the bias of the {name}']
    return []


def _faults(path: str, ids: Sequence[int], values: Tensor, weight: Tensor, base: Tensor | None) -> list[str]:
    want = (len(ids), weight.shape[-1])
    if tuple(values.shape) != want or not values.is_floating_point():
        return [f'"{path}": expected rows of shape {want} for its {len(ids)} tokens, found {tuple(values.shape)} of {values.dtype}']
    first = {token: values[k] for k, token in reversed(list(enumerate(ids)))}
    unclear = sorted({token for token, row in zip(ids, values) if not torch.equal(row, first[token])})
    if unclear:
        way = "Leave one row of each in the file, and its id once"
        return [f'"{path}": expected one row for each token, found others for {listed(map(str, unclear))}. {way}']
    if base is None or max(ids, default=0) >= len(weight) or min(ids, default=0) < 0:
        return []
    others = torch.ones(len(weight), dtype=torch.bool)
    others[list(ids)] = False  # these rows are in the file in any case, and new tokens are drawn anew in each model
    same = base.shape == weight.shape and torch.equal(base[others], weight.detach().cpu()[others].to(base.dtype))
    return [] if same else [f'unexpected weight of "{path}": it differs from the model\'s own. {LOAD}']


def _field(fields: Mapping[str, Any]) -> str:
    return "token_indices" if fields["peft_type"] == TRAINABLE_TOKENS else "trainable_token_indices"


def _promised(fields: Mapping[str, Any]) -> Any:
    return fields.get(_field(fields))


def _all_ids(fields: Mapping[str, Any]) -> list[int]:
    asked = _promised(fields)
    return [t for ids in asked.values() for t in ids] if isinstance(asked, Mapping) else list(asked)


def _ids(model: nn.Module, fields: Mapping[str, Any], path: str) -> tuple[int, ...] | None:
    """Return the tokens that a file's config has for a table; PEFT goes by the end of a name."""
    asked = _promised(fields)
    if isinstance(asked, Mapping):
        name = max((name for name in asked if path.endswith(name)), key=len, default=None)
        asked = None if name is None else asked[name]
    return None if asked is None else tuple(asked)


def unfollowed(model: nn.Module, path: str) -> list[str]:
    """List the modules that share a table's weight and that PEFT would leave as they are: all but those tied to the input embedding."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return [] if tied and path == input_embedding(model) else list(sharing(model).get(path, ()))


def input_embedding(model: Any) -> str | None:
    """Return the path of a model's input embedding, or None where the model does not tell."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((path for path, module in model.named_modules() if module is embedding), None)


def configs_of(rows: Mapping[str, Rows]) -> list[TokensConfig]:
    """Return a config for each table."""
    return [dataclasses.replace(one.config, target_names=(f"^{re.escape(path)}$",)) for path, one in rows.items()]


def displacements(model: nn.Module, rows: Mapping[str, Rows]) -> Tree:
    """Return the params of tables whose rows PEFT saved in full."""
    return {path: {"dE": one.values.to(now := _now(model, path, one.config)) - now} for path, one in rows.items()}


def full_rows(model: nn.Module, path: str, cfg: TokensConfig, dE: Tensor) -> Tensor:
    """Return the rows of one table as PEFT's file holds them."""
    return (_now(model, path, cfg) + dE.detach()).to(cfg.dtype).cpu().contiguous()


def _now(model: nn.Module, path: str, cfg: TokensConfig) -> Tensor:
    weight: Any = model.get_submodule(path).weight
    return weight.detach()[list(cfg.token_ids)].to(cfg.dtype)


def written(
    model: nn.Module, params: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, TokensConfig], alone: bool
) -> dict[str, Tensor]:
    """Return the tensors of all tables as PEFT's file holds them, by key; with those of tied modules where the tokens stand alone."""
    found = dict[str, Tensor]()
    for path, cfg in configs.items():
        rows = full_rows(model, path, cfg, params[path]["dE"])
        places = [path, *sharing(model).get(path, ())] if alone else [path]
        found |= {join(place, ("" if alone else _INSIDE) + _ROWS): rows.clone() for place in places}
    return found


def fields_of(model: nn.Module, configs: Mapping[str, TokensConfig], alone: bool) -> dict[str, Any]:
    """Return the fields of PEFT's config that name the tokens."""
    ids = {path: list(cfg.token_ids) for path, cfg in configs.items()}
    if alone:
        return {"token_indices": next(iter(ids.values())), "init_weights": True}
    return {"trainable_token_indices": next(iter(ids.values())) if list(ids) == [input_embedding(model)] else ids}


def unwritable(model: nn.Module, configs: Mapping[str, TokensConfig], types: Sequence[str], whole: Sequence[str]) -> list[str]:
    """List the reasons why PEFT cannot express trained tokens, beside other methods and modules trained as a whole."""
    faults, first = [], next(iter(configs.values()), None)
    if configs and not set(types) <= set(BESIDE):
        faults.append(f"trained tokens beside {listed(types)}: PEFT has them alone or beside {listed(BESIDE)}")
    if configs and not types and whole:
        faults.append(f"trained tokens and {listed(whole)} trained as a whole: PEFT has both beside {listed(BESIDE)} only")
    for path, cfg in configs.items():
        if not types and cfg.token_ids != first.token_ids:  # type: ignore[union-attr]
            faults.append(f'"{path}": TokensConfig.token_ids: PEFT has one list for all tables, unless they stand beside LoRA')
        faults += _unlike(model.get_submodule(path), path)
        again = twice.fault(model, path)
        faults += [again] if again else []
        left = unfollowed(model, path)
        if left:
            faults.append(f'"{path}": TokensConfig: PEFT leaves {listed(left)} as it is, which shares the weight and follows here')
        others = ambiguous(model, path) if types else []
        if others:
            faults.append(f'"{path}": TokensConfig: PEFT goes by the end of a name and would take {listed(others)} too')
    return faults
