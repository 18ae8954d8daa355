"""What several test files share: rows of the table, checkpoints, decoders, comparisons with float64."""
import copy
import ctypes
import io
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTNeoXForCausalLM
from transformers.utils import logging

import build
import generate
from build import Fused
from checkpoint import Refused
from emulator.emulator import kernel_constants
from model import Config, Pythia, Sampler

HERE = Path(__file__).resolve().parents[1]
TINY = generate.TINY
DEVICE = "cuda"
logging.set_verbosity_error()   # no remarks and no progress bars
logging.disable_progress_bar()  # between the rows of the table
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
gpu = pytest.mark.usefixtures("kernels")  # tests of the kernel on a GPU; skipped, with the reason, elsewhere


# ------------------------------------------------------------------------------------- rows, and processes

def report(what, check, error, limit=0):
    """Prints one row of the table and fails the test unless error <= limit."""
    error, limit = float(error), float(limit)
    ok = error <= limit
    print(f"{what:<17} {check:<55} {error:<9.3g} <= {limit:<8.3g} {'PASS' if ok else 'FAIL'}")
    assert ok, f"{what}: {check}: {error} > {limit}"


def report_refusal(case, words, said, rc=2):
    """A refusal is exit code 2 and one line that has the words."""
    faults = [f"no {word!r}" for word in words if word not in said]
    faults += [f"exit code {rc}"] * (rc != 2) + [f"{said.count(chr(10))} lines"] * (said.count("\n") != 1)
    report("refusal", case + (f": {faults} in {said!r}" if faults else ""), len(faults))


def report_refused(case, words, function, *args, **kw):
    """The same of what `function` raises."""
    try:
        said = f"no refusal but {function(*args, **kw)}"
    except Refused as refusal:
        said = str(refusal)
    report_refusal(case, words, said + "\n")


def exit_of(main, *args):
    """What a command line says on standard error, and its exit code."""
    with redirect_stderr(io.StringIO()) as err:
        try:
            rc = main(*args)
        except SystemExit as end:  # argparse's way
            rc = end.code
    return err.getvalue(), rc


def in_fresh_process(seconds, function, *args):
    """What `function` (of a module) prints last in a process of its own, which is JSON."""
    call = f"import {function.__module__} as m; m.{function.__name__}(*{args!r})"
    out = subprocess.run([sys.executable, "-c", call], cwd=HERE, stdout=subprocess.PIPE, text=True,
                         timeout=seconds, check=True).stdout
    return json.loads(out.splitlines()[-1])


def in_fork(function, seconds):
    """What `function` returns in a copy of this process: what it breaks in memory stays there."""
    def run():
        torch.set_num_threads(1)  # the others were not copied
        sender.send(function())
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    child.start()
    sender.close()
    try:
        assert receiver.poll(seconds), f"not ended after {seconds} s"
        return receiver.recv()  # EOFError: it has crashed
    finally:
        child.kill()


def command(*argv, **env):
    return subprocess.Popen([sys.executable, os.path.join(HERE, "generate.py"), *argv], env=os.environ | env,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---------------------------------------------------------------------------------- models and checkpoints

def error_of(ours, theirs):
    """Largest difference, in units of the standard deviation of `theirs` (a logit's scale)."""
    return torch.linalg.vector_norm(ours - theirs, math.inf) / theirs.std()


def in_pieces(model, tokens, cache, cuts):
    """Logits of tokens [B, T] at positions cuts[0]..cuts[-1] - 1, in pieces that end at the other cuts."""
    return torch.cat([model(tokens[:, a - cuts[0]:b - cuts[0]], cache, a) for a, b in pairwise(cuts)], 1)


def filled_cache(model, position):
    """A cache with random keys and values before `position`, NaN from there on."""
    cache = model.new_cache().fill_(math.nan)
    cache[..., :position, :].normal_(generator=torch.Generator().manual_seed(position))
    return cache


def transformers_twin(model):
    """A GPTNeoXForCausalLM with the weights of `model`; only the two transposed matrices are copied."""
    config = model.config.to_transformers()
    with torch.device("meta"):  # no memory and no time for weights that are replaced at once
        hf = GPTNeoXForCausalLM(config)
    ours = [model.embed_in, *model.blocks.parameters(), model.lnf_w, model.lnf_b, model.embed_out]
    transposed = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
    hf.load_state_dict({name: w.T.contiguous() if name.endswith(transposed) else w
                        for name, w in zip(hf.state_dict(), ours, strict=True)}, assign=True)
    hf.gpt_neox.rotary_emb = type(hf.gpt_neox.rotary_emb)(config)
    return hf.eval().requires_grad_(False)


def small_checkpoint(folder, shard="1GB"):
    """A GPT-NeoX checkpoint of 2 layers written by transformers; returns the transformers model."""
    config = Config(n_layer=2, n_head=4, hidden=64, mlp=256, vocab=300, rotary_dims=4)
    hf = transformers_twin(Pythia.random(config))
    hf.save_pretrained(folder, max_shard_size=shard)
    return hf


def says(**fields):
    """These fields of config.json are changed."""
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return edit


def grown(function):
    """By how many bytes resident memory grew, at most, while `function` ran."""
    def status(key):
        return 1024 * int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most that was resident, begins anew
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


# ------------------------------------------------------------------------------------------------ sampling

def probabilities(logits, temperature, top_k, top_p):
    """What `generate` promises to draw from, in numpy and float64."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    kept = order[:top_k]
    if top_p:
        share = p[kept] / p[kept].sum()
        kept = kept[:np.searchsorted(share.cumsum(), top_p) + 1]
    return np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()


def chi_square(counts, p):
    """Pearson's statistic, and its 99.9 % quantile (Wilson and Hilferty) if the counts were drawn from p."""
    if counts[p == 0].any():
        return np.inf, 0.0
    counts, expected = counts[p > 0], counts.sum() * p[p > 0]
    rare = expected < 5  # too few for the approximation: together they are one bin
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    df = max(len(counts) - 1, 1)
    quantile = df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3
    return ((counts - expected) ** 2 / expected).sum(), quantile


DRAWS = [(1, None, None), (0.6, None, None), (1, 10, None), (1, None, 0.7), (0.8, 20, 0.8),  # T, top-k, top-p
         (2, 1, None), (2, None, 1e-9), (1, 40, 1.0)]                                        # one token; all


def flat_logits(model):
    """Makes the logits the same after every text, so that one long text is many draws; returns them."""
    model.lnf_w.zero_()
    model.lnf_b *= 10
    return (model.embed_out.double() @ model.lnf_b.double()).cpu().numpy()


def report_frequencies(what, logits, settings, drawn):
    """`drawn` tokens against the distribution that `settings` promise, and against one that must not fit."""
    temperature, top_k, top_p = settings
    counts, p = np.bincount(drawn, minlength=len(logits)), probabilities(logits, *settings)
    label = f"T {temperature}, top-k {top_k}, top-p {top_p}: "
    found, limit = chi_square(counts, p)
    report(what, label + f"chi-square of {len(drawn)}", found, limit)
    cut = (temperature * 2, top_k, top_p) if p.max() < 1 else (temperature, None, None)
    found, limit = chi_square(counts, probabilities(logits, *cut))
    report(what, label + ("is not T * 2" if p.max() < 1 else "is not all tokens"), limit, found)


def report_seeds(what, text):
    """`text(temperature, ...)`: a list of tokens."""
    same = text(1, top_p=0.9, seed=5)
    report(what, "same seed, another text", same != text(1, top_p=0.9, seed=5))
    report(what, "other seed, same text", same == text(1, top_p=0.9, seed=6))
    report(what, "no seed twice, same text", text(1) == text(1))
    report(what, "top-k 1 unlike greedy", text(1.5, top_k=1, seed=1) != text(0))
    return same


def report_lengths(what, model, **kw):
    """`model`: with a context of 64, and without a token that ends a text."""
    for prompt, wanted, n in (([1, 2, 3], 1000, 62), ([1] * 64, 9, 1), ([1], 5, 5), ([1], 0, 0)):
        unlike = abs(len(list(model.generate(prompt, wanted, **kw))) - n)
        report(what, f"{len(prompt)} + {wanted} tokens in a context of 64: unlike {n}", unlike)


# --------------------------------------------------------------- the kernel: shapes, decoders, comparisons

def cut(name, **fields):
    """The Config of a size with 2 layers and 512 words: one of its blocks is what is looked at."""
    return replace(Config.from_name(name), **{"n_layer": 2, "vocab": 512} | fields)


def multiprocessors():
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


CLUSTERS = (1, 2, 4, 8)
CHI_SQUARE = cut("pythia-14m", n_layer=1, vocab=40, eos=())
SHORT = cut("pythia-14m", context=64, eos=())
DEEP = replace(Config.from_name("pythia-31m"), vocab=512)
SMALL = cut("pythia-70m", n_layer=3, mlp=600, vocab=200, context=512)
AHEAD = cut("pythia-14m", n_layer=1, mlp=64, vocab=64, context=512)


def random_half(config, device=DEVICE):
    return Pythia.random(config, 1, torch.float16, device)


def tiny_half(dtype=torch.float16):
    """The embedded checkpoint on the GPU, with texts that do not end by themselves."""
    model = Pythia.from_pretrained(TINY, dtype=dtype, device=DEVICE)
    model.config = replace(model.config, eos=())
    return model


def hard_input(C, rng):
    """x [C] fp16 around 1, with outliers of 30 and more."""
    x = torch.randn(C, generator=rng, device=rng.device) + 1
    x[::97] *= 30
    return x.half()


def against(ours, theirs, exact, norms=(2, math.inf)):
    """(ratio, our error, PyTorch fp16's) against float64, in the norm (of `norms`) with the worse ratio."""
    found = []
    for norm in norms:
        mine, fp16 = (torch.linalg.vector_norm(t.double().flatten() - exact.flatten(), norm)
                      / torch.linalg.vector_norm(exact.flatten(), norm) for t in (ours, theirs))
        ratio = float(mine / fp16)
        found.append((ratio if math.isfinite(ratio) else math.inf, float(mine), float(fp16)))
    return max(found)


def residual(fused):
    """x [C] float64, as the last launch left it."""
    x = fused.residual[int(fused.state[2]) % 2] >> 9                # COUNT_BITS
    return (x.double() / 2.0**22).where(x.abs() < 2**46, math.nan)  # FIXED_ONE, FIXED_EDGE


def launch_block(fused, x, pos):
    """y [C] float64 of layer 1 alone, for x [C] at `pos`."""
    fused.start(0, pos)
    steps = int(fused.state[2])
    now = (x.nan_to_num(0, 0, 0).double() * 2.0**22).round().long()
    now[~x.isfinite()] = 1 << 47                                    # FIXED_NAN
    fused.residual[steps % 2] = now << 9 | steps // 2 % 2 << 8 | fused.clusters + 1
    fused.next_layer = 1
    fused.launch(1, 2)
    return residual(fused)


class Watched:
    """Moves what a launch may write into the middle of larger buffers; counts changes elsewhere, in bytes."""
    MARGIN = 4096

    def __init__(self, fused):
        self.fused, self.wholes = fused, {}
        written = ("cache", "residual", "logits", "history", "state", "settings")
        for index, name in enumerate(written, -9):
            old = getattr(fused, name)
            size = old.nbytes + 2 * self.MARGIN
            whole = torch.full((size,), 0x5a, dtype=torch.uint8, device=old.device)
            self.wholes[name] = whole.pin_memory() if old.is_pinned() else whole
            new = self.inside(self.wholes[name], old)
            new.copy_(old)
            assert fused.pointers[index] == old.data_ptr()
            fused.pointers[index] = new.data_ptr()
            setattr(fused, name, new)
        # weights, tables, and the buffers that were replaced
        self.wholes |= {i: t.view(torch.uint8) for i, t in enumerate(fused.tensors)}

    def inside(self, whole, like):
        return whole[self.MARGIN:-self.MARGIN].view(like.dtype).view(like.shape)

    def remember(self):
        self.before = {name: whole.clone() for name, whole in self.wholes.items()}

    def changed(self, **allowed):
        """Bytes unlike those of `remember`, but for name[index] of every name=index."""
        for name, index in allowed.items():
            like = getattr(self.fused, name)
            self.inside(self.before[name], like)[index] = like[index]
        return sum(int((whole != self.before[name]).sum()) for name, whole in self.wholes.items())


def report_tokens(name, fused, first, launches):
    """Greedy tokens from position `first` on in `launches` of several, against one in a launch."""
    L, end = fused.config.n_layer, first + sum(launches)

    def made(launches):
        fused.cache[..., first:, :] = math.nan
        fused.history.zero_()
        fused.start(5, first)
        for n in launches:
            fused.launch(0, L, tokens=n)
        if fused.device.type == "cuda":
            torch.cuda.synchronize()  # the history is in the host's memory
        return (fused.logits.clone(), fused.cache[..., :end, :].clone(), fused.history.clone(),
                fused.state[:2].clone(), residual(fused))
    fused.cache.normal_(generator=torch.Generator(fused.device).manual_seed(0))
    alone, together = made([1] * (end - first)), made(launches)
    unlike = sum(not torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    report(name, f"{end - first} tokens from {first} on, up to {max(launches)} a launch: other bits", unlike)


def report_edges(what, model, fused):
    block, C, V, pos, device = model.blocks[1], model.config.hidden, model.config.vocab, 100, fused.device
    rng, exact = torch.Generator(device).manual_seed(0), copy.deepcopy(block).double()
    (keys, values), rope = fused.cache[1, :, 0], model.rope[:, pos:pos + 1]

    def launch(x):
        kv = fused.cache[1].clone()
        return launch_block(fused, x, pos), block(x.view(1, 1, C), rope, kv.clone(), pos)[0, 0], kv
    usual = hard_input(C, rng)
    large = torch.where(usual.abs() > 30, 60000 * usual.sign(), usual)
    flat = torch.ones_like(usual)
    for case, x, times in (("columns of +-60000", large, 1), ("x = 3, variance 0", 3 * flat, 1),
                           ("x = 0.1, variance 0", 0.1 * flat, 1), ("keys * 100", usual, 100)):
        fused.cache.normal_(generator=rng)
        keys *= times
        ours, fp16, kv = launch(x)
        truth = exact(x.double().view(1, 1, C), rope, kv.double(), pos)
        ratio, mine, theirs = against(ours, fp16, truth)
        report(what, f"{case}: {mine:.1e} / fp16 {theirs:.1e}", ratio, 1)
    for case, value, where in (("Inf in x", math.inf, None), ("NaN in x", math.nan, None),
                               ("NaN in a key", math.nan, keys), ("Inf in a value", math.inf, values)):
        fused.cache.normal_(generator=rng)
        x = hard_input(C, rng)
        (x if where is None else where[2, 7])[5] = value
        ours, fp16, _ = launch(x)
        wrong = (ours.isfinite() != fp16.isfinite()).sum()
        report(what, f"{case}: columns finite in one of PyTorch and fused", wrong)
        report(what, f"{case}: all of y is finite", ours.isfinite().all())

    fused.cache.normal_(generator=rng)
    token = torch.tensor([[3]], device=device)
    best = int(fused(token, fused.cache, 50).argmax())
    rows = sorted({best, (best + 1) % V, (best + V // 2) % V})  # of the same block, and of another
    model.embed_out[rows] = model.embed_out[best].clone()
    logits = fused(token, fused.cache, 50).flatten()
    report(what, "three equal rows: logits that differ", len(set(logits[rows].tolist())) - 1)
    report(what, "three equal rows: argmax unlike the first", int(fused.state[0]) != rows[0])
    model.lnf_w.zero_()
    model.lnf_b.fill_(1)  # a logit is the sum of its row
    for case, which, value in (("one Inf", best, math.inf), ("one NaN", best, math.nan),
                               ("one -Inf", best, -math.inf), ("all -Inf", slice(None), -math.inf)):
        head = model.embed_out.clone()
        model.embed_out[which] = value
        chosen = Sampler()(fused(token, fused.cache, 50).flatten(), 51)
        report(what, f"logits, {case}: token unlike {chosen}", int(fused.state[0]) != chosen)
        model.embed_out.copy_(head)
    fused.state[1] = model.config.context
    watched = Watched(fused)
    watched.remember()
    fused.launch(0, model.config.n_layer, tokens=1)
    report(what, "bytes changed by a step after the last position", watched.changed())


# ------------------------------------------------------------------ the kernel on a CPU, see simulator.cpp

def source_for_cpu(text):
    """What simulator.cpp includes: the kernel without its host side, and without functions that are PTX."""
    text = re.sub(r"^#include <cuda.*\n", "", text[:text.index(". Host side ===")], flags=re.MULTILINE)
    rest = r"(?:(?!^\}|\}$).)*"  # of a function
    return re.sub(rf"^static __device__ {rest}\basm\b{rest}\}}$\n", "", text, flags=re.MULTILINE | re.DOTALL)


class Simulated(Fused):
    """A decoder whose launches run on the CPU, each in another random order."""

    def __init__(self, folder, model, clusters, source=build.SOURCE, **tuning):
        self.defines, self.clusters, self.seed = build.constants(model.config, **tuning), clusters, 0
        text = source_for_cpu(source.read_text())
        name = f"{abs(hash((text, *self.defines.items())))}"
        kernel, library = folder / f"{name}.h", folder / f"{name}.so"
        if not library.exists():
            kernel.write_text(text)
            macros = [f"-D{k}={v}" for k, v in ({"KERNEL": f'"{kernel}"'} | self.defines).items()]
            subprocess.run(["c++", "-std=c++17", "-O1", "-march=native", "-fno-strict-aliasing", "-w",
                            "-U_FORTIFY_SOURCE",  # which forbids to longjmp
                            "-fvisibility=hidden", "-fPIC", "-shared", *macros, "-o", library,
                            HERE / "emulator" / "simulator.cpp"], check=True)
        self.library = ctypes.CDLL(str(library))
        blocks, k = clusters * self.defines["CLUSTER"], kernel_constants(self.defines)
        threads = blocks * k.WORKERS
        assert threads >= k.C / 2 and threads * k.HELD >= k.V, "fused_launch would refuse"
        self.allocate(model, None, blocks)

    def submit(self, first_layer, end_layer, tokens):
        sizes = (ctypes.c_longlong * len(self.tensors))(*(t.nbytes for t in self.tensors))
        self.seed += 1
        if not self.library.simulate(self.pointers, sizes, self.clusters, first_layer, end_layer, tokens,
                                     self.seed):
            raise RuntimeError("the launch did not end as it should")
