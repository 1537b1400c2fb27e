"""The operations that Gemma's layers are made of, and the one place where it is chosen what runs them.

Each operation has one name and a PyTorch definition, which runs on any device, in float32 to FP8, and can be
differentiated where its inputs are not FP8 or integers. Most have Triton kernels beside it, and some
TransformerEngine's modules. model.py is written over `Ops` and knows none of them.

| operation        | what it makes                                          | definition and kernels in    |
| ---------------- | ------------------------------------------------------ | ---------------------------- |
| rope             | cosines and sines of the tokens' positions             | rope.py                      |
| embed            | the residual stream, of tokens                         | norm.py                      |
| add_norm         | residual sum and the norm of it, rounded to FP8 or not | norm.py                      |
| matmul           | a product by a weight of any format                    | matmul.py, integer.py        |
| matmul_geglu     | gate and up products and GeGLU, rounded to FP8 or not  | matmul.py, integer.py        |
| gelu_gate        | a product, its GELU, and that times another factor     | matmul.py                    |
| per_layer_inputs | what each layer is given of the tokens                 | norm.py                      |
| route            | a token's experts, their weights, and what they take   | router.py                    |
| experts          | the weighted sum of what a token's experts make        | experts.py                   |
| mask             | which keys a query sees                                | attention.py                 |
| attend           | norms, rotation, cache write and attention             | attention.py, *_attention.py |
| greedy           | the most probable tokens, appended to each row         | next_token.py                |
| lookup           | drafts of what comes next, from a row's own text       | lookup.py                    |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ops import attention, common, experts, lookup, matmul, next_token, norm, rope, router
from ops.peers import Parts
from parallel import Sums

NAMES = ("auto", "kernels", "te", "torch")


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation. `replace(ops, matmul=...)` makes another, for recording what passes,
    say. `packs` says whether its attention takes prompts of unlike lengths one after another; else they are padded."""

    name: str
    packs: bool
    rope: Callable
    embed: Callable
    add_norm: Callable
    matmul: Callable
    matmul_geglu: Callable
    gelu_gate: Callable
    per_layer_inputs: Callable
    route: Callable
    experts: Callable
    mask: Callable
    attend: Callable
    greedy: Callable
    lookup: Callable
    sums: Sums | None = None  # what joins the ranks of a model that several share

    def mail(self, rows: int, width: int):
        """By what kernels send so many rows of `width` numbers to the other ranks, if they can."""
        return self.sums.mail(rows, width) if self.name == "kernels" else None

    def parts(self, y):
        """What all ranks have of a product, of this one's part, in the form that `add_norm` takes."""
        if isinstance(y, Parts):
            return y
        mail = self.mail(*y.shape[-2:])
        return self.sums.parts(y) if mail is None else Parts(y if y.dim() == 3 else y[None], mail)


TORCH = Ops(
    "torch",
    False,
    rope=rope.rope,
    embed=norm.embed,
    add_norm=norm.add_norm,
    matmul=matmul.matmul,
    matmul_geglu=matmul.matmul_geglu,
    gelu_gate=matmul.gelu_gate,
    per_layer_inputs=norm.per_layer_inputs,
    route=router.route,
    experts=experts.experts,
    mask=attention.attention_mask,
    attend=attention.attend,
    greedy=next_token.greedy_next_token,
    lookup=lookup.prompt_lookup,
)
KERNELS = Ops(
    "kernels",
    True,
    rope=rope.rope_triton,
    embed=norm.embed_triton,
    add_norm=norm.add_norm_triton,
    matmul=matmul.matmul_triton,
    matmul_geglu=matmul.matmul_geglu_triton,
    gelu_gate=matmul.gelu_gate_triton,
    per_layer_inputs=norm.per_layer_inputs_triton,
    route=router.route_triton,
    experts=experts.experts_triton,
    mask=attention.no_mask,
    attend=attention.attend_triton,
    greedy=next_token.greedy_next_token_triton,
    lookup=lookup.prompt_lookup_triton,
)


def choose(name: str, device: torch.device) -> Ops:
    """The implementation `name` of NAMES for `device`.

    "auto" is the kernels on a CUDA GPU with Triton, else PyTorch: TransformerEngine's modules lose to the kernels at
    every shape that was measured (`python benchmark.py prefill`). Raises ValueError for what doesn't run there.
    """
    if name not in NAMES:
        raise ValueError(f"ops must be one of {', '.join(NAMES)}, not {name!r}")
    runs = common.available(device)
    if name == "auto":
        name = "kernels" if runs and device.type == "cuda" else "torch"
    if name == "torch":
        return TORCH
    if not runs:
        needs = "Triton" if device.type == "cuda" else "a CUDA GPU"
        raise ValueError(f"ops '{name}' needs {needs}: use 'torch'")
    if name == "kernels":
        return KERNELS
    from ops import te  # its import takes seconds

    return te.operations(KERNELS, device)
