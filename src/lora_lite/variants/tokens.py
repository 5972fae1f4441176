r"""Trainable tokens: chosen rows of an embedding, trained as displacements.

$$E'_t = E_t + dE_n \quad \text{for the token } t = \mathrm{token\_ids}_n, \qquad E'_t = E_t \ \text{ for the others}$$

The embedding looks `E'` up. A head of logits `E h` that shares the table adds `h dE^T` to those of the chosen tokens. A linear layer
that is a target itself, such as a head with a weight of its own, has its rows moved, those of its outputs `token_ids`.

Identity at init: exact, since `dE = 0`.

Paper: Gal, Alaluf, Atzmon, Patashnik, Bermano, Chechik, Cohen-Or, *An Image is Worth One Word: Personalizing Text-to-Image
Generation using Textual Inversion*, 2022, arXiv:2208.01618, sec. 3, which trains the row of one new token.

| tensor | shape | trained | init |
|---|---|---|---|
| `dE` | `(n, d)`, a row for each of `token_ids`, in their order | yes | zeros |
| `ids` | `(n,)` | no | `token_ids` |

Trained per target: `n d`, where `d` is the width of a row, `o` of an embedding and `i` of a head. A lookup multiplies nothing: a token
finds its row by bisection. With no names given the model's input embedding is taken, and modules that share its weight follow. No copy
of the table is made, where PEFT makes one in each call of the embedding, and one more in the head's.

Departures: the paper and PEFT train the full rows; a displacement keeps weight decay meaningful, since zero is the model as it was.
Params are kept in float32 and rounded to the table's own dtype in each call. PEFT takes a token named twice, whose rows overwrite each
other; here it is refused. PEFT lets a head follow where the model's config says that it is tied, here it does where it is.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.core import AdapterConfig, Constants, Frozen, Params, checked
from lora_lite.core.errors import listed
from lora_lite.core.fields import are_integers, at, expect
from lora_lite.core.tree import modules_by_path


class TokensParams(TypedDict):
    dE: Float[Tensor, "n d"]


@checked
def tokens(params: TokensParams, W: Frozen, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
    """Apply `W` with the rows `ids` of its stored weight moved by `dE` to `x`. The module's docstring has the formula."""
    return W.add_rows(x, W.constants["ids"], params["dE"])


@dataclass(frozen=True, kw_only=True)
class TokensConfig(AdapterConfig):
    """Config of trainable tokens. Without `target_names` it takes the model's input embedding.

    Args:
        token_ids: the tokens whose rows are trained, each once, at least one.
    """

    name = "tokens"
    uses = frozenset({"output", "project", "rows"})
    tied: ClassVar[bool] = True
    trained = "len(token_ids) * i"
    macs = "len(token_ids) * i"

    token_ids: Sequence[int] = ()
    exclude_names: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        ids: Any = self.token_ids
        if not are_integers(ids):
            raise TypeError(f"{at(self, 'token_ids')} a sequence of integers, found {ids!r}. Write e.g. token_ids=(32000, 32001).")
        object.__setattr__(self, "token_ids", tuple(ids))
        twice = [t for t, times in Counter(ids).items() if times > 1]
        expect(self, "token_ids", not twice, "each token once", f"Name {listed(map(str, twice))} once.")
        expect(self, "token_ids", not ids or min(ids) >= 0, "ids >= 0", "Count from the start: the last token is vocabulary size - 1.")

    def default_names(self, model: Any) -> Sequence[str]:
        try:
            embedding = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            embedding = None
        found = [path for path, module in modules_by_path(model).items() if module is embedding]
        if not found:
            raise ValueError(
                f"{at(self, 'target_names')} the embedding to train, since {type(model).__name__} has no get_input_embeddings() to tell "
                'it, found none. Name it, e.g. target_names=r"embed_tokens$".'
            )
        return (f"^{re.escape(found[0])}$",)

    def constants(self, W: Frozen, generator: torch.Generator, stats: Any = None) -> Constants:
        self._check(W)
        return {"ids": torch.tensor(self.token_ids)}

    def init(self, W: Frozen, generator: torch.Generator) -> TokensParams:
        self._check(W)  # a file's constants may meet a table of another number of rows
        return {"dE": torch.zeros(len(self.token_ids), W.table_shape[1])}

    def _check(self, W: Frozen) -> None:
        expect(self, "token_ids", bool(self.token_ids), "at least one token", "Name the tokens to train, e.g. token_ids=(32000, 32001).")
        rows, _ = W.table_shape
        bound = f"ids below {rows}, the number of rows"
        expect(self, "token_ids", max(self.token_ids) < rows, bound, "Resize the embedding first: model.resize_token_embeddings(n).")

    def forward(self, params: Params, W: Frozen, x: Tensor) -> Tensor:
        return tokens(params, W, x)
