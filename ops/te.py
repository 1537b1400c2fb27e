"""TransformerEngine's linear and attention modules as implementations of `matmul`, `matmul_geglu` and `attend`.

They share weights, cache and state with the other implementations, and results agree within rounding. The linear
modules run in prefill and inside the decode step's graph. The attention module runs in prefill; a decode step's
attention stays the kernel's, since the module has no FP8 cache, no ring of a local layer, and reads lengths on the
host. Gemma 2's softcap, which turns the module's fused attention off, and Gemma 4's attention are as without
TransformerEngine, and so are integer weights, float32 and the operations that are not named above.
"""

import importlib
import importlib.util
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.attention import attend_triton, softmax_attention
from ops.common import E4M3
from ops.norm import add_norm_triton, geglu_triton


def operations(kernels, device: torch.device):
    """The operations of `kernels` (an `ops.Ops`), with TransformerEngine's modules in place of some.

    Raises ValueError where it is not installed, can't be imported, or `device` is no GPU.
    """
    if device.type != "cuda":
        raise ValueError("ops 'te' needs a CUDA GPU: use 'torch'")
    modules = Modules(import_te())
    return replace(
        kernels,
        name="te",
        # TransformerEngine rounds the inputs of its products itself, so that nothing else may.
        add_norm=lambda x, y, post, weight, eps, scale=None, *more, **options: add_norm_triton(
            x, y, post, weight, eps, scale if x.dtype != torch.bfloat16 else None, *more, **options
        ),
        matmul=partial(modules.matmul, kernels),
        matmul_geglu=partial(modules.matmul_geglu, kernels),
        attend=modules.attend,
    )


def import_te():
    """Imports and returns TransformerEngine's PyTorch module. Raises ValueError where it can't be."""
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError("ops 'te' needs TransformerEngine: pip install -r requirements-cuda.txt")
    # It would take a cuDNN of the system first, which can't load its parts beside torch's own
    if (cudnn := Path(torch.__file__).parents[1] / "nvidia" / "cudnn").is_dir():
        os.environ.setdefault("CUDNN_HOME", str(cudnn))
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"TransformerEngine can't be imported: {error}") from None


class Modules:
    """The modules over the weights and layers that were met so far; a weight that is freed takes its module along."""

    def __init__(self, te):
        self.te, self.linears, self.attentions = te, WeakKeyDictionary(), {}

    def takes(self, weight, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and weight.data.dtype in (torch.bfloat16, E4M3)

    def matmul(self, kernels, x: Tensor, weight, dtype: torch.dtype, partials: bool = False, mail=None) -> Tensor:
        """`ops.matmul.matmul`; x is in bf16 for a weight in E4M3, too."""
        if not self.takes(weight, dtype):
            return kernels.matmul(x, weight, dtype, partials, mail)
        linear = self.linears.get(weight)
        if linear is None or linear.source != weight.data.data_ptr():
            linear = self.linears[weight] = Linear(self.te, weight)
        return linear(x)

    def matmul_geglu(self, kernels, x: Tensor, weight, dtype: torch.dtype, next_scale: Tensor | None = None) -> Tensor:
        if not self.takes(weight, dtype):
            return kernels.matmul_geglu(x, weight, dtype, next_scale)
        return geglu_triton(self.matmul(kernels, x, weight, dtype), dtype)

    def attend(self, qkv, layer, cache, positions, dtype, output_scale=None) -> Tensor:
        if dtype != torch.bfloat16:
            return attend_triton(qkv, layer, cache, positions, dtype, output_scale)
        takes = layer.softcap is None and layer.kv_products == 2 and not layer.v_norm
        fused = self.fused if takes else softmax_attention
        return attend_triton(qkv, layer, cache, positions, dtype, None, fused)

    def fused(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask, window: int | None, softcap) -> Tensor:
        """Causal attention as `softmax_attention` makes it, by DotProductAttention; its scale is fixed, so q is
        scaled."""
        key = (q.shape[1], k.shape[1], q.shape[3], window)
        if key not in self.attentions:
            with torch.inference_mode(False):
                self.attentions[key] = self.te.DotProductAttention(
                    q.shape[1],
                    q.shape[3],
                    num_gqa_groups=k.shape[1],
                    attention_dropout=0.0,
                    qkv_format="bshd",
                    attn_mask_type="causal",
                    window_size=(-1, 0) if window is None else (window - 1, 0),  # to the left, inclusive
                    softmax_scale=1.0,
                ).eval()
        q = q * scale  # a power of 2 for most models: exact
        y = self.attentions[key](*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
        return y.view(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


class Linear:
    """TransformerEngine's linear layer over a `formats.Weight` in bf16 or E4M3, whose memory it shares.

    FP8 is by DelayedScaling, whose scales are set here and stay, since they are updated only where gradients are
    enabled. Rows are padded to the multiple of 8 that its FP8 products want.
    """

    def __init__(self, te, weight):
        from transformer_engine.common.recipe import DelayedScaling, Format

        self.source = weight.data.data_ptr()
        self.fp8, self.autocast = weight.data.dtype == E4M3, te.autocast
        self.recipe = DelayedScaling(fp8_format=Format.E4M3, amax_history_len=1)
        n, k = weight.shape
        options = dict(bias=False, params_dtype=torch.bfloat16, device=weight.data.device)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            te.quantized_model_init(enabled=self.fp8, recipe=self.recipe),
        ):
            self.module = te.Linear(k, n, **options)
            if self.fp8:
                self.module.weight._data = weight.data.detach().view(torch.uint8)
                self.module.weight._scale_inv = weight.scale.detach().reshape(1)
                scale = self.module.fp8_meta["scaling_fwd"].scale  # 0: input, 1: weight
                scale[0], scale[1] = 1 / weight.input_scale, 1 / weight.scale
            else:
                self.module.weight = nn.Parameter(weight.data.detach(), False)
        self.module.requires_grad_(False).eval()

    def __call__(self, x: Tensor) -> Tensor:
        pad = -len(x) % 8 if self.fp8 else 0
        with torch.no_grad(), self.autocast(enabled=self.fp8, recipe=self.recipe):
            y = self.module(F.pad(x, (0, 0, 0, pad)) if pad else x)
        return y[: len(x)]
