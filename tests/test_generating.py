"""Generating: the text of tiny-pythia, the command line, streaming, sampling, and where a text ends."""
import math
import os
import re
import signal
import subprocess
import sys
import timeit
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPTNeoXForCausalLM

import generate
from bench import greedy
from checkpoint import Refused
from model import Config, Pythia, Sampler
from tests import helpers
from tests.helpers import HERE, TINY, command, exit_of, report, report_refusal


def test_greedy():
    """The same text as transformers', and sooner: in turns, best of three each, so that other work on the
    machine disturbs both alike."""
    model, hf = Pythia.from_pretrained(TINY), GPTNeoXForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    prompt = generate.Text(TINY, None).encode("The sea was calm, and")
    start = torch.tensor([prompt])

    def ours():
        return list(model.generate(prompt, 256))

    def theirs():
        return greedy(hf, start, 256)[0, len(prompt):].tolist()
    a, b = ours(), theirs()
    seconds = [[timeit.timeit(run, number=1) for run in (ours, theirs)] for _ in range(3)]
    best = np.min(seconds, 0) / (len(a), len(b))
    differing = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    report("tiny-pythia", f"greedy tokens not as transformers', of {len(b)}", differing)
    report("tiny-pythia", "CPU seconds a token / transformers' generate", best[0] / best[1], 1)


def test_command_line():
    plain, piped, gone = command(), command("--prompt", "-", "--tokens", "20", "--device", "cpu"), command()
    gone.stdout.close()
    if os.path.exists("/dev/full"):  # Linux has it
        full = subprocess.run(f"{sys.executable} generate.py > /dev/full", shell=True, cwd=HERE, text=True,
                              stderr=subprocess.PIPE, timeout=120, check=False)
        report_refusal("text onto a full disk", ["cannot be written", "room"], full.stderr, full.returncode)
    out, err = piped.communicate("Café and", timeout=120)
    fact = re.fullmatch(r"tiny-pythia, float32, cpu \(\d+ threads\): 20 tokens, [\d.]+ ms a token, "
                        r"[\d.]+ tokens/s\n", err)
    report("generate.py", "--prompt - continues standard input, 20 tokens",
           fact is None or not out.startswith("Café and") or len(out) < 20)
    out, err = plain.communicate(timeout=120)
    words = re.findall("[a-z]+", out.lower())
    common = sum(word in ("the", "and", "of", "to") for word in words)
    report("generate.py", "exit code without arguments, and other than one line",
           plain.returncode + abs(err.count("\n") - 1))
    report("generate.py", "share of words other than the, and, of, to", 1 - common / len(words), 0.95)
    _, err = gone.communicate(timeout=120)
    report("generate.py", "tracebacks when the reader is gone", err.count("Traceback"))


def test_ctrl_c():
    process = command("--random", "--model", "pythia-14m", "--device", "cpu", "--tokens", "100000")
    first = process.stdout.read(80)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    faults = [process.returncode != 130, not (first + out).endswith("\n"), err.count("\n") != 1,
              "interrupted" not in err]
    report("generate.py", "Ctrl-C: text so far, newline, one closing line", sum(faults))


def test_split_characters():
    """A character over several tokens appears once it is whole; what never becomes whole comes last."""
    text = generate.Text(TINY, None)
    sentence = "naïve — “quoted” 鲸 🐳 end"
    pieces = [text.decode(token) for token in text.encode(sentence)]
    report("streaming", "pieces with half a character", sum("\ufffd" in piece for piece in pieces))
    report("streaming", "pieces together unlike the text", "".join(pieces) + text.rest() != sentence)
    text = generate.Text(TINY, None)
    whale = text.encode("a 🐳")[:-1]
    pieces = [text.decode(token) for token in whale] + [text.rest()]
    report("streaming", "text that ends within a character", "".join(pieces) != text.tokenizer.decode(whale))


def test_same_seed():
    model = Pythia.random("pythia-14m")
    helpers.report_seeds("sampling", lambda *args, **kw: list(model.generate([1, 2, 3], 40, *args, **kw)))


def test_temperatures():
    """However small a temperature above 0 is, and however large, all is drawn from logits that fit."""
    logits = torch.tensor([1.0, 5.0, 3.0, -1.0])
    for temperature, most in ((1e-39, 1), (1e-3, 1), (1e30, 4)):
        drawn = {int(Sampler(temperature)(logits, position)) for position in range(100)}
        report("sampling", f"T {temperature}: kinds of tokens of 100 unlike {most}", abs(len(drawn) - most))


@pytest.mark.parametrize("settings", helpers.DRAWS)
def test_frequencies(settings):
    config = Config(n_layer=1, n_head=1, hidden=16, mlp=16, vocab=40, rotary_dims=4, eos=())
    model = Pythia.random(config, seed=3)
    logits = helpers.flat_logits(model)
    drawn = [token for seed in (1, 2) for token in model.generate([0], 2048, *settings, seed)]
    helpers.report_frequencies("sampling", logits, settings, drawn)


def test_ends():
    """A text ends after the tokens asked for, with end-of-text, or with the last position of the context."""
    model = Pythia.random(replace(Config.from_name("pythia-14m"), n_layer=1, context=64, eos=()))
    free = list(model.generate([1, 2, 3], 1000))
    helpers.report_lengths("ends", model)
    model.config = replace(model.config, eos=(free[20],))
    ended = list(model.generate([1, 2, 3], 1000))
    report("ends", "text unlike that up to end-of-text", ended != free[:free.index(free[20]) + 1])
    with pytest.raises(Refused, match="position 64 is past"):
        model(torch.zeros(1, 65, dtype=torch.int64))


def test_not_finite():
    model = Pythia.random("pythia-14m", dtype=torch.float16)
    model.lnf_b.fill_(math.inf)
    for temperature in (0, 1):
        with pytest.raises(Refused, match="not finite in torch.float16"):
            next(model.generate([1], 1, temperature))


@pytest.mark.parametrize("tokens, words", [([], "empty"), ([[1]], "shape"), ([50304], "50304"), ([-1], "-1")])
def test_bad_tokens(tokens, words):
    with pytest.raises(Refused, match=words):
        Pythia.random(replace(Config.from_name("pythia-14m"), n_layer=1)).generate(tokens, 1)


# --------------------------------------------------------------------------------------------------- refusals

REFUSALS = {  # name: (words the sentence must contain, arguments)
    "no such folder": (["/no/such folder", "neither"], "--model", "/no/such folder"),
    "empty prompt": (["prompt is empty"], "--prompt", ""),
    "prompt too long": (["prompt has 9", "context", "shorten"], "--prompt", "whale " * 9000),
    "dtype not supported": (["--dtype", "float32"], "--dtype", "float64"),
    "dtype on no device": (["abacus", "float16", "cpu"], "--device", "abacus", "--dtype", "float16"),
    "no such device": (["cuda:99", "cpu"], "--device", "cuda:99"),
    "device without values": (["meta", "float16", "cpu"], "--device", "meta"),
    "no such size": (["pythia-3b", "pythia-2.8b"], "--random", "--model", "pythia-3b"),
    "random with revision": (["--revision"], "--random", "--revision", "step1"),
    "seed": (["seed 9", "2**64"], "--seed", "9" * 23),
    "temperature": (["temperature", "-1"], "--temperature", "-1"),
    "top-k": (["top-k", "0"], "--top-k", "0"),
    "top-p": (["top-p", "1.5"], "--top-p", "1.5"),
    "tokens": (["-5"], "--tokens", "-5"),
    "not a number": (["--tokens", "many"], "--tokens", "many"),
    "fused on a CPU": (["float16", "CUDA", "cpu", "leave fused out"], "--fused", "--device", "cpu"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    words, *argv = REFUSALS[case]
    report_refusal(case, words, *exit_of(generate.main, argv))
