"""All tests: python test_block.py (prints a table) or pytest (prints only what fails).

A row is: what was run, what was checked, the error, the largest error allowed, PASS or FAIL. This file is
about the block: the model against transformers; the kernel against float64, on a GPU and on a CPU; and that
these comparisons notice a kernel with something broken (MUTANTS) or a sync dropped (SYNCS). The folder tests/
has the rest, one file a subject. Tests of the kernel on a GPU need one of compute capability 9.0 or later,
and are skipped elsewhere. On one,

    python test_block.py --record       runs all tests of the GPU and writes results/tests-<gpu>.txt
    python test_block.py --sanitize     runs compute-sanitizer on the kernel and writes results/sanitizer.txt
"""
import copy
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import build
from bench import exact_logits
from build import Fused
from checkpoint import Refused
from emulator.emulator import kernel_constants
from model import SIZES, Config, Pythia, Sampler
from tests import helpers, records
from tests.helpers import DEEP, SMALL, against, cut, gpu, random_half, report, residual

pytest_plugins = ["tests.fixtures"]


# -------------------------------------------------------------------------------- logits against transformers

@pytest.mark.parametrize("name", SIZES)
def test_logits(name):
    """Every width of the family; depth cut to 2 or 1 layers, and but for 14m the vocabulary to 2048 words."""
    config = Config.from_name(name)
    small = config.hidden <= 1024
    config = replace(config, n_layer=2 if small else 1, vocab=config.vocab if config.hidden == 128 else 2048)
    model = Pythia.random(config, seed=len(name))
    hf = helpers.transformers_twin(model)
    context, rng = config.context, torch.Generator().manual_seed(1)
    T = context if small else 128
    tokens = torch.randint(config.vocab, (1, T), generator=rng)
    theirs = hf(tokens).logits
    report(name, f"prefill, positions 0..{T - 1}", helpers.error_of(model(tokens), theirs), 1e-4)
    cuts = [0, T - 96, T - 32, *range(T - 31, T + 1)]
    ours = helpers.in_pieces(model, tokens, helpers.filled_cache(model, 0), cuts)
    report(name, "prefill, then a piece, then token by token", helpers.error_of(ours, theirs), 1e-4)

    past = context - 24  # random keys and values stand for a long text: the last positions at little cost
    cache, theirs_cache = helpers.filled_cache(model, past), DynamicCache()
    for i in range(config.n_layer):
        theirs_cache.update(cache[i, 0, :, :, :past].clone(), cache[i, 1, :, :, :past].clone(), i)
    tokens = torch.randint(config.vocab, (1, 24), generator=rng)
    theirs = hf(tokens, past_key_values=theirs_cache).logits
    ours = helpers.in_pieces(model, tokens, cache, [past, past + 8, *range(past + 9, context + 1)])
    report(name, f"mixed, positions {past}..{context - 1}", helpers.error_of(ours, theirs), 1e-4)


def test_batch():
    model = Pythia.random("pythia-14m")
    tokens = torch.randint(model.config.vocab, (3, 40), generator=torch.Generator().manual_seed(0))
    ours = helpers.in_pieces(model, tokens, model.new_cache(3), [0, 30, 40])
    theirs = helpers.transformers_twin(model)(tokens).logits
    report("pythia-14m", "batch of 3, all 6 layers", helpers.error_of(ours, theirs), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    """Our rounding error against transformers' own; the truth is fp32 arithmetic on the same weights."""
    model = Pythia.random("pythia-14m", dtype=dtype)
    tokens = torch.randint(model.config.vocab, (1, 256), generator=torch.Generator().manual_seed(0))
    hf = helpers.transformers_twin(model)
    theirs = hf(tokens).logits.float()
    ours = helpers.in_pieces(model, tokens, model.new_cache(), [0, *range(200, 257)]).float()
    truth = hf.float()(tokens).logits
    ratio = (ours - truth).square().mean().sqrt() / (theirs - truth).square().mean().sqrt()
    report("pythia-14m", f"{str(dtype)[6:]} rms error / transformers' own", ratio, 1.1)


# ------------------------------------------------------------------------------ the kernel against float64

POSITIONS = (0, 1, 15, 16, 17, 63, 64, 65, 511, 1000, 2046, 2047)
SOME_POSITIONS = (0, 1, 17, 65, 1000, 2047)


def report_blocks(name, model, decoders, repeats=3):
    """One block, launched alone, of all `decoders` (fused, positions). Keys and values from `pos` on, logits,
    what it has to overwrite: all garbage."""
    block, C, device = model.blocks[1], model.config.hidden, model.embed_in.device
    rng, exact = torch.Generator(device).manual_seed(0), copy.deepcopy(block).double()
    elsewhere, unlike, appended = 0, 0, []
    for fused, positions in decoders:
        watched, worst = helpers.Watched(fused), []
        for pos in positions:
            fused.cache.normal_(generator=rng)
            fused.cache[..., pos:, :] = math.nan
            fused.logits.fill_(math.nan)
            x, kv16 = helpers.hard_input(C, rng), fused.cache[1].clone()
            kv, rope = kv16.double(), model.rope[:, pos:pos + 1]
            y = exact(x.double().view(1, 1, C), rope, kv, pos)
            y16 = block(x.view(1, 1, C), rope, kv16, pos)
            watched.remember()
            ours = helpers.launch_block(fused, x, pos)
            worst.append((*against(ours, y16, y), pos))
            appended.append([t[..., pos, :].double().flatten() for t in (fused.cache[1], kv16, kv)])
            unlike += sum(not torch.equal(helpers.launch_block(fused, x, pos), ours) for _ in range(repeats))
            elsewhere += watched.changed(cache=(1, ..., pos, slice(None)), residual=..., state=slice(0, 3),
                                         settings=...)
        ratio, mine, fp16, pos = max(worst)
        cluster = fused.defines["CLUSTER"]
        report(name, f"block, clusters of {cluster}, at {pos}: {mine:.1e} / fp16 {fp16:.1e}", ratio, 1)
    ratio, mine, fp16 = against(*map(torch.cat, zip(*appended, strict=True)), norms=(2,))
    report(name, f"new keys and values: {mine:.1e} / fp16 {fp16:.1e}", ratio, 1)
    report(name, "bytes changed elsewhere", elsewhere)
    report(name, "launches whose bits differ", unlike)


@gpu
@pytest.mark.parametrize("name", SIZES)
@torch.inference_mode()
def test_fused_block(name):
    model = random_half(cut(name))
    default = build.default_cluster(model.config, helpers.multiprocessors())
    report_blocks(name, model, ((Fused(model, cluster=k), POSITIONS if k == default else SOME_POSITIONS)
                                for k in helpers.CLUSTERS))


@pytest.mark.parametrize("name, grids, positions, more", [  # grids: (blocks in a cluster, clusters)
    ("pythia-14m", ((1, 6), (2, 3), (4, 2), (8, 1)), (1, 300), {}), ("pythia-31m", ((2, 3),), (17, 511), {}),
    ("pythia-70m", ((1, 9), (4, 2)), (130,), {}), ("pythia-6.9b", ((2, 4),), (40,), {}),
    ("pythia-2.8b", ((2, 3),), (100,), {"hidden": 1280, "n_head": 16})])  # heads of 80 dimensions
def test_simulated_block(simulated, name, grids, positions, more):
    """Teams of half a warp, of one, of several; several teams, and one; a thread with two pieces of a row."""
    model = random_half(cut(name, mlp=520, context=512, **more), "cpu")
    decoders = ((simulated(model, n, cluster=k), positions) for k, n in grids)
    report_blocks(f"{name[7:]} on a CPU", model, decoders, repeats=1)


def report_steps(what, case, model, fused, steps):
    """Whole steps of (position, token [1, 1]); everything that they do not need is NaN."""
    cache, worst, wrong = fused.cache, [], 0
    for pos, token in steps:
        cache[..., pos:, :] = math.nan
        exact, fp16 = exact_logits(model, token, cache, pos), model(token, cache, pos)
        cache[..., pos:, :] = math.nan
        fused.logits.fill_(math.nan)
        ours = fused(token, cache, pos)
        worst.append((*against(ours, fp16, exact), pos))
        chosen = int(ours.argmax())
        wrong += [*fused.state[:2].tolist(), int(fused.history[pos])] != [chosen, pos + 1, chosen]
    ratio, mine, fp16, pos = max(worst)
    report(what, f"whole step, {case} at {pos}: {mine:.1e} / fp16 {fp16:.1e}", ratio, 1)
    report(what, "tokens that are not the argmax", wrong)


@gpu
@pytest.mark.parametrize("name", SIZES)
@torch.inference_mode()
def test_fused_step(name):
    """At full depth, after a prompt."""
    model = random_half(Config.from_name(name))
    cache, last = model.new_cache(), model.config.context - 1
    fused = Fused(model, cache, graph=False)
    rng = torch.Generator(helpers.DEVICE).manual_seed(0)
    tokens = torch.randint(model.config.vocab, (1, last + 1), generator=rng, device=helpers.DEVICE)
    model.body(tokens[:, :last], cache, 0)
    report_steps(name, "worst", model, fused, ((pos, tokens[:, pos:pos + 1]) for pos in (last, 130, 0)))
    for first in (0, 1000):
        helpers.report_tokens(name, fused, first, (8, 8, 3, 1))


@pytest.mark.parametrize("config, steps", [
    (SMALL, 4), (cut("pythia-6.9b", n_layer=1, mlp=256, vocab=64), 1)], ids=["70m", "6.9b"])
def test_simulated_steps(simulated, config, steps):
    """Of the last token of the vocabulary, of the first, and of what a step left to the next."""
    model, V = random_half(config, "cpu"), config.vocab
    fused = simulated(model, 4, cluster=2)
    fused.cache.normal_(generator=torch.Generator().manual_seed(0))
    first = [torch.tensor([[V - 1]]), torch.tensor([[0]])]
    report_steps("on a CPU", f"C {config.hidden},", model, fused, (
        (pos, first[pos] if pos < 2 else fused.state[:1].long().view(1, 1)) for pos in range(steps)))


# ------------------------------------------------------------------------------ the kernel, stage by stage

STAGES = ("xn1", "xn2", "q", "k", "v", "o", "h", "y")  # the kernel's taps, in their order, and its result


def stages(block, x, rope, kv, pos):
    """What the stages of a block compute: {name: flat tensor}; the arithmetic is in x's dtype."""
    c, C, HS = block.config, block.config.hidden, block.config.head_size
    xn1 = F.layer_norm(x, (C,), block.ln1_w, block.ln1_b, c.eps)
    xn2 = F.layer_norm(x, (C,), block.ln2_w, block.ln2_b, c.eps)
    qkv = F.linear(xn1, block.w_qkv, block.b_qkv).view(1, 1, c.n_head, 3, HS)
    block.rotate(qkv[:, :, :, :2], rope)
    q, k, v = qkv.permute(3, 0, 2, 1, 4)                                         # each [1, NH, 1, HS]
    keys, values = (torch.cat((old[..., :pos, :], new), 2) for old, new in zip(kv, (k, v), strict=True))
    o = F.scaled_dot_product_attention(q, keys, values)
    h = F.gelu(F.linear(xn2, block.w_up, block.b_up))
    y = block(x, rope, kv.clone(), pos)
    return {name: t.flatten() for name, t in zip(STAGES, (xn1, xn2, q, k, v, o, h, y), strict=True)}


def place(config, clusters, stage, i):
    """Element i of a stage in the words of the kernel."""
    if stage in "qkvo":
        head, dim = divmod(i, config.head_size)
        return f"head {head} dim {dim} (cluster {head % clusters})"
    return f"unit {i}" if stage == "h" else f"column {i}"


def stage_errors(model, fused, plain, positions):
    """[(stage, ratio, our error, PyTorch fp16's, where ours is largest)], each at its worst position; and at
    how many positions y of `fused`, which has taps, has other bits than y of `plain`."""
    rng, block, C = torch.Generator(fused.device).manual_seed(0), model.blocks[1], model.config.hidden
    exact, unlike, found = copy.deepcopy(block).double(), 0, {}
    for pos in positions:
        fused.cache.normal_(generator=rng)
        fused.cache[..., pos:, :] = math.nan
        x, kv = helpers.hard_input(C, rng), fused.cache[1].clone()
        rope = model.rope[:, pos:pos + 1]
        truth = stages(exact, x.double().view(1, 1, C), rope, kv.double(), pos)
        theirs = stages(block, x.view(1, 1, C), rope, kv, pos)
        fused.taps.fill_(math.nan)
        y = helpers.launch_block(fused, x, pos)
        ours = dict(zip(STAGES, (*fused.taps.split([C] * 6 + [model.config.mlp]), y), strict=True))
        for stage, t in ours.items():
            i = int((t.double() - truth[stage]).abs().nan_to_num(math.inf).argmax())
            found.setdefault(stage, []).append((*against(t, theirs[stage], truth[stage]),
                                                f"{place(model.config, fused.clusters, stage, i)} at {pos}"))
        plain.cache.copy_(fused.cache)
        unlike += not torch.equal(helpers.launch_block(plain, x, pos), y)
    return [(stage, *max(rows)) for stage, rows in found.items()], unlike


@gpu
@pytest.mark.parametrize("name", SIZES)
@torch.inference_mode()
def test_fused_stages(name):
    model = random_half(cut(name))
    rows, unlike = stage_errors(model, Fused(model, extra={"TAPS": 1}), Fused(model), (17, 1000))
    for stage, ratio, mine, fp16, where in rows:
        report(name, f"{stage}: {mine:.0e} / fp16 {fp16:.0e}, {where}", ratio, 1)
    report(name, "positions where taps change the bits of y", unlike)


# ------------------------------------------------------------------------ the kernel with one thing broken

MUTANTS = {  # number: (what is broken, the first stage that turns red, text of the kernel, text instead)
    0: ("nothing broken", None, "#include <cstdint>", "#include <cstdint>"),
    1: ("a peer's part of o left out", "o",
        "shrink[r] = exp2f(", "shrink[r] = r == RANKS - 1 ? 0.f : exp2f("),
    2: ("LN1 for LN2", "xn2", "norms.w2, norms.b2", "norms.w1, norms.b1"),
    3: ("RoPE's sign flipped", "q", "d < ROT / 2 ? -v", "d >= ROT / 2 ? -v"),
    4: ("a team's part of y left out", "y",
        "from = 0; from < RANKS * TEAMS", "from = 1; from < RANKS * TEAMS"),
    5: ("the last tile of tokens missed", "o",
        "plan.end_cached - t0);", "plan.end_cached - t0) / KV_POSITIONS * KV_POSITIONS;"),
    6: ("GELU by tanh", "h", "erff(u * 0.70710678f)", "tanhf(0.79788456f * (u + 0.044715f * u * u * u))"),
    7: ("biases left out", "q", "has_bias && my_row < n", "false")}
MIDDLE = cut("pythia-160m")


def report_mutant(mutant, model, broken, positions, where=""):
    """A kernel with one thing broken must be red, first at its stage; the unbroken one nowhere."""
    model.blocks[1].b_up -= 2.5  # where GELU and its approximation differ by more than fp16's rounding
    rows, _ = stage_errors(model, broken, broken, positions)
    red, (what, stage, *_) = [row for row in rows if not row[1] <= 1], MUTANTS[mutant]
    if stage is None:
        stages_red = ", ".join(row[0] for row in red)
        report(f"mutant {mutant}{where}", f"{what}: stages that are red {stages_red}", len(red))
        return
    first, ratio, _, _, element = (red or [max(rows, key=lambda row: row[1])])[0]
    found = f"caught at {first}, {element}" if red else f"NOT CAUGHT, nearest is {first}"
    report(f"mutant {mutant}{where}", f"{what}: {found}; fp16's error / its",
           1 / ratio if red and first == stage else math.inf, 1)


@gpu
@pytest.mark.parametrize("mutant", MUTANTS)
@torch.inference_mode()
def test_mutants(patched, mutant):
    model = random_half(MIDDLE)
    broken = Fused(model, extra={"TAPS": 1}, source=patched(*MUTANTS[mutant][2:]))
    report_mutant(mutant, model, broken, (17, 1000))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_simulated_mutants(simulated, patched, mutant):
    model = random_half(SMALL, "cpu")
    broken = simulated(model, 3, cluster=2, extra={"TAPS": 1}, source=patched(*MUTANTS[mutant][2:]))
    report_mutant(mutant, model, broken, (300,), " on a CPU")


# ------------------------------------------------------------------------------- the kernel without its syncs

SYNCS = {sync: (re.compile(wait), instead) for sync, wait, instead in (
    # the sync of the kernel's table; a pattern of its wait in the source; what stands there instead
    ("(0)", r"cluster_sync\(\)(?=;\s+// \(0\)\n)", "named_barrier(0, WORKERS + 32)"),  # the block meets alone
    ("(1)", r"wait\([^;]*SYNC_QKV\)", "false"),
    ("(2)", r"wait\([^;]*SYNC_ATTENTION\)", "false"),
    ("(3)", r"wait\([^;]*SYNC_SUMS\)", "false"),
    ("(4)", r"lacking\(words\[i\], wanted\)", "false"),
    ("(4) and its poll", r"unsigned lacking\([^{]*\{\s*return ([^;]*)", "0"),
    ("(4)'s laps", r"(?<=LAP = )256", "0"),
    ("(5)", r"\(int\)\(\(seen = [^;]* < 0(?=;\))", "false"),
    ("(6)", r"lacking\(now = load_relaxed\(words\), wanted\)", "(now = load_relaxed(words), 0)"),
    ("(F)", r"phase_running\(&s\.full[^)]*\)", "false"),
    ("(F), in axpy_tile", r"void axpy_tile\((?:.*\n)*?\s+(wait_full\(\));  // \(F\)", "false"),
    ("(F), in attend", r"void attend\((?:.*\n)*?\s+(wait_full\(\));  // \(F\)", "false"),
    ("(E)", r"wait\([^;]*SYNC_EMPTY\)", "false"),
    ("(E), of a warp's lanes", r"__syncwarp\(\)(?=;\s+// \(E\))", "false"),
    ("(a)", r"workers_sync\(\)(?=;\s+// \(a\)\n)", "false"),
    ("(b)", r"team_sync\(team\)(?=;\s+// \(b\)\n)", "false"),
    ("(c)", r"team_sync\(team\)(?=;\s+// \(c\)\n)", "false"),
    ("(d)", r"workers_sync\(\)(?=;\s+// \(d\)\n)", "false"),
    ("(e)", r"workers_sync\(\)(?=;\s+// \(e\)\n)", "false"),
    ("(f), before (5)", r"warp_result\[warp\] = \{best, .*\n\s+(workers_sync\(\));  // \(f\)", "false"),
    ("(f), before (6)", r"warp_result\[warp\] = \{above, .*\n\s+(workers_sync\(\));  // \(f\)", "false"),
    ("(g), after (5)", r"give_up\(\S+ SYNC_VOTE(?:.*\n)*?\s+(workers_sync\(\));  // \(g\)", "false"),
    ("(g), after (6)", r"give_up\(\S+ SYNC_TALLY(?:.*\n)*?\s+(workers_sync\(\));  // \(g\)", "false"),
    ("(N)", r"wait\([^;]*SYNC_TOKEN\)", "false"),
    # instead, its words are loaded, to which others may already add
    ("a launch's clear buffer", r"carried_next = (\{0, 0\});",
     "load_relaxed(buffer(m.state->swaps + 1) + 2 * min(my_pair, C / 2 - 1))"),
    # a control: what only saves time
    ("(g), after (4)", r"give_up\(\S+ SYNC_X(?:.*\n)*?\s+(workers_sync\(\));  // \(g\)", "false"))}
CONTROL = "(g), after (4)"
NEEDS = {  # a shape that shows the absence: teams of several warps, in a long ring a whole token
    "(b)": "70m", "(c)": "70m", "(F), in axpy_tile": "70m", "(N)": "ahead"}  # of others, a small one: "14m"
HANGS = {  # the sync at which a launch waits in vain: what is left out, and instead
    "(4)": ("c = tid; c < OWN", "c = blockIdx.x == 0 ? OWN : tid; c < OWN"),  # block 0 adds nothing to x
    "(F)": ("if (with_lm_head)", "if (false)")}                                 # no copies of the LM head
ON_GPU = ("(1)", "(2)", "(3)", "(4) and its poll")


@pytest.fixture(scope="module")
def makers(simulated):
    """Three shapes of decoders, {name: (a function that makes one, what its launch computes)}."""
    def maker(config, short_ring, **tuning):
        k = kernel_constants(build.constants(config, cluster=2, **tuning))
        two_tiles = k.REST_BYTES + 2 * k.HALF_TILES * (k.SLOT_BYTES + 2 * k.TILE_BIASES + 16)
        extra = {"SHARED_BYTES": two_tiles} if short_ring else {}  # so that copies come at the last moment
        return functools.partial(simulated, random_half(config, "cpu"), 3, cluster=2, extra=extra, **tuning)
    layers = cut("pythia-14m", n_layer=3, mlp=64, vocab=64, context=512)
    shapes = {"14m": maker(layers, True, threads=128), "70m": maker(SMALL, True),
              "ahead": maker(helpers.AHEAD, False, threads=128)}
    return {name: (make, launched(make())) for name, make in shapes.items()}


def launched(fused):
    """What a launch of two tokens leaves, in the next of the orders."""
    fused.residual.zero_()
    fused.state.zero_()
    fused.cache.normal_(generator=torch.Generator().manual_seed(0))
    fused.logits.fill_(math.nan)
    fused.start(7, 100, Sampler(0.8, top_k=20, top_p=0.8, seed=1))  # so that (6) is needed, too
    fused.launch(0, fused.config.n_layer, tokens=2)
    return torch.cat((fused.logits, residual(fused), fused.state[:4], fused.history))


def test_simulated_orders(makers):
    unlike = 0
    for name, orders in (("14m", 40), ("70m", 5), ("ahead", 9)):
        make, right = makers[name]
        fused = make()
        unlike += sum(not torch.equal(launched(fused), right) for _ in range(orders))
    report("on a CPU", "all syncs: orders of 54 with other bits", unlike)


@pytest.mark.parametrize("sync", SYNCS)
def test_simulated_sync(makers, patched, sync):
    """Without any of its syncs the kernel is wrong. On a GPU a race may hide; orders here are random. What
    shows the absence of a sync is other bits, or a launch that does not end."""
    make, right = makers[NEEDS.get(sync, "14m")]
    orders = 40 if sync == CONTROL else 100

    def first_unlike():
        fused = make(source=patched(*SYNCS[sync]))
        while fused.seed < orders:
            with suppress(RuntimeError):
                if torch.equal(launched(fused), right):
                    continue
            return fused.seed
        return math.inf
    order = helpers.in_fork(first_unlike, 120)  # what is broken may write anywhere
    if sync == CONTROL:
        report("on a CPU", f"dropped {sync}: shown by one of {orders} orders", order < math.inf)
    else:
        report("on a CPU", f"dropped {sync}: shown by order number", order, orders)


@pytest.mark.parametrize("sync, words", [
    ("(4)", r"sync \(4\), where x lacked 1 .* layer 1"),
    ("(F)", rf"sync \(F\) in block .* layer {SMALL.n_layer}")])
def test_simulated_hang(simulated, patched, sync, words):
    """The kernel says at which sync it has waited in vain, and ends."""
    fused = simulated(random_half(SMALL, "cpu"), 3, cluster=2, source=patched(*HANGS[sync]))
    fused.start(7, 100)
    with pytest.raises(RuntimeError, match=words):
        fused.launch(0, SMALL.n_layer, tokens=1)


def launches(source):
    """Prints of 200 launches of a kernel's source: [launches with other bits, error, seconds to the end]."""
    model = random_half(DEEP)
    cache = model.new_cache().normal_()

    def launch(fused):
        fused.residual.zero_()  # sums that a broken kernel left behind
        fused.state.zero_()
        fused.logits.fill_(math.nan)
        fused.start(7, 300)
        fused.launch(0, DEEP.n_layer, tokens=1)
        fused.wait(torch.cuda.current_stream())
        return fused.logits.clone()
    right, broken = launch(Fused(model, cache)), Fused(model, cache, source=Path(source))
    shown, error, start = 0, "", time.perf_counter()
    try:
        for _ in range(200):
            shown += not torch.equal(launch(broken), right)
    except RuntimeError as failure:
        error = str(failure)
    print(json.dumps([shown, error, time.perf_counter() - start]), flush=True)
    os._exit(0)  # the CUDA context may be lost, and would complain


def launches_of(source):
    """The same, of a process of its own."""
    try:
        return helpers.in_fresh_process(60, launches, str(source))
    except subprocess.TimeoutExpired:
        return 0, "killed after 60 s", math.inf


@gpu
@pytest.mark.parametrize("sync", ON_GPU)
def test_sync(patched, sync):
    """A race may or may not show: how often it does is reported, and that it ends by itself is checked."""
    shown, error, seconds = launches_of(patched(*SYNCS[sync]))
    found = f"shown by {shown} of 200 launches" if shown else "never shown in 200 launches"
    report(f"dropped {sync}", f"{error or found}; seconds", seconds, 60)


@gpu
def test_no_hang(patched):
    shown, error, seconds = launches_of(patched(*HANGS["(4)"]))
    report("no hang", "block 0 adds nothing to x: seconds until the error", seconds, 10)
    lacking = sum(word not in error for word in ("sync (4)", "block", "layer 1"))
    report("no hang", f"words that lack in {error!r}", lacking)
    report("no hang", "launches before it that returned", shown)
    shown, error, _ = launches_of(build.SOURCE)
    report("no hang", f"other bits in a new process {error}", shown + len(error))
    wrong = torch.ones(9, device=helpers.DEVICE).sum() != 9
    report("no hang", "wrong sums in a process that lived beside it", wrong)


# ------------------------------------------------------------------------------------------- the command line

class Table:
    """Prints the rows of each test when it has ended, in whichever process it ran."""

    def pytest_configure(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.config.pluginmanager.get_plugin("terminalreporter").write(report.capstdout, flush=True)

    def pytest_report_teststatus(self, report):
        """Rows stand instead of a dot for each test."""
        if report.when == "call" or report.skipped:
            return report.outcome, "", report.outcome.upper()
        return None


def main(argv):
    """Runs what the arguments say; returns the exit code."""
    try:
        if argv in (["--record"], ["--sanitize"]):
            build.device_arch(helpers.DEVICE)  # refuses where there is no GPU
            return records.record() if argv == ["--record"] else records.sanitize()
    except Refused as refusal:
        print(f"test_block.py: {refusal}", file=sys.stderr)
        return 2
    # Side by side, but for tests of a GPU, which measure time and need all of it.
    workers = 0 if torch.cuda.is_available() else min(os.cpu_count(), 4)
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count() // max(workers, 1))
    os.chdir(helpers.HERE)
    # the warning: transformers has imported a pytest plugin (anyio's) before pytest could
    no_remark = "-Wignore::pytest.PytestAssertRewriteWarning"
    options = ["-qrs", "-oconsole_output_style=classic", f"-n{workers}", no_remark]
    return pytest.main([*options, *argv], plugins=[Table()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
