"""Times the fused decode step against its floor, and against what a user could run instead.

    python bench.py --models 2.8b 160m --contexts 128 2000    measure on this machine's GPU, print the table
    python bench.py --models 160m --baselines graph compile   only these baselines; results are merged
    python bench.py --models 2.8b --timeline                  or --ablate, or --counters, which needs ncu
    python bench.py --report                                  README and plots from results/; needs no GPU

A step is the user's whole token: embedding, all blocks, final LayerNorm, LM head, greedy argmax; float16,
batch 1, random weights. A sample is the mean of 16 steps back to back by CUDA events (of generate(): one
token by the clock); the table has the median of 30 samples or more (10 of the time to the second token), and
the 10th and 90th percentile. Fused makes 8 greedy tokens in a launch, as Pythia.generate does; the baselines
launch every step. The floor is the bytes that a step must read (every weight once, one row of embed_in, keys
and values of the cached tokens) over the bandwidth of a kernel that only reads, in the same run. Nothing of
ours is timed before its logits are compared with float64 arithmetic on the same float16 weights: fused may be
no further off than the float16 reference, a baseline twice as far. Raw samples are merged into
results/bench-<gpu>.json. Only --report needs matplotlib: pip install matplotlib==3.11.2

baselines, each with the best of its settings:
  eager                the reference in model.py, without reading tokens back
  graph                a step of fixed shapes in a CUDA graph: one or two streams, two layouts of the weights
  compile              the same step under torch.compile, in a CUDA graph: default mode; and max-autotune,
                       which tunes by coordinate descent, with biases added apart, as inductor writes only
                       products without a bias itself
  compile-static       the same with a static cache of a multiple of 256 positions, masked, and the token and
                       its position on the device; also with attention written out as products and sums
  transformers         generate() with its defaults
  transformers-static  generate() with the static cache, which compiles itself
graph and compile attend to a fixed number of positions, without a mask: one graph, one position. They could
not go on to generate a text, as compile-static could.
"""
import argparse
import copy
import csv
import ctypes
import functools
import gc
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from build import Fused, constants, device_arch, flags, kernel_hash, load, nvcc
from checkpoint import Refused
from model import SIZES, Config, Pythia

HERE = Path(__file__).resolve().parent
STEPS, SAMPLES, WARM_UP = 16, 30, 3  # steps a sample, samples, samples thrown away
NEW = 64                             # tokens a call of transformers' generate makes
PROMPT = 512                         # tokens before the first new one, for the time to first token

PROBE = r"""
__global__ void read_all(const uint4* data, size_t n, unsigned* sink) {
  const size_t threads = size_t(gridDim.x) * blockDim.x;
  unsigned sum = 0;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += 8 * threads) {
    uint4 v[8];  // eight loads of 16 bytes that do not wait for each other
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = __ldcs(data + i + j * threads);
#pragma unroll
    for (int j = 0; j < 8; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0x5eed) *sink = sum;  // without a use of sum the compiler drops the loads
}
extern "C" int probe(const void* data, size_t n, void* sink, int blocks, void* stream) {
  read_all<<<blocks, 512, 0, (cudaStream_t)stream>>>((const uint4*)data, n, (unsigned*)sink);
  return cudaGetLastError();
}
"""


def token_bytes(config, cached):
    """Bytes that a decode step must read with `cached` tokens before it, all in float16."""
    c, C = config, config.hidden
    block = 4 * C * C + 2 * C * c.mlp + (3 * C + C + c.mlp + C) + 4 * C         # matrices, biases, LayerNorms
    return 2 * (c.n_layer * (block + 2 * cached * C) + C + 2 * C + c.vocab * C)


# ---- one measurement -----------------------------------------------------------------------------------

def sample(step, reset=lambda: None, tokens=1):
    """Microseconds a token, SAMPLES means of STEPS tokens; `step` makes `tokens`. `reset` is not timed.

    The host waits only at the end, so it runs ahead of the GPU wherever the GPU is the slower one.
    """
    events = []
    for _ in range(WARM_UP + SAMPLES):
        reset()
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        for _ in range(STEPS // tokens):
            step()
        events[-1][1].record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 / STEPS for begin, end in events[WARM_UP:]]


def read_bandwidth(arch):
    """Bytes a second of a kernel that only reads, and what nvidia-smi says meanwhile (a dict of text)."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cu"), Path(folder, "probe.so")
        source.write_text(PROBE)
        subprocess.run([nvcc(), *flags({}, arch), "-shared", "-Xcompiler", "-fPIC", "-o", library, source],
                       check=True, capture_output=True)
        probe, pointer = ctypes.CDLL(str(library)).probe, ctypes.c_void_p
    probe.argtypes = pointer, ctypes.c_size_t, pointer, ctypes.c_int, pointer
    gpu = torch.cuda.get_device_properties(0)
    size = min(8 << 30, torch.cuda.mem_get_info()[0] // 2)                      # far more than L2 holds
    data = torch.empty(size // 4, dtype=torch.int32, device="cuda").random_()   # zeros could be read faster
    sink, bandwidths = torch.zeros(1, dtype=torch.int32, device="cuda"), []
    for blocks in (gpu.multi_processor_count * i for i in (1, 2, 4)):
        n = size // 16 // (blocks * 512 * 8) * (blocks * 512 * 8)               # no pass of the loop is cut

        def read(blocks=blocks, n=n):
            if error := probe(data.data_ptr(), n, sink.data_ptr(), blocks,
                              torch.cuda.current_stream().cuda_stream):
                raise Refused(f"the GPU cannot be read (CUDA error {error}): end what else uses it")
        bandwidths.append(n * 16 / median(sample(read)) * 1e6)
    for _ in range(500):                                                        # load for about a second
        read()
    fields = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id=GPU-{gpu.uuid}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    return max(bandwidths), dict(zip(fields.split(","), said.strip().split(", ")))


class Case:
    """A model with `context` tokens in its cache, the next token, and that token's logits in float64."""

    def __init__(self, model, cache, context, hf=None):
        """`hf()` gives a transformers model of the same shape."""
        self.model, self.cache, self.context, self.hf = model, cache, context, hf
        rng = torch.Generator(cache.device).manual_seed(context)
        self.tokens = torch.randint(model.config.vocab, (1, context + 1), generator=rng, device=cache.device)
        self.token = self.tokens[:, context:]
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
    """Logits [V] float64 of one token [1, 1]. Block by block: a float64 copy of 12b would not fit."""
    x = F.embedding(token, model.embed_in).double()
    for block, kv in zip(model.blocks, cache):
        x = copy.deepcopy(block).double()(x, model.rope[:, pos:pos + 1], kv.double(), pos)
    x = F.layer_norm(x, x.shape[-1:], model.lnf_w.double(), model.lnf_b.double(), model.config.eps)
    return F.linear(x, model.embed_out.double()).flatten()


def time_fused(case, fused, step=None, tokens=Fused.TOKENS):
    """Times `step`, which makes `tokens`; by default it is a launch."""
    step = step or functools.partial(fused.step, tokens=tokens)
    if STEPS % tokens:
        raise Refused(f"launches of {tokens} tokens do not make a sample of {STEPS}: take a divisor")
    case.fill()
    fused.start(case.token, case.context)
    fused.step()
    error = case.error(fused.logits, case.limit)
    if fused.history[case.context] != fused.logits.argmax():
        raise Refused("wrong, so not timed: the token is not the argmax of the logits")

    restart = functools.partial(fused.start, case.token, case.start)

    def text(function, times):
        restart()
        fused.history.fill_(-1)
        for _ in range(times):
            function()
        return fused.history[case.start:case.start + STEPS].tolist()
    if text(fused.step, STEPS) != text(step, STEPS // tokens):
        raise Refused("wrong, so not timed: tokens unlike those of launches of one token")
    note = ", ".join(f"{name} {fused.defines[name]}" for name in ("CLUSTER", "THREADS", "ROWS"))
    return {"us": sample(step, restart, tokens), "error": error, "note": note}


def time_eager(case):
    case.fill()
    now = {}

    def step():
        logits = case.model(now["token"], case.cache, now["pos"])
        now.update(token=logits[0].argmax(-1, keepdim=True), pos=now["pos"] + 1)
    us = sample(step, lambda: now.update(token=case.token, pos=case.start))
    return {"us": us, "error": case.limit}


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
    C, NH, HS, R = c.hidden, c.n_head, c.head_size, c.rotary_dims
    end = -(-(pos + 1) // 256) * 256 if static else pos + 1
    where, positions = torch.tensor([pos], device=token.device), torch.arange(end, device=token.device)
    # RoPE for q, k and v alike, x * cos + x[partner] * sin, with cos 1 and sin 0 where nothing turns
    partner = torch.arange(HS, device=token.device)
    partner[:R] = partner[:R].roll(R // 2)
    cos, sin = (table(end, 3, HS, device=token.device) for table in (torch.ones, torch.zeros))
    cos[:, :2, :R] = model.rope[0, :end].repeat(1, 2)[:, None]
    sin[:, :2, :R] = torch.cat((-model.rope[1, :end], model.rope[1, :end]), 1)[:, None]
    layout = torch.Tensor.contiguous if own_layout else torch.Tensor.detach
    layers = [(b, kv[..., :end, :].nan_to_num(), layout(b.w_out.T), layout(b.w_down.T))
              for b, kv in zip(model.blocks, case.cache)]
    side = torch.cuda.Stream() if two_streams else None

    def linear(x, w, b):
        return F.linear(x, w) + b if bias_apart else F.linear(x, w, b)

    def attention(x, b, kv, w_out):                                               # kv [2, 1, NH, end, HS]
        qkv = linear(F.layer_norm(x, (C,), b.ln1_w, b.ln1_b, c.eps), b.w_qkv, b.b_qkv).view(NH, 3, HS)
        at = where if static else pos
        qkv = (qkv * cos[at] + qkv[..., partner] * sin[at]).to(x.dtype)
        kv.index_copy_(3, where, qkv[:, 1:].transpose(0, 1).reshape(2, 1, NH, 1, HS))
        q, mask = qkv[:, 0].reshape(1, NH, 1, HS), (positions <= where)[None, None, None] if static else None
        if written_out:
            scores = (q.float() * kv[0]).sum(-1) / HS**0.5                        # [1, NH, end]
            p = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1)
            o = (p[..., None] * kv[1]).sum(2).to(x.dtype)
        else:
            o = F.scaled_dot_product_attention(q, kv[0], kv[1], mask)
        return linear(o.reshape(1, C), w_out, b.b_out)

    def mlp(x, b, w_down):
        hidden = linear(F.layer_norm(x, (C,), b.ln2_w, b.ln2_b, c.eps), b.w_up, b.b_up)
        return linear(F.gelu(hidden), w_down, b.b_down)

    def step():
        x = F.embedding(token, model.embed_in)                                    # [1, C]
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
        logits = F.linear(F.layer_norm(x, (C,), model.lnf_w, model.lnf_b, c.eps), model.embed_out)
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
    started = time.perf_counter()
    for _ in range(3):                                                            # compiles, tunes, allocates
        reset(case.context)
        step()
    torch.cuda.synchronize()
    seconds, graph = time.perf_counter() - started, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, _ = step()
    reset(case.context)
    graph.replay()
    error = case.error(logits, 2 * case.limit)
    return {"us": sample(graph.replay, lambda: reset(case.start)), "error": error, "warm_up_s": seconds}


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


def best_of(case, settings):
    """The fastest result of {name: setting}; its note says which, and how others failed."""
    results = {name: attempt(time_captured, case, **setting) for name, setting in settings.items()}
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


def time_generate(case, **kwargs):
    """Microseconds of each new token of generate(), in calls that make NEW of them around `case.context`."""
    first = max(1, min(case.context - NEW // 2, case.model.config.context - NEW))
    us, times = [], []                                            # times: the prompt's, then each token's
    streamer = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
    for i in range(5):
        times.clear()
        greedy(case.hf(), case.tokens[:, :first], NEW, streamer=streamer, **kwargs)
        if i > 0:                                                 # the first call warms up, or compiles
            us += (np.diff(times[1:]) * 1e6).tolist()
    return {"us": us}


def time_first(generate):
    """Microseconds from a prompt to the second new token: prefill and the first decode step."""
    us = []
    for _ in range(13):
        torch.cuda.synchronize()
        started = time.perf_counter()
        generate()
        torch.cuda.synchronize()
        us.append((time.perf_counter() - started) * 1e6)
    return {"us": us[3:]}


TUNED = {"mode": "max-autotune-no-cudagraphs", "own_layout": True, "bias_apart": True}
DEFAULT = {"mode": "default", "own_layout": True}
CAPTURED = {  # what best_of tries for each of these baselines
    "graph": {"one stream": {}, "two streams": {"two_streams": True},
              "one stream, [out, in]": {"own_layout": True},
              "two streams, [out, in]": {"own_layout": True, "two_streams": True}},
    "compile": {"default mode": DEFAULT, "max-autotune": TUNED},
    "compile-static": {"default mode": DEFAULT | {"static": True}, "max-autotune": TUNED | {"static": True},
                       "max-autotune, attention written out": TUNED | {"static": True, "written_out": True}}}
BASELINES = {"eager": time_eager,
             **{name: functools.partial(best_of, settings=settings) for name, settings in CAPTURED.items()},
             "transformers": time_generate,
             "transformers-static": functools.partial(time_generate, cache_implementation="static")}
ABLATIONS = {"as shipped": {}, **{f"clusters of {k}": {"cluster": k} for k in (1, 2, 4, 8)},
             **{f"{n} threads at least": {"threads": n} for n in (128, 256, 384, 512)},
             **{f"{n} rows a team and tile": {"rows": n} for n in (2, 4, 8)}, "no pace": {"pace": 2**20}}
LAUNCHES = {"no graph": {"graph": False}, "one launch a token": {"tokens": 1}}  # of the kernel as shipped

COUNTED = 64  # tokens, around the context that is asked for
COUNTERS = {  # Nsight Compute's names, on Hopper
    "time": "gpu__time_duration.sum", "read": "dram__bytes_read.sum",
    "busy": "dram__cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issued": "sm__inst_executed.avg.per_cycle_elapsed"}

PHASES = {  # what ends at the kernel's marks 1.. and at the next layer's first mark, and its colour
    "S0 x, S1 LayerNorm": "#808080", "S2 q, k, v rows": "#0072B2", "S8 units, wait for (1)": "#56B4E9",
    "S3-S5 rope, append, attend": "#D55E00", "S8 units, wait for (2)": "#56B4E9",
    "S6, S7 out rows": "#E69F00", "S8 units": "#009E73", "S9 sum, wait for (3)": "#CC79A7",
    "S9 add to x": "#F0E442", "wait for (4)": "#80808040"}


# ---- runs ----------------------------------------------------------------------------------------------

class Results:
    """results/bench-<gpu>.json: {"gpu", "runs": {date: facts}, "rows": {key: row}}; new rows replace old."""

    def __init__(self, path, gpu, run):
        self.path, self.run, self.wrong, self.fused = path, run, False, {}
        self.data = json.loads(path.read_text()) if path.exists() else {"gpu": gpu, "runs": {}, "rows": {}}
        self.data["runs"][run["date"]] = run

    def add(self, kind, model, context, what, function, *args, **kwargs):
        """Makes a row of what `function` returns, or of why it failed; prints it and writes the file."""
        row = {"kind": kind, "model": model, "context": context, "run": self.run["date"]}
        row |= attempt(function, *args, **kwargs)
        self.wrong |= row.get("failed", "").startswith("wrong")
        if kind in ("step", "ablation"):
            if what in ("fused", "as shipped") and "us" in row:
                self.fused[model, context] = median(row["us"])
            needed = token_bytes(Config.from_name(model), context)
            row |= {"floor_us": needed / self.run["read_bytes_a_second"] * 1e6,
                    "fused_us": self.fused.get((model, context))}
        key = f"{kind} {model} {context} {what}"
        self.data["rows"][key] = row
        used = {row["run"] for row in self.data["rows"].values()}
        self.data["runs"] = {date: run for date, run in self.data["runs"].items() if date in used}
        whole = self.path.with_suffix(".new")                     # a run that is killed leaves the old file
        whole.write_text(json.dumps(self.data).replace(': {"kind"', ':\n{"kind"') + "\n")
        whole.replace(self.path)
        error = f", error {row['error']:.2e}" if "error" in row else ""
        tqdm.write(f"{key}: {cell(row, spread=True, ratio=True, note=True)}{error}")


def measure(args):
    """Measures what the command line asks for; the exit code is 1 if a result was wrong."""
    if not torch.cuda.is_available():
        raise Refused("no CUDA GPU is found: measure on a machine with one; --report needs none")
    torch.set_grad_enabled(False)
    arch, gpu = device_arch("cuda"), torch.cuda.get_device_name()
    bandwidth, state = read_bandwidth(arch)
    run = {"date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "kernel": kernel_hash(),
           "command": shlex.join(["python", "bench.py", *sys.argv[1:]]), "read_bytes_a_second": bandwidth,
           **state, "torch": torch.__version__, "cuda": torch.version.cuda,
           "transformers": version("transformers")}
    slug = re.sub("[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia "))
    results = Results(HERE / "results" / f"bench-{slug}.json", gpu, run)
    tqdm.write("\n".join([gpu, *(f"  {key}: {value}" for key, value in run.items())]))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCH_EXTENSIONS_DIR"] = folder               # so that no kernel is found already built
        build_all(args, results, arch)
        for name in tqdm(args.models, desc="measuring", unit="model"):
            if failed := attempt(args.mode, name, args, results):  # too large for this GPU, for one
                results.add("step", name, args.contexts[0], "fused", dict, failed)
    print(tables(results.data))
    return int(results.wrong)


def build_all(args, results, arch):
    """Compiles every kernel of this run, side by side; the seconds that each took are rows."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    tunings = {ablate: ABLATIONS.values(), timeline: [{"extra": {"TIMELINE": 1}}]}.get(args.mode, [{}])
    jobs = [(name, tuning) for name in args.models for tuning in tunings]

    def build(name, tuning):
        started = time.perf_counter()
        load(constants(Config.from_name(name), arch, sms=sms, **tuning), arch)
        return {"seconds": time.perf_counter() - started, "at_once": len(jobs)}
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
        fused.step(tokens=fused.TOKENS)                           # captures the graph
        torch.cuda.synchronize()
        return {"of_needed": (torch.cuda.max_memory_allocated() - before) / needed, "needed_bytes": needed}
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
        if fused:
            results.add("step", name, context, "fused", time_fused, case, fused)
        for what in args.baselines:
            results.add("step", name, context, what, BASELINES[what], case)
    if "transformers" in args.baselines:
        prompt = torch.randint(1, config.vocab, (1, PROMPT), device="cuda")
        results.add("first", name, PROMPT, "fused", time_first,
                    lambda: list(model.generate(prompt[0], 2, fused=True)))
        results.add("first", name, PROMPT, "transformers", time_first, lambda: greedy(hf(), prompt, 2))


def ablate(name, args, results):
    """The fused step with one build constant changed, without a graph, and with more launches."""
    model = Pythia.random(name, dtype=torch.float16, device="cuda")
    case, L = Case(model, model.new_cache(), args.contexts[0]), model.config.n_layer

    def variant(tokens=Fused.TOKENS, **tuning):
        return time_fused(case, Fused(model, cache=case.cache, **tuning), tokens=tokens)

    def launch_a_block():
        fused, graph = Fused(model, cache=case.cache), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(L):
                fused.launch(i, i + 1, tokens=int(i == L - 1))
        return time_fused(case, fused, graph.replay, tokens=1)
    for what, tuning in (ABLATIONS | LAUNCHES).items():
        results.add("ablation", name, case.context, what, variant, **tuning)
    results.add("ablation", name, case.context, "one launch a block", launch_a_block)


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


# ---- report --------------------------------------------------------------------------------------------

def report():
    """Every results/bench-*.json as tables on standard output and in README.md, and as plots in assets/."""
    paths = sorted((HERE / "results").glob("bench-*.json"), key=lambda path: path.stem)
    if not paths:
        raise Refused("results/ holds no bench-*.json: run bench.py on a GPU first")
    files = {path.stem: json.loads(path.read_text()) for path in paths}
    text = "\n\n".join(tables(data, plots(name, data)) for name, data in files.items())
    print(text)
    readme, begin, end = HERE / "README.md", "<!-- bench:begin -->", "<!-- bench:end -->"
    old = readme.read_text()
    if not 0 <= old.find(begin) < old.find(end):
        raise Refused(f"README.md has no lines {begin} and {end}: add them where the tables belong")
    readme.write_text(f"{old[:old.index(begin)]}{begin}\n{text}\n{old[old.index(end):]}")


def number(us):
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def cell(row, spread=False, ratio=False, note=False):
    """A row in words: its median in microseconds, or what else it is about."""
    if "us" not in row:
        formats = {"failed": "{}", "seconds": "{:.1f} s", "of_needed": "{:.3f}", "layer_us": "{:.2f} us"}
        return next((text.format(row[key]) for key, text in formats.items() if key in row), "")
    p10, p50, p90 = np.percentile(row["us"], (10, 50, 90))
    return number(p50) + (f" ({number(p10)} to {number(p90)})" if spread else "") + (
        f" ({p50 / row['fused_us']:.3g})" if ratio and row.get("fused_us") else "") + (
        f" ({row['note']})" if note and "note" in row else "")


def tables(data, images=()):
    """Markdown: steps; time to the second token, memory, build; ablations; counters; runs; images."""
    rows, out = data["rows"], []

    def get(*key):
        return rows.get(" ".join(map(str, key)), {})

    def places(kind):
        return sorted({(r["model"], r["context"]) for r in rows.values() if r["kind"] == kind},
                      key=lambda place: (list(SIZES).index(place[0]), place[1]))

    def table(header, body):
        filled = [i for i in range(len(header)) if any(cells[i] for cells in body)]
        if len(filled) > 1:
            for cells in (header, len(header) * ["---"], *body):
                out.append("| " + " | ".join(cells[i].replace("|", r"\|") for i in filled) + " |")
            out.append("")

    steps, counted = [], []
    for model, context in places("step"):
        fused = get("step", model, context, "fused")
        floor = number(fused["floor_us"]) if "us" in fused else ""
        share = f"{fused['floor_us'] / median(fused['us']):.0%}" if "us" in fused else ""
        steps.append([model, str(context), floor, cell(fused, spread=True), share,
                      *(cell(get("step", model, context, what), ratio=True) for what in BASELINES)])
    for model, context in places("counters"):
        row = get("counters", model, context, "ncu")
        cells = [row["failed"], "", "", "", ""] if "failed" in row else [
            number(row["token_us"]), f"{row['needed'] / 1e6:.1f} MB", f"{row['read'] / 1e6:.1f} MB",
            f"{row['busy']:.1%}", f"{row['issued']:.2f}"]
        counted.append([f"{model}, {context} cached", *cells])
    models = [[model, *(cell(get(kind, model, context, what)) for kind, context, what in (
        ("first", PROMPT, "fused"), ("first", PROMPT, "transformers"), ("memory", 0, "memory"),
        ("build", 0, "build")))] for model, _ in places("memory")]
    ablated = places("ablation")
    table(["us a token", "cached", "floor", "fused (p10 to p90)", "floor / fused",
           *(f"{what} (times fused)" for what in BASELINES)], steps)
    table(["model", f"{PROMPT} tokens in, 2 out: fused, us", "transformers, us",
           "peak memory / (weights + cache)", "build"], models)
    table(["us a token", *(f"{model}, {context} cached" for model, context in ablated)],
          [[what, *(cell(get("ablation", *place, what), spread=True, note=what == "as shipped")
                    for place in ablated)] for what in (*ABLATIONS, *LAUNCHES, "one launch a block")])
    table(["counted by ncu, a token", "us", "bytes that it must read", "bytes read from memory",
           "memory busy", "instructions a cycle and multiprocessor, of 4"], counted)
    for date, run in sorted(data["runs"].items()):
        changed = "" if run["kernel"] == kernel_hash() else " (fused_block.cu has changed since)"
        facts = (f"{key} {run[key]}" for key in ("clocks.sm", "driver_version", "torch", "transformers")
                 if key in run)
        out.append(f"- {data['gpu']}, {date}, `{run['command']}`, kernel {run['kernel'][:12]}{changed}, "
                   f"reads {run['read_bytes_a_second'] / 1e12:.3f} TB/s, {', '.join(facts)}")
    return "\n".join([*out, *(f"\n![{what}]({path})" for what, path in images)])


def plots(name, data):
    """Draws layers' timelines, ms a token by model size and by tokens cached, in assets/; [(what, path)].

    Mid-grey and Okabe and Ito's colours (jfly.uni-koeln.de/color), to be read on white and on black.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Refused("matplotlib is not installed: pip install matplotlib==3.11.2") from error
    grey, images = "#808080", []
    rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11, "legend.frameon": False,
        "savefig.transparent": True, "axes.spines.top": False, "axes.spines.right": False, **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), grey)})
    colours = ("#0072B2", "#CC79A7", "#009E73", "#56B4E9", "#D55E00", "#E69F00", "#F0E442")
    styles = {"floor": {"color": grey, "linestyle": "--"}}
    for what, colour in zip(("fused", *BASELINES), colours, strict=True):
        styles[what] = {"color": colour, "marker": "o", "markersize": 4}

    def save(ax, title, part, xlabel):
        images.append((title, f"assets/{name}-{part}.svg"))
        ax.set(xlabel=f"{xlabel}; {data['gpu']}")
        ax.figure.savefig(HERE / images[-1][1], metadata={"Date": None}, bbox_inches="tight")

    curves = {}  # {(what, model): {tokens cached: ms a token}}
    for key, row in data["rows"].items():
        what, model, cached = key.split()[-1], row["model"], row["context"]
        if row["kind"] == "timeline" and "marks_us" in row:
            save(draw_timeline(Figure(figsize=(8, 5.6)).gca(), row),
                 f"One layer of {model}, thread block by thread block", f"timeline-{model}",
                 f"us since the layer's start; {model}, {cached} tokens cached")
        if row["kind"] == "step" and "us" in row:
            if what == "fused":
                curves.setdefault(("floor", model), {})[cached] = row["floor_us"] / 1e3
            curves.setdefault((what, model), {})[cached] = median(row["us"]) / 1e3
    few, *more = sorted({cached for curve in curves.values() for cached in curve}) or [0]
    if not more:  # too little for a plot
        return images
    size, context = (Figure(figsize=(8, 4.8)).gca() for _ in range(2))
    for ax in (size, context):
        ax.set(ylabel="ms a token", yscale="log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(color=grey, alpha=0.25, linewidth=0.6)
    sizes = {model: token_bytes(Config.from_name(model), 0) for _, model in curves}
    for what, style in styles.items():  # of no points, plot() makes no line, nor does the legend
        size.plot(*zip(*sorted((sizes[model], curve[few]) for (of, model), curve in curves.items()
                               if of == what and few in curve)), label=what, **style)
    size.set(xscale="log")
    size.set_xticks([], minor=True)
    size.set_xticks(list(sizes.values()), [model.removeprefix("pythia-") for model in sizes])
    size.legend()
    for (what, model), curve in curves.items():
        if what in ("floor", "fused"):
            context.plot(*zip(*sorted(curve.items())), **styles[what])
        if what == "fused":
            context.annotate(model.removeprefix("pythia-"), max(curve.items()), (6, 0), va="center", size=9,
                             textcoords="offset points")
    save(size, "Time a token against model size", "size", f"model, {few} tokens cached")
    save(context, "Time a token against tokens cached", "context",
         "tokens cached (solid: fused, dashed: floor)")
    return images


def draw_timeline(ax, row):
    """Draws one layer, a line a thread block; `ax` again."""
    marks = np.array(row["marks_us"])
    ends = np.c_[marks[:, 1:], marks[:, 0] + row["layer_us"]]
    for (phase, colour), begin, end in zip(PHASES.items(), marks.T, ends.T):
        ax.fill_betweenx(range(len(marks) + 1), np.r_[begin, begin[-1]], np.r_[end, end[-1]], step="post",
                         color=colour, linewidth=0, label=phase)
    ax.set(ylabel=f"thread block (those before {row['with_head']} have a head)", ylim=(len(marks), -1))
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9)
    return ax


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
    add("--report", action="store_true", help="README tables and plots from results/, no measuring")
    args = parser.parse_args(argv)
    args.contexts = args.contexts or ([128, 2000] if args.mode is compare else [128])
    args.models = ["pythia-" + size.removeprefix("pythia-") for size in args.models]
    try:
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
