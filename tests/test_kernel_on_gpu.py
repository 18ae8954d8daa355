"""The kernel on a GPU, beyond its block: same bits, whole texts, sampling, refusals, other programs."""
import copy
import gc
import math
import subprocess
import sys
import time
from collections import deque
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import build
import generate
from build import Fused
from model import Config, Pythia, Sampler
from tests import helpers
from tests.helpers import DEVICE, SHORT, cut, gpu, random_half, report, report_refused

pytest_plugins = ["tests.fixtures"]


@gpu
@torch.inference_mode()
def test_fused_repeats():
    big, tiny = random_half(cut("pythia-2.8b")), helpers.tiny_half()
    rng, fused, step = torch.Generator(DEVICE).manual_seed(0), Fused(big), Fused(tiny)
    x = helpers.hard_input(big.config.hidden, rng)
    fused.cache.normal_(generator=rng)
    step.cache.normal_(generator=rng)

    def one_block():
        return helpers.launch_block(fused, x, 1000)

    def whole_step(fused=step):  # of several tokens: a graph is replayed
        fused.start(5, 1000)
        fused.step(fused.TOKENS)
        return fused.logits.clone()
    load, a, batches = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE).half(), deque()
    product = torch.mm(a, a)
    torch.cuda.synchronize()

    def keep_busy():
        while batches and batches[0].query():
            batches.popleft()
        while len(batches) < 8:
            with torch.cuda.stream(load):
                for _ in range(8):
                    torch.mm(a, a, out=product)
                batches.append(load.record_event())
    for what, run in (("one block of 2.8b", one_block), ("tiny-pythia", whole_step)):
        first = run()
        unlike = sum(not torch.equal(run(), first) for _ in range(1000))
        report("same bits", f"{what}: launches of 1000 that differ", unlike)
        unlike = idle = outlived = 0
        for _ in range(1000):
            keep_busy()
            idle += load.query()
            unlike += not torch.equal(run(), first)
            outlived += not load.query()
        report("same bits", f"{what}: of 1000 beside matrix products", unlike)
        report("same bits", f"started without such a product ({outlived} ended with one)", idle, 100)
    for cluster in helpers.CLUSTERS:
        other = Fused(tiny, step.cache, cluster=cluster)
        first = whole_step(other)
        report("same bits", f"tiny-pythia, clusters of {cluster}: of 200 that differ",
               sum(not torch.equal(whole_step(other), first) for _ in range(200)))
    replayed, launched, unlike = Fused(tiny), Fused(tiny, graph=False), 0
    for decoder in (replayed, launched):
        decoder.start(5, 0)
    for _ in range(13):
        replayed.step(Fused.TOKENS)
        launched.step(Fused.TOKENS)
        unlike += not torch.equal(replayed.logits, launched.logits)
    unlike += not torch.equal(replayed.cache[..., :104, :], launched.cache[..., :104, :])
    unlike += not torch.equal(replayed.history[:104], launched.history[:104])
    report("same bits", "graph replay unlike launch, in 104 tokens and cache", unlike)


@gpu
@torch.inference_mode()
def test_fused_text():
    """1000 greedy tokens against fp32 arithmetic on the same weights, or why they differ."""
    prompt = generate.Text(helpers.TINY, None).encode("The sea was calm, and")
    n, half, full = 1000, helpers.tiny_half(), helpers.tiny_half(torch.float32)
    text, ours = list(full.generate(prompt, n)), list(half.generate(prompt, n, fused=Fused(half)))
    same = next((i for i in range(n) if text[i] != ours[i]), n)
    report("tiny-pythia", "tokens of 1000 that fused did not make", n - len(ours))
    # the same text is forced on all: where the choice differs, the next token still has the same past
    known = torch.tensor([prompt + text[:-1]], device=DEVICE)
    exact, fp16 = (m(known)[0, len(prompt) - 1:].float() for m in (full, half))
    fused = Fused(half)
    cache = fused.cache
    logits = [half(known[:, :len(prompt)], cache, 0)[0, -1].float()]
    for i in range(len(prompt), known.shape[1]):
        logits.append(fused(known[:, i:i + 1], cache, i).flatten().clone())
    logits = torch.stack(logits)
    ratio, mine, theirs = helpers.against(logits, fp16, exact.double())
    report("tiny-pythia", f"fused, 1000 tokens: logits {mine:.1e} / fp16 {theirs:.1e}", ratio, 1)
    chosen, wanted = logits.argmax(-1), torch.tensor(text, device=DEVICE)
    agrees = chosen == wanted
    error = (logits - exact)[agrees].abs().max()          # of the places where nothing is to be explained
    gap = exact.topk(2).values
    unexplained = (~agrees & (gap[:, 0] - gap[:, 1] > 2 * error)).sum()
    report("tiny-pythia", f"fused text: {same} of 1000 tokens as fp32, then unexplained", unexplained)
    forced = chosen.tolist()[:same + 1]
    report("tiny-pythia", "its tokens up to there unlike forced ones", forced != ours[:same + 1])


@gpu
def test_fused_sampling():
    tiny = helpers.tiny_half()
    replayed, launched = Fused(tiny), Fused(tiny, graph=False)

    def text(temperature, fused=replayed, **kw):
        return list(tiny.generate([5, 6, 7, 8], 60, temperature, fused=fused, **kw))
    same = helpers.report_seeds("fused sampling", text)
    report("fused sampling", "same seed without a graph, another text",
           same != text(1, top_p=0.9, seed=5, fused=launched))
    sampler = Sampler(0.8, 50, 0.95, seed=3)
    drawn, wrong = text(0.8, top_k=50, top_p=0.95, seed=3), 0
    tiny(torch.tensor([[5, 6, 7, 8]], device=DEVICE), replayed.cache, 0)
    for pos, (token, following) in enumerate(pairwise(drawn), 4):
        logits = replayed(torch.tensor([[token]], device=DEVICE), replayed.cache, pos).flatten()
        wrong += int(sampler(logits, pos + 1)) != following
    report("fused sampling", "tokens of 59 that Sampler does not draw from the kernel's logits", wrong)


@gpu
@pytest.mark.parametrize("settings", helpers.DRAWS)
def test_fused_frequencies(settings):
    model = random_half(helpers.CHI_SQUARE)
    logits, fused = helpers.flat_logits(model), Fused(model)
    # a text's first token is drawn from the prompt's logits, which are the reference's
    texts = [list(model.generate([0], 2048, *settings, seed, fused)) for seed in (1, 2)]
    drawn = [token for text in texts for token in text[1:]]
    helpers.report_frequencies("fused sampling", logits, settings, drawn)


@gpu
@torch.inference_mode()
def test_hand_over():
    """Reference, fused, reference, fused on one cache, 40 tokens each, against the reference alone."""
    model, rng = helpers.tiny_half(), torch.Generator(DEVICE).manual_seed(0)
    tokens = torch.randint(model.config.vocab, (1, 260), generator=rng, device=DEVICE)
    exact = copy.deepcopy(model).double()(tokens)[0, 100:]
    fused = Fused(model, model.new_cache().fill_(math.nan))
    alone = model.new_cache().fill_(math.nan)

    def logits(cache, turns):
        model(tokens[:, :100], cache, 0)
        steps = [turns[(i - 100) // 40](tokens[:, i:i + 1], cache, i)[0].clone() for i in range(100, 260)]
        return torch.cat([step.float() for step in steps])
    mixed, fp16 = logits(fused.cache, (fused, model, fused, model)), logits(alone, (model,) * 4)
    ratio, mine, theirs = helpers.against(mixed, fp16, exact, norms=(2,))
    report("hand-over", f"160 tokens in turns: logits {mine:.1e} / fp16 {theirs:.1e}", ratio, 1)
    top = exact.topk(2).values
    clear = top[:, 0] - top[:, 1] > 2 * (fp16 - exact).abs().max()
    differing = (mixed.argmax(-1) != exact.argmax(-1)) & clear
    report("hand-over", f"argmax differs, of {int(clear.sum())} beyond fp16's error", differing.sum())
    report("hand-over", "tokens of which none is beyond that error", not clear.any())


@gpu
def test_fused_memory():
    one = torch.ones(8, 8, device=DEVICE).half()
    one @ one  # cuBLAS's own memory is not the model's
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = random_half(Config.from_name("pythia-2.8b"))
    fused = Fused(model)
    fused.start(5, 0)
    for _ in range(3):
        fused.step(fused.TOKENS)
    torch.cuda.synchronize()
    needed = fused.cache.nbytes + sum(w.nbytes for w in model.parameters())
    allocated = torch.cuda.memory_allocated() - before
    report("memory", "pythia-2.8b, fused: allocated / weights and cache", allocated / needed, 1.05)


@gpu
@torch.inference_mode()
def test_fused_edges():
    model = random_half(cut("pythia-160m"))
    helpers.report_edges("edges", model, Fused(model))
    short = random_half(SHORT)
    helpers.report_lengths("edges", short, fused=Fused(short))
    for temperature in (0, 1):
        spoilt = random_half(SHORT)
        tokens = spoilt.generate([1, 2, 3], 20, temperature, seed=0, fused=Fused(spoilt))
        next(tokens)  # of the prompt's logits, which are the reference's, and finite
        spoilt.lnf_b.fill_(math.inf)
        report_refused(f"logits that become infinite, T {temperature}", ["not finite"], list, tokens)


@gpu
def test_fused_refusals(monkeypatch):
    model = random_half(SHORT)
    fused, cache = Fused(model), model.new_cache()
    one = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    odd = torch.zeros(cache.numel() + 1, dtype=torch.float16, device=DEVICE)[1:].view(cache.shape)
    full = Pythia.random(SHORT, device=DEVICE)
    report_refused("fuse float32", ["float32", "dtype float16"], Fused, full)
    for case, wrong, word in (("cache of another model", cache[:1], "[1, 2, 1"),
                              ("cache of a batch", model.new_cache(2), "[2, 2, 2"),
                              ("cache in float32", cache.float(), "float32"),
                              ("cache on the CPU", cache.cpu(), "on cpu"),
                              ("cache with gaps", torch.cat((cache, cache), -1)[..., :32], "contiguous"),
                              ("cache not at 16 bytes", odd, "16 bytes")):
        report_refused(case, [word], Fused, model, wrong)
    report_refused("clusters of 16", ["16", "1, 2, 4 or 8"], Fused, model, cluster=16)
    for pos in (-1, 64):
        report_refused(f"position {pos}", [f"position {pos}", "64"], fused, one, fused.cache, pos)
    report_refused("a step on another cache", ["cache it was made with"], fused, one, cache, 0)
    report_refused("a step of two tokens", ["one token"], fused, one.expand(1, 2), fused.cache, 0)
    report_refused("a prompt too long", ["65", "64"], model.generate, [1] * 65, 1, fused=fused)

    def few(clusters):
        clusters._obj.value = 3
    library = SimpleNamespace(fused_prepare=few, fused_launch=lambda *_: None)
    monkeypatch.setattr(build, "load", lambda *_: library)
    words = ["3 clusters", str(helpers.multiprocessors()), "smaller cluster"]
    report_refused("room for 3 clusters", words, Fused, model)


@gpu
@torch.inference_mode()
def test_two_models():
    """Two models' steps interleaved on two streams; then the models are deleted and their graphs replayed."""
    models = [random_half(cut("pythia-160m")), helpers.tiny_half()]
    decoders, starts, n = [Fused(model) for model in models], (17, 900), 200
    alone = []
    for fused, start in zip(decoders, starts, strict=True):
        fused.cache.normal_(generator=torch.Generator(DEVICE).manual_seed(start))
        alone.append(list(fused.decode(5, start, n)))
    streams = [torch.cuda.Stream() for _ in models]
    torch.cuda.synchronize()
    for fused, start, stream in zip(decoders, starts, streams, strict=True):
        with torch.cuda.stream(stream):
            fused.history.zero_()
            fused.start(5, start)
    for _ in range(n // Fused.TOKENS):
        for fused, stream in zip(decoders, streams, strict=True):
            with torch.cuda.stream(stream):
                fused.step(Fused.TOKENS)
    torch.cuda.synchronize()
    for fused, start, text in zip(decoders, starts, alone, strict=True):
        together = fused.history[start:start + n].tolist()
        report("two models", f"C {fused.config.hidden}: tokens of {n} unlike those made alone",
               sum(a != b for a, b in zip(together, text, strict=True)))
    del models, fused
    gc.collect()
    torch.cuda.empty_cache()
    garbage = [torch.full((1 << 22,), math.nan, device=DEVICE) for _ in range(64)]  # over whatever was freed
    for fused, start, text in zip(decoders, starts, alone, strict=True):
        again = list(fused.decode(5, start, n))
        report("two models", f"C {fused.config.hidden}: model deleted, graph alive: tokens that differ",
               sum(a != b for a, b in zip(again, text, strict=True)))
    del garbage


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: two models on two GPUs need another")
@torch.inference_mode()
def test_two_gpus():
    """The same model on two GPUs, with steps that take turns: the same text on both, twice."""
    for _ in range(2):
        models = [Pythia.random(cut("pythia-160m"), 0, torch.float16, f"cuda:{i}") for i in range(2)]
        decoders = [Fused(model) for model in models]
        pairs = list(zip(*(fused.decode(5, 0, 100) for fused in decoders), strict=True))
        report("two GPUs", "tokens of 100 that differ", sum(one != two for one, two in pairs))


def lap(fused):
    """2000 tokens from position 0: (seconds, the tokens, the last logits)."""
    fused.start(5, 0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(2000 // fused.TOKENS):
        fused.step(fused.TOKENS)
    fused.wait(torch.cuda.current_stream())
    return time.perf_counter() - start, fused.history.clone(), fused.logits.clone()


@gpu
def test_100000_tokens():
    fused = Fused(helpers.tiny_half())
    _, tokens, logits = lap(fused)
    before, unlike = torch.cuda.memory_allocated(), 0
    for _ in range(50):
        _, again, last = lap(fused)
        unlike += not torch.equal(again, tokens) or not torch.equal(last, logits)
        del again, last
    report("100,000 tokens", "repetitions of 50 whose bits differ from the first", unlike)
    grown = torch.cuda.memory_allocated() - before
    report("100,000 tokens", "bytes of GPU memory more than before", grown)


LOAD = """
import sys, torch
a = torch.randn(8192, 8192, device="cuda").half()
big, b = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda"), torch.mm(a, a)
other = torch.zeros_like(big)
torch.cuda.synchronize()
print("ready", flush=True)
while True:
    for _ in range(10):
        torch.mm(a, a, out=b) if sys.argv[1] == "products" else other.copy_(big)
    torch.cuda.synchronize()
"""


@gpu
@pytest.mark.parametrize("kind", ["products", "copies"])
def test_beside_another_process(kind):
    fused = Fused(helpers.tiny_half())
    lap(fused)
    alone, tokens, logits = lap(fused)
    process = subprocess.Popen([sys.executable, "-c", LOAD, kind], stdout=subprocess.PIPE, text=True)
    try:
        ready = process.stdout.readline()
        seconds, again, last = lap(fused)
        absent = ready != "ready\n" or process.poll() is not None
    finally:
        process.kill()
        process.wait()
    report("under load", f"{kind}: the other process was not there", absent)
    report("under load", f"{kind}, {seconds / alone:.1f} times slower: tokens that differ",
           (again != tokens).sum() + (not torch.equal(last, logits)))


@gpu
def test_fused_command():
    options = ("--fused", "--temperature", "0", "--tokens", "60", "--device", "cuda")
    runs = [helpers.command(*options), helpers.command(*options, "--no-graph")]
    gone = helpers.command(*options)
    gone.stdout.close()
    outs = [run.communicate(timeout=120) for run in runs]
    faults = [run.returncode + abs(err.count("\n") - 1) for run, (_, err) in zip(runs, outs, strict=True)]
    report("generate.py", "--fused: exit codes, and lines other than one", sum(faults))
    report("generate.py", "--fused: fewer than 60 tokens", sum("60 tokens" not in err for _, err in outs))
    report("generate.py", "--fused: text without a graph differs", outs[0][0] != outs[1][0])
    _, err = gone.communicate(timeout=120)
    report("generate.py", "--fused: tracebacks when the reader is gone", err.count("Traceback"))
