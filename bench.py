"""Times the fused decode step against its floor, and against what a user could run instead.

    python bench.py --models 2.8b 160m --contexts 128 2000    measure on this machine's GPU, print the tables
    python bench.py --models 160m --baselines graph compile   only these baselines; results are merged
    python bench.py --models 2.8b --timeline                  or --ablate, or --counters, which needs ncu
    python bench.py --quality --model FOLDER --text FILE      how close float16 and fused come to float32
    python bench.py --report                                  docs/results.md, README's table and the plots

A step is the user's whole token: embedding, all layers, final LayerNorm, LM head, choice of the next token;
float16, batch 1, random weights. A sample is the mean of 16 steps back to back by CUDA events (of eager and
transformers: one token by the clock). The tables have the median of 30 samples or more (10 of the time to the
second token), and the 10th and 90th percentile. Fused makes 8 tokens in a launch, as Pythia.generate does;
the baselines launch every step. Each sample of the sampled rows draws with a seed of its own.

The floor of a step is the bytes that it must read (every weight once, one row of embed_in, keys and values of
the cached tokens) over the bandwidth of the fastest of several kernels that only read, in the same run.
Nothing of ours is timed before its logits are compared with float64 arithmetic on the same float16 weights:
fused may be no further off than the float16 reference, a baseline twice as far. Raw samples are merged into
results/bench-<gpu>.json. Only --report needs matplotlib: pip install matplotlib==3.11.2

baselines, each with the best of its settings:
  eager                Pythia.generate without fused, at text lengths that the process has not met before
  graph                a step of fixed shapes in a CUDA graph: one or two streams, two layouts of the weights
  compile              the same step under torch.compile, in a CUDA graph: default mode; and max-autotune,
                       which tunes by coordinate descent, with biases added apart, because inductor itself
                       writes only products without a bias
  compile-static       the same with a static cache of a multiple of 256 positions, masked, and the token and
                       its position on the device; also with attention written out as products and sums
  transformers         generate() with its defaults, likewise
  transformers-static  generate() with the static cache, which compiles itself
graph, compile and transformers are also tried without cuDNN's attention, which plans anew for each length.
graph and compile attend to a fixed number of positions, without a mask: one graph, one position. They could
not go on to generate a text, as compile-static could.
"""
import argparse
import copy
import csv
import ctypes
import functools
import gc
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import cross_entropy, embedding, gelu, layer_norm, linear
from torch.nn.functional import scaled_dot_product_attention as attend
from tqdm import tqdm

from build import Fused, constants, device_arch, flags, kernel_hash, load, nvcc
from checkpoint import Refused
from generate import TINY, Text, quiet
from model import SIZES, Config, Pythia, Sampler

HERE = Path(__file__).resolve().parent
STEPS, SAMPLES, WARM_UP = 16, 30, 3  # steps a sample, samples, samples thrown away
NEW = 64                             # tokens of the text of eager and transformers that is timed
PROMPT = 512                         # tokens before the first new one, for the time to the second
SAMPLERS = {"greedy": Sampler(), "T 0.7, top-p 0.95": Sampler(0.7, top_p=0.95), "T 1": Sampler(1.0),
            "T 1, top-k 40": Sampler(1.0, top_k=40),
            "T 0.7, top-k 40, top-p 0.95": Sampler(0.7, top_k=40, top_p=0.95)}
USUAL = "T 0.7, top-p 0.95"          # what generate.py does unless it is told otherwise

PROBE = r"""
#include <cstdint>
// Only a check adds up all that is read; but without any use of the sum, the compiler would drop the loads.
__device__ void use(unsigned sum, bool check, unsigned* total) {
  sum = __reduce_add_sync(~0u, sum);
  if (threadIdx.x % 32 == 0 && (check || sum == 0x5eed)) atomicAdd(total, sum);
}
template <int LOADS>  // of 16 bytes by a thread, none of which waits for another
__global__ void load(const uint4* data, size_t n, bool stride, bool check, unsigned* total) {
  const size_t threads = size_t(gridDim.x) * blockDim.x, apart = stride ? threads : blockDim.x;
  const size_t first = size_t(blockIdx.x) * blockDim.x * (stride ? 1 : LOADS) + threadIdx.x;
  unsigned sum = 0;
  for (size_t i = first; i < n; i += LOADS * threads) {
    uint4 v[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; j++) v[j] = __ldcs(data + i + j * apart);
#pragma unroll
    for (int j = 0; j < LOADS; j++) sum += v[j].x + v[j].y + v[j].z + v[j].w;
  }
  use(sum, check, total);
}
// Thread 0 keeps `slots` bulk copies of `bytes` in flight; only a check looks at what they bring.
__global__ void ring(const char* data, size_t n, int bytes, int slots, bool own, bool check,
                     unsigned* total) {
  extern __shared__ __align__(128) char s_tile[];
  __shared__ uint64_t s_full[16];
  const uint32_t tile_at = __cvta_generic_to_shared(s_tile), full_at = __cvta_generic_to_shared(s_full);
  const int tiles = n / bytes / gridDim.x;
  uint64_t evict_first;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(evict_first));
  auto copy = [&](int k) {
    const size_t tile = own ? size_t(tiles) * blockIdx.x + k : size_t(k) * gridDim.x + blockIdx.x;
    const uint32_t full = full_at + k % slots * 8;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(full), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" :: "r"(tile_at + k % slots * bytes), "l"(data + tile * bytes),
                 "r"(bytes), "r"(full), "l"(evict_first) : "memory");
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < slots; i++) asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(full_at + i * 8));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int k = 0; k < min(slots, tiles); k++) copy(k);
  }
  __syncwarp();
  unsigned sum = 0;
  for (int k = 0; k < tiles; k++) {
    for (int done = 0; !done;)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.s32 %0, 1, 0, p; }"
                   : "=r"(done) : "r"(full_at + k % slots * 8), "r"(k / slots & 1) : "memory");
    if (check)
      for (int i = threadIdx.x; i < bytes / 4; i += 32) sum += ((unsigned*)(s_tile + k % slots * bytes))[i];
    __syncwarp();
    if (threadIdx.x == 0 && k + slots < tiles) copy(k + slots);
  }
  use(sum, check, total);
}
extern "C" int probe(int kind, int a, int b, const char* data, size_t n, unsigned* total, int check, int sms,
                     cudaStream_t stream) {
  const uint4* vectors = (const uint4*)data;
  if (kind == 0) load<8><<<sms * a, 512, 0, stream>>>(vectors, n / 16, true, check, total);
  if (kind == 1 && a == 256) load<2><<<n / 8192, 256, 0, stream>>>(vectors, n / 16, false, check, total);
  if (kind == 1 && a == 512) load<1><<<n / 8192, 512, 0, stream>>>(vectors, n / 16, false, check, total);
  if (kind >= 2) {
    cudaFuncSetAttribute(ring, cudaFuncAttributeMaxDynamicSharedMemorySize, a * b);
    ring<<<sms, 32, a * b, stream>>>(data, n, a, b, kind == 2, check, total);
  }
  return cudaGetLastError();
}
"""
READERS = {  # kernels of PROBE that only read: the kind, and two numbers that it takes
    **{f"loads, {512 * n} threads a multiprocessor": (0, n, 0) for n in (1, 2, 4)},
    **{f"loads, {n} threads for every 8 KB": (1, n, 0) for n in (256, 512)},
    **{f"{n} bulk copies of {kb} KB, a region a block": (2, kb << 10, n) for n, kb in ((3, 64), (10, 20))},
    **{f"{n} bulk copies of {kb} KB, dealt out in turn": (3, kb << 10, n) for n, kb in ((6, 32), (3, 64))}}


def token_bytes(config, cached):
    """Bytes that a decode step must read with `cached` tokens before it, all in float16."""
    c, C = config, config.hidden
    block = 4 * C * C + 2 * C * c.mlp + (3 * C + C + c.mlp + C) + 4 * C         # matrices, biases, LayerNorms
    return 2 * (c.n_layer * (block + 2 * cached * C) + C + 2 * C + c.vocab * C)


# ---- one measurement -----------------------------------------------------------------------------------

def sample(step, reset=lambda: None, tokens=1, steps=STEPS):
    """Microseconds a token, SAMPLES means of `steps` tokens; a call of `step` makes `tokens`.

    `reset` is not timed, and may wait for the GPU. After it the GPU sleeps for about 0.1 ms, so that the host
    is ahead of it at the first step, and stays ahead wherever the GPU is the slower one.
    """
    events = []
    for _ in range(WARM_UP + SAMPLES):
        reset()
        torch.cuda._sleep(200_000)                                              # cycles
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        for _ in range(steps // tokens):
            step()
        events[-1][1].record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 / steps for begin, end in events[WARM_UP:]]


def read_rates(arch):
    """Bytes a second that each of READERS reads, the best of them, and what nvidia-smi says meanwhile.

    Each first adds up what it reads, in the code that is timed: a reader that leaves something out is no
    floor. One that a GPU cannot run, for lack of shared memory, is left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cu"), Path(folder, "probe.so")
        source.write_text(PROBE)
        subprocess.run([nvcc(), *flags({}, arch), "-shared", "-Xcompiler", "-fPIC", "-o", library, source],
                       check=True, capture_output=True)
        probe, pointer, number = ctypes.CDLL(str(library)).probe, ctypes.c_void_p, ctypes.c_int
    probe.argtypes = number, number, number, pointer, ctypes.c_size_t, pointer, number, number, pointer
    gpu = torch.cuda.get_device_properties(0)
    whole = gpu.multi_processor_count * (1280 << 10)                            # cuts no reader's last round
    size = min(8 << 30, torch.cuda.mem_get_info()[0] // 2) // whole * whole     # far more than L2 holds
    data = torch.empty(size // 4, dtype=torch.int32, device="cuda").random_()   # zeros could be read faster
    total, expected, rates = torch.zeros(1, dtype=torch.int32, device="cuda"), int(data.sum()), {}

    def read(reader, check=0):
        return probe(*READERS[reader], data.data_ptr(), size, total.data_ptr(), check,
                     gpu.multi_processor_count, torch.cuda.current_stream().cuda_stream)
    for reader in READERS:
        total.zero_()
        if error := read(reader, check=1):
            continue
        if (int(total) - expected) % 2**32:
            raise Refused(f"wrong, so not timed: {reader} do not add up to what the memory holds")
        us = sample(functools.partial(read, reader), steps=2)
        rates[reader] = [size * 1e6 / value for value in np.percentile(us, (90, 50, 10))]
    if not rates:
        raise Refused(f"the GPU cannot be read (CUDA error {error}): end what else uses it")
    best = max(rates, key=lambda reader: rates[reader][1])
    for _ in range(500):                                                        # load for about a second
        read(best)
    fields = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id=GPU-{gpu.uuid}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    return {"reads": rates, "read_by": best, "read_bytes_a_second": rates[best][1],
            **dict(zip(fields.split(","), said.strip().split(", ")))}


def read_rate(gpu):
    """Bytes a second that the fastest reader got from a GPU of this kind, in the best run in results/."""
    runs = json.loads((HERE / "results" / f"bench-{gpu}.json").read_text())["runs"].values()
    return max(run["read_bytes_a_second"] for run in runs if "read_by" in run)


def measured_us(gpu, config, context):
    """Median us of a greedy token in results/ for one of SIZES at `context` tokens; None if there is none."""
    rows = json.loads((HERE / "results" / f"bench-{gpu}.json").read_text())["rows"]
    row = next((rows.get(f"step {name} {context} greedy") for name in SIZES
                if Config.from_name(name) == config), None)
    return median(row["us"]) if row else None


class Case:
    """A model with `context` tokens in its cache, the next token, and that token's logits in float64."""

    def __init__(self, model, cache, context, hf=None):
        """`hf()` gives a transformers model of the same shape."""
        self.model, self.cache, self.context, self.hf = model, cache, context, hf
        c, rng = model.config, torch.Generator(cache.device).manual_seed(context)
        self.tokens = torch.randint(c.vocab, (1, c.context), generator=rng, device=cache.device)
        self.token = self.tokens[:, context:context + 1]
        self.start = context - STEPS // 2             # a sample's steps stand at start..start+STEPS-1
        self.fill()
        self.exact = exact_logits(model, self.token, cache, context)
        self.limit = self.error(model(self.token, cache, context))

    def fill(self):
        """Keys and values of `context` tokens; NaN in later rows, which a step must write or not read."""
        self.model.body(self.tokens[:, :self.context], self.cache, 0)
        self.cache[..., self.context:, :] = torch.nan

    def error(self, logits, limit=float("inf")):
        """|logits - exact| / |exact|, Euclidean; Refused where it exceeds `limit`."""
        error = float((logits.double().flatten() - self.exact).norm() / self.exact.norm())
        if not error <= limit:
            raise Refused(f"wrong, so not timed: error {error:.2e}, limit {limit:.2e}")
        return error


def exact_logits(model, token, cache, pos):
    """Logits [V] float64 of one token [1, 1]. Layer by layer: a float64 copy of 12b would not fit."""
    x, rope = embedding(token, model.embed_in).double(), model.rope[:, pos:pos + 1]
    for block, kv in zip(model.blocks, cache):
        x = copy.deepcopy(block).double()(x, rope, kv.double(), pos)
    x = layer_norm(x, x.shape[-1:], model.lnf_w.double(), model.lnf_b.double(), model.config.eps)
    return linear(x, model.embed_out.double()).flatten()


def time_fused(case, fused, sampler=SAMPLERS["greedy"], step=None, tokens=Fused.TOKENS):
    """Times `step`, which makes `tokens`; by default it is a launch. Every sample has a seed of its own."""
    step = step or functools.partial(fused.step, tokens)
    if STEPS % tokens:
        raise Refused(f"launches of {tokens} tokens do not make a sample of {STEPS}: take a divisor")
    case.fill()
    fused.start(case.token, case.context, sampler)
    fused.step()
    error, wanted = case.error(fused.logits, case.limit), int(sampler(fused.logits, case.context + 1))
    if fused.history[case.context] != wanted:
        raise Refused("wrong, so not timed: the token is not the one that Sampler takes from these logits")

    def text(function, times):
        fused.start(case.token, case.start, sampler)
        fused.history.fill_(-1)
        for _ in range(times):
            function()
        torch.cuda.synchronize()
        return fused.history[case.start:case.start + STEPS].tolist()
    if text(fused.step, STEPS) != text(step, STEPS // tokens):
        raise Refused("wrong, so not timed: tokens unlike those of launches of one token")
    seeds = itertools.count()
    us = sample(step, lambda: fused.start(case.token, case.start, replace(sampler, seed=next(seeds))), tokens)
    note = ", ".join(f"{name} {fused.defines[name]}" for name in ("CLUSTER", "MIN_WORKERS", "ROWS"))
    return {"us": us, "error": error, "note": note}


def plain_step(case, own_layout=False, bias_apart=False, two_streams=False, static=False, written_out=False):
    """The decode step as PyTorch operators of fixed shapes, in two functions: step() -> (logits [1, V], token
    [1]), and reset(at), which makes the case's token at position `at` the next.

    `own_layout` copies w_out and w_down into nn.Linear's layout, [outputs, inputs]; `bias_apart` adds biases
    after the product; `two_streams` computes the MLP beside the attention. If `static`, a multiple of 256
    positions is attended to, the later ones masked, and the step takes up its own token and advances;
    `written_out`: its attention is products and sums.
    """
    case.fill()
    model, c, pos, token = case.model, case.model.config, case.context, case.token.flatten().clone()
    C, NH, HS, ROT = c.hidden, c.n_head, c.head_size, c.rotary_dims
    end = -(-(pos + 1) // 256) * 256 if static else pos + 1
    where, positions = torch.tensor([pos], device=token.device), torch.arange(end, device=token.device)
    # RoPE for q, k and v alike, x * cos + x[partner] * sin, with cos 1 and sin 0 where nothing turns
    partner = torch.arange(HS, device=token.device)
    partner[:ROT] = partner[:ROT].roll(ROT // 2)
    cos, sin = (table(end, 3, HS, device=token.device) for table in (torch.ones, torch.zeros))
    cos[:, :2, :ROT] = model.rope[0, :end].repeat(1, 2)[:, None]
    sin[:, :2, :ROT] = torch.cat((-model.rope[1, :end], model.rope[1, :end]), 1)[:, None]
    layout = torch.Tensor.contiguous if own_layout else torch.Tensor.detach
    layers = [(b, kv[..., :end, :].nan_to_num(), layout(b.w_out.T), layout(b.w_down.T))
              for b, kv in zip(model.blocks, case.cache)]
    side = torch.cuda.Stream() if two_streams else None

    def project(x, w, b):
        return linear(x, w) + b if bias_apart else linear(x, w, b)

    def attention(x, b, kv, w_out):                                               # kv [2, 1, NH, end, HS]
        qkv = project(layer_norm(x, (C,), b.ln1_w, b.ln1_b, c.eps), b.w_qkv, b.b_qkv).view(NH, 3, HS)
        at = where if static else pos
        qkv = (qkv * cos[at] + qkv[..., partner] * sin[at]).to(x.dtype)
        kv.index_copy_(3, where, qkv[:, 1:].transpose(0, 1).reshape(2, 1, NH, 1, HS))
        q, mask = qkv[:, 0].reshape(1, NH, 1, HS), (positions <= where)[None, None, None] if static else None
        if written_out:
            scores = (q.float() * kv[0]).sum(-1) / HS**0.5                        # [1, NH, end]
            p = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1)
            o = (p[..., None] * kv[1]).sum(2).to(x.dtype)
        else:
            o = attend(q, kv[0], kv[1], mask)
        return project(o.reshape(1, C), w_out, b.b_out)

    def mlp(x, b, w_down):
        hidden = project(layer_norm(x, (C,), b.ln2_w, b.ln2_b, c.eps), b.w_up, b.b_up)
        return project(gelu(hidden), w_down, b.b_down)

    def step():
        x = embedding(token, model.embed_in)                                    # [1, C]
        for b, kv, w_out, w_down in layers:
            if side is None:
                x = x + (attention(x, b, kv, w_out) + mlp(x, b, w_down))
                continue
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                added = mlp(x, b, w_down)
            attn = attention(x, b, kv, w_out)
            torch.cuda.current_stream().wait_stream(side)
            x = x + (attn + added)
        logits = linear(layer_norm(x, (C,), model.lnf_w, model.lnf_b, c.eps), model.embed_out)
        chosen = logits.argmax(-1)
        if static:
            token.copy_(chosen)
            where.add_(1)
        return logits, chosen

    def reset(at):
        where.fill_(at)
        token.copy_(case.token.flatten())
    return step, reset


def time_captured(case, mode=None, **setting):
    """Times replays of a CUDA graph of plain_step with this setting, compiled if a `mode` is given."""
    step, reset = plain_step(case, **setting)
    if mode:
        step = torch.compile(step, mode=mode, fullgraph=True, dynamic=False)
    for _ in range(3):                                                            # compiles, tunes, allocates
        reset(case.context)
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, _ = step()
    reset(case.context)
    graph.replay()
    error = case.error(logits, 2 * case.limit)
    return {"us": sample(graph.replay, lambda: reset(case.start)), "error": error}


def attempt(function, *args, **kwargs):
    """What `function` returns (a dict), or {"failed": sentence}: one failure must not cost the other rows.

    Then drops compiled code, graphs and cached memory, so that the next measurement finds the GPU empty.
    """
    try:
        result = function(*args, **kwargs)
    except torch.OutOfMemoryError:
        result = {"failed": "out of memory"}
    except Exception as error:  # noqa: BLE001 (libraries raise nearly every type there is)
        text = " ".join(str(error).split())[:200]
        result = {"failed": text if isinstance(error, Refused) else f"{type(error).__name__}: {text}"}
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return result


@contextmanager
def cudnn_attention(allowed):
    """Whether PyTorch may choose cuDNN's kernel for attention."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def best_of(settings, function, *args):
    """The fastest result of `function` in {name: setting}; its note says which, and how others failed."""
    def run(cudnn=True, **setting):
        with cudnn_attention(cudnn):
            return function(*args, **setting)
    results = {name: attempt(run, **setting) for name, setting in settings.items()}
    medians = {name: median(result["us"]) for name, result in results.items() if "us" in result}
    failures = [f"{name}: {result['failed']}" for name, result in results.items() if "us" not in result]
    if not medians:
        raise Refused("; ".join(failures))
    best = min(medians, key=medians.get)
    return results[best] | {"note": "; ".join([best, *failures]), "settings_us": medians}


def greedy(hf, prompt, new, **kwargs):
    """transformers' generate: `new` tokens after `prompt` [1, T]."""
    return hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False,
                       pad_token_id=0, **kwargs)


def time_text(case, generate):
    """Microseconds of each new token of a text of NEW tokens around `case.context`.

    `generate(prompt [1, T], new, put)` calls put() after the prompt and after each token. A text before it
    warms up, or compiles, at other lengths: a user's new text has lengths not met before.
    """
    last, times = case.model.config.context, []                   # times: the prompt's, then each token's
    first = max(1, min(case.context - NEW // 2, last - NEW))
    other = first + NEW if first + 2 * NEW <= last else first - NEW
    for length, new in ((other, 8), (first, NEW)):
        times.clear()
        generate(case.tokens[:, :length], new, lambda: times.append(time.perf_counter()))
    return {"us": (np.diff(times[1:]) * 1e6).tolist()}


def time_eager(case):
    def generate(prompt, new, put):
        put()
        for _ in case.model.generate(prompt[0], new):
            put()
    return time_text(case, generate)


def time_transformers(case, **kwargs):
    def generate(prompt, new, put):
        greedy(case.hf(), prompt, new, streamer=SimpleNamespace(put=lambda _: put(), end=lambda: None),
               **kwargs)
    return time_text(case, generate)


def time_first(generate, prompt):
    """Microseconds of generate(prompt [1, T]) for 13 lengths T around PROMPT, the first three thrown away."""
    us = []
    for length in range(PROMPT - 12, PROMPT + 13, 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        generate(prompt[:, :length])
        torch.cuda.synchronize()
        us.append((time.perf_counter() - started) * 1e6)
    return {"us": us[3:]}


CUDNN = {"as it comes": {}, "without cuDNN's attention": {"cudnn": False}}
TUNED = {"mode": "max-autotune-no-cudagraphs", "own_layout": True, "bias_apart": True}
DEFAULT, TWO = {"mode": "default", "own_layout": True}, {"two_streams": True}
CAPTURED = {  # what best_of tries for each of these baselines
    "graph": {"one stream": {}, "one stream, [out, in]": {"own_layout": True},
              "two streams": TWO, "two streams, [out, in]": TWO | {"own_layout": True},
              "two streams, no cuDNN": TWO | {"cudnn": False},
              "two streams, [out, in], no cuDNN": TWO | {"own_layout": True, "cudnn": False}},
    "compile": {"default mode": DEFAULT, "max-autotune": TUNED,
                "max-autotune, no cuDNN": TUNED | {"cudnn": False}},
    "compile-static": {"default mode": DEFAULT | {"static": True}, "max-autotune": TUNED | {"static": True},
                       "max-autotune, attention written out": TUNED | {"static": True, "written_out": True}}}
PLAIN = {"eager": time_eager, **{name: functools.partial(best_of, settings, time_captured)
                                 for name, settings in CAPTURED.items()}}
BASELINES = PLAIN | {
    "transformers": functools.partial(best_of, CUDNN, time_transformers),
    "transformers-static": functools.partial(time_transformers, cache_implementation="static")}
ABLATIONS = {"as shipped": {}, **{f"clusters of {k}": {"cluster": k} for k in (1, 2, 4, 8)},
             **{f"{n} threads at least": {"threads": n} for n in (128, 256, 384, 512)},
             **{f"{n} rows a team and tile": {"rows": n} for n in (2, 4, 8)}, "no pace": {"pace": 2**20}}
LAUNCHES = {"no graph": {"graph": False}, "one launch a token": {"tokens": 1}}  # of the kernel as shipped
A_LAYER = "one launch a layer"

COUNTED = 64  # tokens, around the context that is asked for
COUNTERS = {  # Nsight Compute's names, on Hopper
    "time": "gpu__time_duration.sum", "read": "dram__bytes_read.sum",
    "busy": "dram__cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issued": "sm__inst_executed.avg.per_cycle_elapsed"}


# ---- runs ----------------------------------------------------------------------------------------------

class Results:
    """results/bench-<gpu>.json: {"gpu", "runs": {date: facts}, "rows": {key: row}}; new rows replace old."""

    def __init__(self, path, gpu, run):
        self.path, self.run, self.wrong, self.greedy = path, run, False, {}
        self.data = {"gpu": gpu, "runs": {}, "rows": {}}
        if path and path.exists():
            self.data = json.loads(path.read_text())
        self.data["runs"][run["date"]] = run

    def add(self, kind, model, context, what, function, *args, **kwargs):
        """Makes a row of what `function` returns, or of why it failed; prints it and writes the file."""
        row = {"kind": kind, "model": model, "context": context, "what": what, "run": self.run["date"]}
        row |= attempt(function, *args, **kwargs)
        self.wrong |= row.get("failed", "").startswith("wrong")
        if kind in ("step", "ablation"):
            if what in ("greedy", "as shipped") and "us" in row:
                self.greedy[model, context] = median(row["us"])
            needed = token_bytes(Config.from_name(model), context)
            row |= {"floor_us": needed / self.run["read_bytes_a_second"] * 1e6,
                    "greedy_us": self.greedy.get((model, context))}
        key = f"{kind} {model} {context} {what}"
        self.data["rows"][key] = row
        used = {row["run"] for row in self.data["rows"].values()}
        self.data["runs"] = {date: run for date, run in self.data["runs"].items() if date in used}
        if self.path:
            whole = self.path.with_suffix(".new")                 # a run that is killed leaves the old file
            whole.write_text(json.dumps(self.data).replace(': {"kind"', ':\n{"kind"') + "\n")
            whole.replace(self.path)
        error = f", error {row['error']:.2e}" if "error" in row else ""
        tqdm.write(f"{key}: {cell(row, spread=True, ratio=True, note=True)}{error}")


def measure(args):
    """Measures what the command line asks for; the exit code is 1 if a result was wrong."""
    torch.set_grad_enabled(False)
    found = torch.cuda.is_available()
    if not found and args.mode is not quality:
        raise Refused("no CUDA GPU is found: measure on a machine with one; --report and --quality need none")
    gpu = torch.cuda.get_device_name() if found else "CPU (fused needs a GPU; nothing is recorded)"
    run = {"date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "kernel": kernel_hash(),
           "command": shlex.join(["python", "bench.py", *sys.argv[1:]]), "torch": torch.__version__,
           "cuda": torch.version.cuda, "transformers": version("transformers"),
           **({} if args.mode is quality else read_rates(device_arch("cuda")))}
    slug = re.sub("[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia "))
    results = Results(HERE / "results" / f"bench-{slug}.json" if found else None, gpu, run)
    tqdm.write("\n".join([gpu, *(f"  {key}: {value}" for key, value in run.items() if key != "reads")]))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCH_EXTENSIONS_DIR"] = folder               # so that no kernel is found already built
        if args.mode is quality:
            quality(args, results)
        else:
            build_all(args, results)
            for name in tqdm(args.models, desc="measuring", unit="model"):
                if failed := attempt(args.mode, name, args, results):  # too large for this GPU, for one
                    results.add("step", name, args.contexts[0], "greedy", dict, failed)
    print(tables(results.data))
    return int(results.wrong)


def build_all(args, results):
    """Compiles every kernel of this run, side by side; the seconds that each took are rows."""
    arch, sms = device_arch("cuda"), torch.cuda.get_device_properties(0).multi_processor_count
    tunings = {ablate: ABLATIONS.values(), timeline: [{"extra": {"TIMELINE": 1}}]}.get(args.mode, [{}])
    jobs = [(name, tuning) for name in args.models for tuning in tunings]

    def build(name, tuning):
        started = time.perf_counter()
        load(constants(Config.from_name(name), arch, sms=sms, **tuning), arch)
        return {"seconds": time.perf_counter() - started}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builds = [pool.submit(build, *job) for job in jobs]
        for (name, tuning), built in zip(jobs, builds):
            if not tuning and args.mode is not counters:
                results.add("build", name, 0, "build", built.result)


def compare(name, args, results):
    """A model's steps, time to the second token, and memory."""
    config, one = Config.from_name(name), torch.ones(8, 8, dtype=torch.float16, device="cuda")
    one @ one                                                     # allocates cuBLAS's workspace beforehand
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = Pythia.random(name, dtype=torch.float16, device="cuda")
    cache, fused = model.new_cache(), None
    needed = cache.nbytes + sum(w.nbytes for w in model.parameters())

    def memory():
        nonlocal fused
        fused = Fused(model, cache=cache)
        fused.start(0, 0)
        fused.step(fused.TOKENS)                                  # captures the graph
        torch.cuda.synchronize()
        return {"of_needed": (torch.cuda.max_memory_allocated() - before) / needed}
    results.add("memory", name, 0, "memory", memory)

    @functools.cache  # made by the baseline that needs it first
    def hf():
        from transformers import AutoModelForCausalLM
        with torch.device("cuda"):
            made = AutoModelForCausalLM.from_config(config.to_transformers(), dtype=torch.float16).eval()
        made.generation_config.eos_token_id = None                # its text never ends
        return made

    for context in args.contexts:
        case = Case(model, cache, context, hf)
        tqdm.write(f"step {name} {context} limit of fused, the float16 reference's error: {case.limit:.2e}")
        for what, sampler in SAMPLERS.items() if fused else ():
            results.add("step", name, context, what, time_fused, case, fused, sampler)
        for what in args.baselines:
            results.add("step", name, context, what, BASELINES[what], case)
    prompt = torch.randint(1, config.vocab, (1, PROMPT + 12), device="cuda")
    if "eager" in args.baselines:
        results.add("first", name, PROMPT, "eager", time_first,
                    lambda prompt: list(model.generate(prompt[0], 2)), prompt)
    if fused and "transformers" in args.baselines:
        results.add("first", name, PROMPT, "fused", time_first,
                    lambda prompt: list(model.generate(prompt[0], 2, fused=fused)), prompt)
        results.add("first", name, PROMPT, "transformers", best_of, CUDNN, time_first,
                    lambda prompt: greedy(hf(), prompt, 2), prompt)


def ablate(name, args, results):
    """The fused step with one build constant changed, without a graph, and with more launches."""
    model = Pythia.random(name, dtype=torch.float16, device="cuda")
    case, L = Case(model, model.new_cache(), args.contexts[0]), model.config.n_layer

    def variant(tokens=Fused.TOKENS, **tuning):
        return time_fused(case, Fused(model, cache=case.cache, **tuning), tokens=tokens)

    def launch_a_layer():
        fused, graph = Fused(model, cache=case.cache), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(L):
                fused.launch(i, i + 1, tokens=int(i == L - 1))
        return time_fused(case, fused, step=graph.replay, tokens=1)
    for what, tuning in (ABLATIONS | LAUNCHES).items():
        results.add("ablation", name, case.context, what, variant, **tuning)
    results.add("ablation", name, case.context, A_LAYER, launch_a_layer)


def timeline(name, args, results):
    """When the blocks pass the kernel's marks, in us from a layer's start: means over layers."""
    model = Pythia.random(name, dtype=torch.float16, device="cuda")
    case = Case(model, model.new_cache(), args.contexts[0])
    fused = Fused(model, cache=case.cache, extra={"TIMELINE": 1})
    blocks, L = fused.clusters * fused.defines["CLUSTER"], model.config.n_layer

    def step():
        fused.start(case.token, case.context)
        fused.step()
        torch.cuda.synchronize()
        marks = fused.timeline[:blocks, 1:L].double() / 1e3                     # [blocks, layers, marks], us
        first = marks[:, :, 0].amin(0)                                          # [layers]
        return (marks - first[:, None]).mean(1), (first[-1] - first[0]) / (L - 2)
    runs = [step() for _ in range(WARM_UP + SAMPLES)][WARM_UP:]
    marks, layer_us = (torch.stack(values).mean(0) for values in zip(*runs))
    with_head = min(blocks, model.config.n_head * fused.defines["CLUSTER"])
    marks[with_head:, 2:7] = marks[with_head:, 1:2]                             # stages these do not have
    results.add("timeline", name, case.context, "layer", dict, marks_us=marks.tolist(),
                layer_us=float(layer_us), with_head=with_head)


def counted_run(name, context):
    """What ncu counts: one launch of COUNTED tokens, the second of its kind."""
    model = Pythia.random(name, dtype=torch.float16, device="cuda")
    fused, cudart = Fused(model), torch.cuda.cudart()
    for begin in (lambda: None, cudart.cudaProfilerStart):
        fused.start(0, context - COUNTED // 2)
        torch.cuda.synchronize()
        begin()
        fused.launch(0, model.config.n_layer, COUNTED)
        torch.cuda.synchronize()
    cudart.cudaProfilerStop()


def counters(name, args, results):
    """What the GPU's own counters say of a token, as ncu reads them, in a process of its own.

    They are read before and after the launch (app-range): ncu's default, to replay a kernel, ends in
    LaunchFailed for this cooperative one.
    """
    context = args.contexts[0]
    child = f"import torch, bench; torch.set_grad_enabled(False); bench.counted_run({name!r}, {context})"
    command = ["ncu", "--replay-mode", "app-range", "--clock-control", "none", "--csv", "--page", "raw",
               "--print-units", "base", "--metrics", ",".join(COUNTERS.values()), sys.executable, "-c", child]

    def count():
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE)
        return read_counters(result.stdout, result.stderr) | {
            "needed": token_bytes(Config.from_name(name), context)}
    results.add("counters", name, context, "ncu", count)


def read_counters(text, errors=""):
    """A row of what COUNTERS name, a token's numbers and shares, from ncu's CSV (a header, units, values).

    Raises Refused where that is not in `text`, with what `text` and `errors` say of an error.
    """
    lines = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    cells = dict(zip(lines[0], lines[2])) if len(lines) == 3 else {}
    numbers = [cells.get(metric, "").replace(",", "") for metric in COUNTERS.values()]
    if not all(re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", number) for number in numbers):
        said = [line.strip() for line in (errors + text).splitlines() if "error" in line.lower()]
        raise Refused(f"ncu counted nothing: {' '.join(said[:2]) or 'it printed no table of numbers'}")
    values = dict(zip(COUNTERS, map(float, numbers)))
    return {"token_us": values["time"] / 1e3 / COUNTED, "read": values["read"] / COUNTED,
            "busy": values["busy"] / 100, "issued": values["issued"]}


def quality(args, results):
    """How well float32, float16 and fused predict a text, and how close the last two come to the first.

    The text is cut into windows of the context's length. Each token is followed by the text's own next token,
    whatever a model would have chosen. The references read a window at once; fused reads token by token.
    """
    quiet(args.model)
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{args.text} cannot be read ({error}): give a text file in UTF-8") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact, half = (Pythia.from_pretrained(args.model, dtype=dtype, device=device)
                   for dtype in (torch.float32, torch.float16))
    tokens = torch.tensor([*exact.config.eos[:1], *Text(args.model, None).encode(text)], device=device)
    count, context, sums = len(tokens) - 1, exact.config.context, {}
    if count < 1:
        raise Refused(f"{args.text} has no token to predict: give a longer text")
    fused = Fused(half) if device == "cuda" else None
    for first in tqdm(range(0, count, context), desc="reading", unit="window"):
        following = tokens[first + 1:first + 1 + context]                       # [N]
        window = tokens[None, first:first + len(following)]                     # [1, N]
        logits = {"float32": exact(window)[0], "float16": half(window)[0].float()}  # [N, V] each
        if fused:
            logits["fused"] = torch.cat([fused(window[:, i:i + 1], fused.cache, i)[0]
                                         for i in range(len(following))])
        for what, values in logits.items():
            sums[what] = sums.get(what, 0) + fidelity(values, logits["float32"], following)
    for what, total in sums.items():
        nats, same, top5, off = (total / count).tolist()
        results.add("quality", os.path.basename(os.path.normpath(args.model)), count, what, dict,
                    perplexity=math.exp(nats), same=same, top5=top5, off=off)


def fidelity(logits, truth, following):
    """Sums over N tokens [4] float64, of logits [N, V] and those of float32, `truth`: nats of the token that
    follows; equal likeliest tokens; share of the five likeliest in common; mean absolute error of a logit."""
    five, true_five = (each.topk(5).indices for each in (logits, truth))        # [N, 5]
    return torch.stack([each.double().sum() for each in (
        cross_entropy(logits, following, reduction="none"), logits.argmax(-1) == truth.argmax(-1),
        (five[:, :, None] == true_five[:, None]).sum((1, 2)) / 5, (logits - truth).abs().mean(-1))])


# ---- report --------------------------------------------------------------------------------------------

def report():
    """Writes docs/results.md's tables and README.md's table from results/bench-*.json, and draws plots."""
    paths = sorted((HERE / "results").glob("bench-*.json"), key=lambda path: path.stem)
    if not paths:
        raise Refused("results/ holds no bench-*.json: run bench.py on a GPU first")
    try:
        from assets.plot import draw
    except ImportError as error:
        raise Refused("matplotlib is not installed: pip install matplotlib==3.11.2") from error
    files = {path.stem: json.loads(path.read_text()) for path in paths}
    sizes = {model: token_bytes(Config.from_name(model), 0) for model in SIZES}
    text = "\n\n".join(tables(data, draw(name, data, sizes, BASELINES)) for name, data in files.items())
    for place, lines in (("docs/results.md", text), ("README.md", short_table(files.values()))):
        begin, end, place = "<!-- results:begin -->", "<!-- results:end -->", HERE / place
        old = place.read_text()
        if not 0 <= old.find(begin) < old.find(end):
            raise Refused(f"{place} has no lines {begin} and {end}: add them where the tables belong")
        place.write_text(f"{old[:old.index(begin)]}{begin}\n{lines}\n{old[old.index(end):]}")
    print(text)


def markdown(header, body):
    """Lines of a table, without empty columns; no line if there is nothing but a first column."""
    filled = [i for i in range(len(header)) if any(cells[i] for cells in body)]
    lines = (header, len(header) * ["---"], *body) if len(filled) > 1 else ()
    return ["| " + " | ".join(cells[i].replace("|", r"\|") for i in filled) + " |" for cells in lines]


def steps_of(data):
    """{(model, context): {what: row}} of the steps, by size and context."""
    steps = {}
    for row in data["rows"].values():
        if row["kind"] == "step":
            steps.setdefault((row["model"], row["context"]), {})[row["what"]] = row
    return {place: steps[place] for place in sorted(steps, key=lambda p: (list(SIZES).index(p[0]), p[1]))}


def short_table(files):
    """README.md's table: a line a size and GPU, at the fewest tokens cached that were measured."""
    body = []
    for data in files:
        steps = steps_of(data)
        few = min((context for _, context in steps), default=0)
        for (model, context), rows in steps.items():
            if context == few and "us" in rows.get("greedy", {}):
                plain = [what for what in PLAIN if "us" in rows.get(what, {})]
                best = min(plain, key=lambda what: median(rows[what]["us"]), default="")
                body.append([model.removeprefix("pythia-"), data["gpu"].removeprefix("NVIDIA "),
                             *floors(rows), cell(rows.get(USUAL)),
                             f"{cell(rows.get(best), ratio=True)} {best}".strip(),
                             cell(rows.get("transformers"), ratio=True)])
    return "\n".join(markdown(["us a token", "GPU", "floor", "fused, greedy", "floor / greedy",
                               f"fused, {USUAL}", "plain PyTorch, the best (times greedy)",
                               "transformers (times greedy)"], body))


def floors(rows, spread=False):
    """Cells: the floor, fused greedy, and the first over the second."""
    row = rows.get("greedy", {})
    if "us" not in row:
        return ["", cell(row), ""]
    return [number(row["floor_us"]), cell(row, spread=spread), f"{row['floor_us'] / median(row['us']):.0%}"]


def number(us):
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def cell(row, spread=False, ratio=False, over=False, note=False):
    """A row in words: its median in microseconds, or what else it is about."""
    row = row or {}
    if "us" not in row:
        formats = {"failed": "{}", "seconds": "{:.1f} s", "of_needed": "{:.3f}", "layer_us": "{:.2f} us",
                   "perplexity": "perplexity {:.3f}"}
        return next((text.format(row[key]) for key, text in formats.items() if key in row), "")
    p10, p50, p90 = np.percentile(row["us"], (10, 50, 90))
    greedy_us = row.get("greedy_us")
    return number(p50) + (f" ({number(p10)} to {number(p90)})" if spread else "") + (
        f" ({p50 / greedy_us:.3g})" if ratio and greedy_us else "") + (
        f" ({p50 - greedy_us:+.1f})" if over and greedy_us else "") + (
        f" ({row['note']})" if note and "note" in row else "")


def tables(data, images=()):
    """Markdown of a GPU's record: its tables, with a title each, its runs, and links to its plots."""
    rows, runs, steps = data["rows"], data["runs"], steps_of(data)

    def get(*key):
        return rows.get(" ".join(map(str, key)), {})

    def of_kind(kind):
        return [row for row in rows.values() if row["kind"] == kind]

    def counted(row):
        return [row["failed"], "", "", "", ""] if "failed" in row else [
            number(row["token_us"]), f"{row['needed'] / 1e6:.1f} MB", f"{row['read'] / 1e6:.1f} MB",
            f"{row['busy']:.1%}", f"{row['issued']:.2f}"]
    ablated = sorted({(row["model"], row["context"]) for row in of_kind("ablation")})
    both = [(f"{model}, {context} cached", row["transformers"]) for (model, context), row in steps.items()
            if "transformers" in row]
    both += [(f"{row['model']}, {PROMPT} in, 2 out", row) for row in of_kind("first")]
    last = max((run for run in runs.values() if "reads" in run), key=lambda run: run["date"], default={})
    sections = {
        "A token": (["us a token", "cached", "floor", "fused, greedy (p10 to p90)", "floor / greedy",
                     f"fused, {USUAL}", *(f"{what} (times greedy)" for what in BASELINES)],
                    [[model, str(context), *floors(row, spread=True), cell(row.get(USUAL), over=True),
                      *(cell(row.get(what), ratio=True) for what in BASELINES)]
                     for (model, context), row in steps.items()]),
        "Sampling": (["us a token (more than greedy)", "cached", *SAMPLERS],
                     [[*map(str, place), *(cell(row.get(what), over=what != "greedy") for what in SAMPLERS)]
                      for place, row in steps.items() if USUAL in row]),
        "transformers": (["us", *CUDNN], [
            [where, *(number(row["settings_us"].get(what, math.nan)) for what in CUDNN)]
            for where, row in both if "settings_us" in row]),
        "First tokens, memory, build": (
            ["model", f"{PROMPT} tokens in, 2 out: fused, us", "eager, us", "transformers, us",
             "peak memory / (weights + cache)", "build"],
            [[model, *(cell(get(kind, model, context, what)) for kind, context, what in (
                ("first", PROMPT, "fused"), ("first", PROMPT, "eager"), ("first", PROMPT, "transformers"),
                ("memory", 0, "memory"), ("build", 0, "build")))]
             for model in SIZES if get("memory", model, 0, "memory")]),
        "One thing changed": (
            ["us a token", *(f"{model}, {context} cached" for model, context in ablated)],
            [[what, *(cell(get("ablation", *place, what), spread=True, note=what == "as shipped")
                      for place in ablated)] for what in (*ABLATIONS, *LAUNCHES, A_LAYER)]),
        "Counters": (["counted by ncu, a token", "us", "bytes that it must read", "bytes read from memory",
                      "memory busy", "instructions a cycle and multiprocessor, of 4"],
                     [[f"{row['model']}, {row['context']} cached", *counted(row)]
                      for row in of_kind("counters")]),
        "Fidelity": (["against float32", "", "tokens", "perplexity", "equal greedy tokens",
                      "overlap of the top 5", "mean error of a logit"],
                     [[row["model"], row["what"], str(row["context"]), f"{row['perplexity']:.4f}",
                       f"{row['same']:.2%}", f"{row['top5']:.2%}", f"{row['off']:.2g}"]
                      for row in of_kind("quality")]),
        "Reading": (["reader", "TB/s (p10 to p90)"],
                    [[reader, "{1:.3f} ({0:.3f} to {2:.3f})".format(*(rate / 1e12 for rate in rates))]
                     for reader, rates in last.get("reads", {}).items()])}
    out = [f"## {data['gpu']}"]
    for title, table in sections.items():
        if lines := markdown(*table):
            out += ["", f"### {title}", "", *lines]
    out += ["", "### Runs", ""]
    for date, run in sorted(runs.items()):
        facts = [date, f"`{run['command']}`", f"kernel {run['kernel'][:12]}" + (
            "" if run["kernel"] == kernel_hash() else " (fused_block.cu has changed since)")]
        if "read_by" in run:
            facts.append(f"reads {run['read_bytes_a_second'] / 1e12:.3f} TB/s ({run['read_by']})")
        facts += [f"{key} {run[key]}" for key in ("clocks.sm", "driver_version", "torch", "transformers")
                  if key in run]
        out.append("- " + ", ".join(facts))
    return "\n".join([*out, *(f"\n![{what}](../{path})" for what, path in images)])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}; see --help\n")
    add = parser.add_argument
    add("--models", nargs="+", default=["160m", "2.8b"], metavar="SIZE",
        help="14m to 12b (default: 160m 2.8b)")
    add("--contexts", nargs="+", type=int, metavar="T",
        help="tokens cached (default: 128 2000); --ablate, --timeline and --counters take the first alone "
             "(default: 128)")
    add("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES), metavar="NAME",
        help=f"of {', '.join(BASELINES)}, or none after the flag (default: all)")
    mode = functools.partial(parser.add_mutually_exclusive_group().add_argument, dest="mode",
                             action="store_const", default=compare)
    mode("--ablate", const=ablate, help="the kernel with one thing changed at a time, instead of baselines")
    mode("--timeline", const=timeline, help="what each thread block does when in a layer, nothing else")
    mode("--counters", const=counters, help="bytes and instructions, as ncu counts them")
    mode("--quality", const=quality, help="fused and float16 against float32, on a text; without a GPU, "
                                          "float16 alone, and nothing is recorded")
    add("--model", metavar="FOLDER",
        help="with --quality: a checkpoint in a folder, or on the Hub (default: tiny-pythia)")
    add("--text", metavar="FILE", help="with --quality: a text in UTF-8 (default: tiny-pythia/heldout.txt)")
    add("--report", action="store_true", help="docs/results.md, README's table and plots from results/")
    args = parser.parse_args(argv)
    args.contexts = args.contexts or ([128, 2000] if args.mode is compare else [128])
    args.models = ["pythia-" + size.removeprefix("pythia-") for size in args.models]
    try:
        if args.mode is not quality and (args.model or args.text):
            raise Refused("--model and --text go with --quality: the sizes to measure are --models")
        args.model, args.text = args.model or TINY, args.text or os.path.join(TINY, "heldout.txt")
        least = COUNTED // 2 if args.mode is counters else STEPS
        most = min(Config.from_name(name).context for name in args.models) - least
        if not all(least <= context <= most for context in args.contexts):
            raise Refused(f"--contexts must be from {least} to {most}")
        if args.report:
            return report()
        if args.mode is counters and not shutil.which("ncu"):
            raise Refused("ncu is not found: install Nsight Compute, which the CUDA toolkit has")
        return measure(args)
    except Refused as refusal:
        print(f"bench.py: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.py: interrupted; finished rows are in results/", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
