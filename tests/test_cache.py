"""The KV cache: rings, dtypes, memory, and that a model keeps nothing of it."""

import pytest
import torch
from conftest import GREEDY, TINY_GEMMA, small_model

import ops
from cache import CODECS, KV_CACHE_DTYPES, KVCache, LayerCache, cache_bytes, codec_of
from config import ModelConfig
from generate import generate, load_model
from ops.attention import softmax_attention
from ops.common import round_fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def cache_of(model, rows: int, length: int, dtype: torch.dtype) -> KVCache:
    return KVCache.empty(model.config, rows, length, codec_of(dtype, model.dtype), model.device, model.kv_scales)


def load(directory):
    return load_model(directory, device="cpu", precision="fp32")[0]


def tokens(rows=3, length=40, vocabulary=4000) -> torch.Tensor:
    return torch.randint(10, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


# --- rings and memory


@pytest.mark.parametrize("slots", [4, 7, 32])
def test_cache_holds_the_newest_tokens(slots):
    """Whatever the pieces in which tokens arrive, slot p % S holds the newest token p that it can."""
    cache = LayerCache((2, 1, slots, 1), CODECS["fp32"], "cpu")
    ends = torch.tensor([0, 0])
    for lengths in ([6, 2], [1, 1], [9, 3], [1, 1]):
        lengths = torch.tensor(lengths)
        position = ends if ends.any() else None
        values = (ends[:, None] + torch.arange(int(lengths.max()))).float()[:, None, :, None]  # a token is its position
        slot = (torch.arange(2), slice(None), ends % slots)
        cache.write(values, -values, position, lengths, slot)
        ends = ends + lengths
        for row, end in enumerate(ends.tolist()):
            for p in range(max(0, end - slots), end):
                assert cache.k[row, 0, p % slots, 0] == p
                assert cache.v[row, 0, p % slots, 0] == -p
        held = cache.held_positions(ends)
        assert (torch.where(held >= 0, cache.k[:, 0, :, 0], held) == held).all()


def test_local_layers_keep_only_their_window():
    config = ModelConfig.from_name("gemma-3-1b")
    per_token = 2 * config.n_kv_heads * config.head_dim * 2
    global_layers = sum(not config.is_local(i) for i in range(26))
    assert global_layers == 4
    assert cache_bytes(config, 3, 4096, CODECS["bf16"]) == 3 * per_token * (4 * 4096 + 22 * 512)


@pytest.mark.parametrize("name", CODECS)
def test_what_is_allocated_is_what_was_said(name):
    config = small_model(case="gemma3-window-half").config
    cache = KVCache.empty(config, 3, 64, CODECS[name], torch.device("cpu"))
    assert cache.bytes == cache_bytes(config, 3, 64, CODECS[name])
    assert cache.bytes == sum(each.k.nbytes + each.v.nbytes for each in cache.layers)
    assert {each.k.dtype for each in cache.layers} == {CODECS[name].dtype}
    assert {each.slots for each in cache.layers} == {20, 64}
    assert cache.bytes == CODECS[name].dtype.itemsize * cache_bytes(config, 3, 64, CODECS["fp8_e5m2"])


@torch.no_grad()
def test_rows_of_a_smaller_cache_go_on_in_a_larger_one():
    model, x = small_model(case="gemma3-window-half"), tokens(3, 30, 120)
    small, large = (cache_of(model, rows, length, torch.float32) for rows, length in ((2, 24), (3, 32)))
    model(x[:2, :24], small)
    large.copy_rows(small, [1, 0, 1])
    logits = model(x[[1, 0, 1], 24:], large, torch.full((3,), 24), all_logits=True)
    torch.testing.assert_close(logits, model(x[[1, 0, 1]], all_logits=True)[:, 24:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_rows_are_a_view():
    model, x = small_model(), tokens(3, 12, 120)
    cache = cache_of(model, 3, 16, torch.float32)
    assert cache.rows(0, 3) is cache
    model(x[:2], cache.rows(0, 2))
    assert cache.layers[0].k[:2].abs().amin(dim=(1, 2, 3)).shape == (2,)
    assert cache.layers[0].k[:2, :, :12].count_nonzero() > 0
    assert cache.layers[0].k[2].count_nonzero() == 0


def test_codecs_by_name_and_dtype():
    for name, codec in CODECS.items():
        assert codec_of(name, torch.float32) is codec_of(codec.dtype, torch.float32) is codec
    for auto in ("auto", None):
        assert codec_of(auto, torch.bfloat16) is CODECS["bf16"]
        assert codec_of(auto, torch.float32) is CODECS["fp32"]
    assert set(KV_CACHE_DTYPES) == {"auto", "bf16", "fp8_e4m3", "fp8_e5m2"}
    for wrong in ("fp8", torch.int8, 3):
        with pytest.raises(ValueError, match=r"kv_cache_dtype must be one of auto, bf16, .*, not "):
            codec_of(wrong, torch.float32)


# --- nothing stays with the model


@torch.no_grad()
def test_a_run_leaves_the_model_as_it_was(tiny):
    """A cache of another dtype and size serves a run, and no run after it."""
    model, tokenizer = tiny
    x = torch.tensor([tokenizer.encode("import os\n\nprint(")])
    logits, texts = model(x, all_logits=True), generate(model, x.tolist() * 2, 12, **GREEDY)
    generate(model, [[2, 310, 315]], 12, kv_cache_dtype=E5M2, **GREEDY)
    assert torch.equal(model(x, all_logits=True), logits)
    for rows in (1, 3):
        assert torch.equal(
            model(x.expand(rows, -1), all_logits=True)[0], model(x.expand(rows, -1), all_logits=True)[-1]
        )
    torch.testing.assert_close(model(x.expand(3, -1), all_logits=True)[2:], logits, atol=1e-4, rtol=0)
    assert generate(model, x.tolist() * 2, 12, **GREEDY) == texts
    assert generate(model, x.tolist() * 5, 12, **GREEDY) == texts[:1] * 5


@torch.no_grad()
def test_two_caches_of_one_model_take_turns():
    model, x = small_model(case="gemma3-window-half"), tokens(2, 40, 120)
    expected = model(x, all_logits=True)
    caches = [cache_of(model, 1, 48, torch.float32) for _ in range(2)]
    for row, cache in enumerate(caches):
        model(x[row : row + 1, :20], cache)
    for i in range(20, 40):
        for row, cache in enumerate(caches):
            logits = model(x[row : row + 1, i : i + 1], cache, torch.tensor([i]))
            torch.testing.assert_close(logits[0], expected[row, i], atol=1e-4, rtol=0)


# --- FP8


@torch.no_grad()
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fp8_cache_is_its_definition(calibrated, dtype, monkeypatch):
    """Attention over K and V rounded and scaled back, whether they come from the cache or were just computed."""
    ours, x = load(calibrated), tokens(2, 30)
    scales = ours.kv_scales.values if dtype == E4M3 else [(1.0, 1.0)] * len(ours.layers)
    assert all(k != 1 for k, _ in scales) == (dtype == E4M3)
    calls = []

    def rounding(q, k, v, *rest):
        k_scale, v_scale = scales[len(calls) % len(scales)]
        calls.append(None)
        k = round_fp8(k, k_scale, dtype).float() * k_scale
        return softmax_attention(q, k, round_fp8(v, v_scale, dtype).float() * v_scale, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ops.attention, "softmax_attention", rounding)
        expected = ours(x, all_logits=True)
    assert len(calls) == len(ours.layers)
    cache = cache_of(ours, 2, 64, dtype)
    assert cache.layers[0].k.dtype == dtype
    difference = (ours(x, cache, all_logits=True) - expected).abs()
    # a value on the border of two codes may fall to the other side after a rounding in float32
    assert difference.mean() < 1e-4
    assert difference.max() < 0.02
    ours(x[:, :12], cache)
    ours(x[:, 12:20], cache, torch.full((2,), 12))
    for i in range(20, 30):
        logits = ours(x[:, i : i + 1], cache, torch.full((2,), i))
        assert (logits - expected[:, i]).abs().mean() < 0.02


@pytest.mark.parametrize("case", ["gemma2-window-small", "gemma3-window-half"])
def test_fp8_cache_with_windows(case):
    model = small_model(case=case)
    for dtype in (E4M3, E5M2):
        cache = cache_of(model, 2, 64, dtype)
        x = tokens(2, 45).remainder(120)
        with torch.no_grad():
            expected = model(x, cache, all_logits=True)
            model(x[:, :30], cache)
            logits = [model(x[:, i : i + 1], cache, torch.full((2,), i)) for i in range(30, 45)]
        assert (torch.stack(logits, 1) - expected[:, 30:]).abs().mean() < 0.02


def test_fp8_cache_is_half_of_bf16():
    config = ModelConfig.from_name("gemma-3-1b")
    half, whole = (cache_bytes(config, 3, 128, CODECS[name]) for name in ("fp8_e4m3", "bf16"))
    assert 2 * half == whole


def test_e4m3_cache_without_factors_warns_and_e5m2_does_not(recwarn):
    model = load(TINY_GEMMA)
    generate(model, [[2, 3]], 2, kv_cache_dtype=E5M2)
    assert not [w for w in recwarn if "scaling factors" in str(w.message)]
    with pytest.warns(UserWarning, match="no scaling factors for K and V: 1.0"):
        generate(model, [[2, 3]], 2, kv_cache_dtype=E4M3)
