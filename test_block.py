"""All tests: python test_block.py (prints a table) or pytest (prints only what fails).

A row is: what was run, what was checked, the error, the largest error allowed, PASS or FAIL.
"""
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils import logging

import generate
from model import SIZES, Config, Pythia, Refused

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = generate.TINY
logging.set_verbosity_error()   # no remarks and no progress bars
logging.disable_progress_bar()  # between the rows of the table


def report(what, check, error, limit):
    """Prints one row of the table and fails the test unless error <= limit."""
    ok = error <= limit
    print(f"\n{what:<17} {check:<55} {error:<9.3g} <= {limit:<8.3g} {'PASS' if ok else 'FAIL'}", end=" ")
    assert ok, f"{what}: {check}: {error} > {limit}"


def error_of(ours, theirs):
    """Largest difference, in units of the standard deviation of `theirs` (a logit's scale)."""
    return ((ours - theirs).abs().max() / theirs.std()).item()


# -------------------------------------------------------------------------------- logits against transformers

def transformers_twin(model):
    """A GPTNeoXForCausalLM with the weights of `model`; only the two transposed matrices are copied."""
    c = model.config
    config = GPTNeoXConfig(
        vocab_size=c.vocab, hidden_size=c.hidden, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        intermediate_size=c.mlp, max_position_embeddings=c.context, layer_norm_eps=c.eps, eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta,
                         "partial_rotary_factor": c.rotary_dims / c.head_size})
    with torch.device("meta"):  # no memory and no time for weights that are replaced at once
        hf = GPTNeoXForCausalLM(config)
    state = {"gpt_neox.embed_in.weight": model.embed_in, "gpt_neox.final_layer_norm.weight": model.lnf_w,
             "gpt_neox.final_layer_norm.bias": model.lnf_b}
    for i, block in enumerate(model.blocks):
        state |= {f"gpt_neox.layers.{i}.{name}": w for name, w in {
            "input_layernorm.weight": block.ln1_w, "input_layernorm.bias": block.ln1_b,
            "post_attention_layernorm.weight": block.ln2_w, "post_attention_layernorm.bias": block.ln2_b,
            "attention.query_key_value.weight": block.w_qkv, "attention.query_key_value.bias": block.b_qkv,
            "attention.dense.weight": block.w_out.T.contiguous(), "attention.dense.bias": block.b_out,
            "mlp.dense_h_to_4h.weight": block.w_up, "mlp.dense_h_to_4h.bias": block.b_up,
            "mlp.dense_4h_to_h.weight": block.w_down.T.contiguous(), "mlp.dense_4h_to_h.bias": block.b_down,
        }.items()}
    state |= {name: model.embed_out for name in hf.state_dict() if not name.startswith("gpt_neox.")}
    hf.load_state_dict(state, assign=True)
    hf.gpt_neox.rotary_emb = type(hf.gpt_neox.rotary_emb)(config)
    return hf.eval()


@pytest.mark.parametrize("name", SIZES)
@torch.inference_mode()
def test_logits(name):
    """Every width of the family; depth cut to 2 or 1 layers, from 160m on the vocabulary to 2048 words."""
    config = Config.from_name(name)
    small = config.hidden <= 1024
    config = replace(config, n_layer=2 if small else 1, vocab=config.vocab if config.hidden <= 512 else 2048)
    model = Pythia.random(config, seed=len(name))
    hf = transformers_twin(model)
    context, rng = config.context, torch.Generator().manual_seed(1)
    T = context if small else 128
    tokens = torch.randint(config.vocab, (1, T), generator=rng)
    theirs = hf(tokens).logits
    report(name, f"prefill, positions 0..{T - 1}", error_of(model(tokens), theirs), 1e-4)

    cache = model.new_cache().fill_(float("nan"))  # a row that is read before it is written shows
    cuts = [0, T - 96, T - 32, *range(T - 31, T + 1)]
    pieces = [model(tokens[:, a:b], cache, a) for a, b in pairwise(cuts)]
    report(name, "prefill, then a piece, then token by token", error_of(torch.cat(pieces, 1), theirs), 1e-4)

    past = context - 24  # random keys and values stand for a long text: the last positions at little cost
    cache = model.new_cache().fill_(float("nan"))
    cache[..., :past, :] = torch.randn(cache[..., :past, :].shape, generator=rng)
    theirs_cache = DynamicCache()
    for i in range(config.n_layer):
        theirs_cache.update(cache[i, 0, :, :, :past].clone(), cache[i, 1, :, :, :past].clone(), i)
    tokens = torch.randint(config.vocab, (1, 24), generator=rng)
    theirs = hf(tokens, past_key_values=theirs_cache).logits
    cuts = [past, past + 8, *range(past + 9, context + 1)]
    pieces = [model(tokens[:, a - past:b - past], cache, a) for a, b in pairwise(cuts)]
    report(name, f"mixed, positions {past}..{context - 1}", error_of(torch.cat(pieces, 1), theirs), 1e-4)


@torch.inference_mode()
def test_batch():
    model = Pythia.random("pythia-14m")
    tokens = torch.randint(model.config.vocab, (3, 40), generator=torch.Generator().manual_seed(0))
    theirs, cache = transformers_twin(model)(tokens).logits, model.new_cache(batch=3)
    ours = torch.cat([model(tokens[:, :30], cache), model(tokens[:, 30:], cache, 30)], 1)
    report("pythia-14m", "batch of 3, all 6 layers", error_of(ours, theirs), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_half_precision(dtype):
    """Our rounding error against transformers' own; the truth is fp32 arithmetic on the same weights."""
    model = Pythia.random("pythia-14m", dtype=dtype)
    tokens = torch.randint(model.config.vocab, (1, 256), generator=torch.Generator().manual_seed(0))
    hf = transformers_twin(model)
    theirs = hf(tokens).logits.float()
    cache = model.new_cache()
    cuts = [0, *range(200, 257)]
    ours = torch.cat([model(tokens[:, a:b], cache, a) for a, b in pairwise(cuts)], 1)
    truth = hf.float()(tokens).logits
    ratio = (ours.float() - truth).square().mean().sqrt() / (theirs - truth).square().mean().sqrt()
    report("pythia-14m", f"{str(dtype)[6:]} rms error / transformers' own", ratio.item(), 1.1)


# ------------------------------------------------------------------------------------ the embedded checkpoint

@pytest.fixture(scope="module")
def tiny():
    """Our model, transformers' model, a prompt's tokens."""
    tokens = AutoTokenizer.from_pretrained(TINY)("The sea was calm, and")["input_ids"]
    return Pythia.from_pretrained(TINY), GPTNeoXForCausalLM.from_pretrained(TINY, dtype=torch.float32), tokens


def transformers_greedy(hf, prompt, n):
    out = hf.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                      max_new_tokens=n, do_sample=False, pad_token_id=0)
    return out[0, len(prompt):].tolist()


def test_greedy_text(tiny):
    ours, hf, prompt = tiny
    a, b = list(ours.generate(prompt, 256)), transformers_greedy(hf, prompt, 256)
    differing = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    report("tiny-pythia", f"greedy tokens unlike transformers', of {len(b)}", differing, 0)


def test_decode_speed(tiny):
    """In turns, best of three each, so that other work on the machine disturbs both alike."""
    ours, hf, prompt = tiny
    seconds = {"ours": [], "theirs": []}
    for _ in range(3):
        for who, run in (("ours", lambda: list(ours.generate(prompt, 256))),
                         ("theirs", lambda: transformers_greedy(hf, prompt, 256))):
            start = time.perf_counter()
            n = len(run())
            seconds[who].append((time.perf_counter() - start) / n)
    report("tiny-pythia", "CPU seconds a token / transformers' generate",
           min(seconds["ours"]) / min(seconds["theirs"]), 1.0)


# ---------------------------------------------------------------------------------------------------- loading

def small_checkpoint(folder, **save):
    """A GPT-NeoX checkpoint of 2 layers written by transformers; returns the transformers model."""
    torch.manual_seed(0)
    hf = GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                          intermediate_size=256, vocab_size=300, eos_token_id=0)).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p += 0.1 * torch.randn_like(p)
    hf.save_pretrained(folder, **save)
    return hf


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def as_bin(folder, edit=lambda state: None):
    """Replaces model.safetensors by pytorch_model.bin, after `edit` of its dict of tensors."""
    state = dict(GPTNeoXForCausalLM.from_pretrained(folder).state_dict())
    edit(state)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def write_safetensors(folder, hf):
    pass  # what save_pretrained writes by itself


def write_sharded(folder, hf):
    hf.save_pretrained(folder, max_shard_size="100kB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 2


def write_bin(folder, hf):
    as_bin(folder)


def write_2023(folder, hf):
    """Names, buffers and config fields as in the files of 2023, when Pythia came out."""
    def edit(state):
        head = next(name for name in state if not name.startswith("gpt_neox."))
        state["embed_out.weight"] = state.pop(head)
        for i in range(2):
            prefix = f"gpt_neox.layers.{i}.attention."
            state[prefix + "bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
            state[prefix + "masked_bias"] = torch.tensor(-1e9)
            state[prefix + "rotary_emb.inv_freq"] = torch.ones(2)
    as_bin(folder, edit)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["attention_bias"]
    (folder / "config.json").write_text(json.dumps(config | {"rotary_pct": 0.25, "rotary_emb_base": 10000}))


@pytest.mark.parametrize("write", [write_safetensors, write_sharded, write_bin, write_2023])
@torch.inference_mode()
def test_formats(write, tmp_path):
    folder = tmp_path / "a folder with spaces"
    hf = small_checkpoint(folder)
    write(folder, hf)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    model, tokens = Pythia.from_pretrained(folder), torch.arange(100)[None]
    what = "file: " + write.__name__[6:]
    report(what, "logits of what transformers saved", error_of(model(tokens), hf(tokens).logits), 1e-4)
    half = Pythia.from_pretrained(folder, dtype=torch.float16)
    wrong = sum(not torch.equal(a.half(), b)
                for a, b in zip(model.parameters(), half.parameters(), strict=True))
    report(what, "tensors loaded as fp16 unlike those cast to fp16", wrong, 0)
    changed = sum(path.read_bytes() != content for path, content in before.items())
    report(what, "files changed by loading", changed, 0)


def test_weight_layout(tmp_path):
    """Every matrix is rows of C, contiguous: what the kernel reads."""
    hf = small_checkpoint(tmp_path)
    model = Pythia.from_pretrained(tmp_path)
    layer, block = hf.gpt_neox.layers[1], model.blocks[1]
    pairs = [(block.w_qkv, layer.attention.query_key_value.weight),
             (block.w_out, layer.attention.dense.weight.T),
             (block.w_up, layer.mlp.dense_h_to_4h.weight),
             (block.w_down, layer.mlp.dense_4h_to_h.weight.T)]
    wrong = sum(not torch.equal(a, b) or not a.is_contiguous() or a.shape[1] != 64 for a, b in pairs)
    report("layout", "matrices that are not contiguous rows of C", wrong, 0)


PEAK_MEMORY = """
import os, sys, torch
from model import Pythia
from transformers.utils import logging
logging.disable_progress_bar()
def status(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
folder = sys.argv[1]
Pythia.from_pretrained(sys.argv[2])  # imports and allocator pools are not the checkpoint's
before = status("VmRSS")
model = Pythia.from_pretrained(folder, dtype=torch.float16)
sum(w.float().sum() for w in model.parameters())  # reads every page, also of files that are mapped
peak = status("VmHWM")
size = sum(entry.stat().st_size for entry in os.scandir(folder))
print((peak - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_host_memory(tmp_path):
    """Peak resident memory of loading an fp16 checkpoint in fp16, above what the process held before, in
    units of the checkpoint. The model is 410m cut to 12 layers and a small vocabulary, in shards."""
    small_checkpoint(tmp_path / "small")
    config = replace(Config.from_name("pythia-410m"), n_layer=12, vocab=1024)
    model = Pythia.random(config, dtype=torch.float16)
    transformers_twin(model).save_pretrained(tmp_path / "big", max_shard_size="100MB")
    out = subprocess.run([sys.executable, "-c", PEAK_MEMORY, tmp_path / "big", tmp_path / "small"], cwd=HERE,
                         stdout=subprocess.PIPE, text=True, check=True)
    report("host memory", "peak of loading fp16 / size of the checkpoint", float(out.stdout), 1.2)


# --------------------------------------------------------------------------------------------------- refusals

def config_field(**fields):
    return lambda folder: edit_config(folder, **fields)


def rope(**fields):
    return config_field(rope_parameters={"rope_type": "default", "rope_theta": 10000,
                                         "partial_rotary_factor": 0.25} | fields)


def drop_tensor(folder):
    as_bin(folder, lambda state: state.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.bias"))


def add_tensor(folder):
    as_bin(folder, lambda state: state.update({"gpt_neox.layers.1.adapter.weight": torch.ones(3)}))


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def truncate(name):
    def edit(folder):
        if name.endswith("bin"):
            as_bin(folder)
        os.truncate(folder / name, (folder / name).stat().st_size // 2)
    return edit


REFUSALS = {  # name: (what is done to a good checkpoint, arguments, words the sentence must contain)
    "wrong architecture": (config_field(model_type="llama"), [], ["model_type", "'llama'"]),
    "unknown architecture": (config_field(model_type="zeta"), [], ["zeta"]),
    "sequential residual": (config_field(use_parallel_residual=False), [], ["parallel_residual", "False"]),
    "other activation": (config_field(hidden_act="gelu_new"), [], ["hidden_act", "'gelu_new'"]),
    "tied embeddings": (config_field(tie_word_embeddings=True), [], ["tie_word_embeddings", "True"]),
    "no attention bias": (config_field(attention_bias=False), [], ["attention_bias", "False"]),
    "RoPE scaling": (rope(rope_type="linear", factor=2.0), [], ["rope_type", "'linear'"]),
    "RoPE on odd dims": (rope(partial_rotary_factor=0.2), [], ["rotary_pct", "0.2"]),
    "missing tensor": (drop_tensor, [], ["lacks", "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"]),
    "extra tensor": (add_tensor, [], ["not use", "gpt_neox.layers.1.adapter.weight"]),
    "extra layer": (config_field(num_hidden_layers=1), [], ["not use", "gpt_neox.layers.1.", "more"]),
    "other shape": (config_field(vocab_size=301), [], ["shape", "embed_in", "301"]),
    "heads do not divide": (config_field(hidden_size=65), [], ["cannot be read"]),
    "truncated safetensors": (truncate("model.safetensors"), [], ["cannot be read", "fetch"]),
    "truncated bin": (truncate("pytorch_model.bin"), [], ["cannot be read", "fetch"]),
    "truncated config": (truncate("config.json"), [], ["cannot be read", "config.json"]),
    "no weights": (drop_weights, [], ["cannot be read", "safetensors"]),
    "no tokenizer": (lambda folder: None, [], ["no tokenizer"]),
    "folder with revision": (lambda folder: None, ["--revision", "step3000"], ["step3000", "folder"]),
    "no such folder": (None, ["--model", "/no/such folder"], ["/no/such folder", "neither"]),
    "empty prompt": (None, ["--prompt", ""], ["prompt is empty"]),
    "prompt too long": (None, ["--prompt", "whale " * 9000], ["prompt has 9", "context", "shorten"]),
    "dtype not supported": (None, ["--dtype", "float64"], ["--dtype", "float32"]),
    "dtype on no device": (None, ["--device", "abacus", "--dtype", "float16"], ["abacus", "float16", "cpu"]),
    "no such device": (None, ["--device", "cuda:99"], ["cuda:99", "cpu"]),
    "no such size": (None, ["--random", "--model", "pythia-3b"], ["pythia-3b", "pythia-2.8b"]),
    "temperature": (None, ["--temperature", "-1"], ["temperature", "-1"]),
    "top-k": (None, ["--top-k", "0"], ["top-k", "0"]),
    "top-p": (None, ["--top-p", "1.5"], ["top-p", "1.5"]),
    "tokens": (None, ["--tokens", "-5"], ["-5"]),
    "not a number": (None, ["--tokens", "many"], ["--tokens", "many"]),
    "fused": (None, ["--fused"], ["fused"]),
}


def report_refusal(case, rc, err, words):
    """A refusal is exit code 2 and one line on standard error, which has the words of REFUSALS."""
    faults = [f"no {word!r}" for word in words if word not in err]
    faults += [f"exit code {rc}"] * (rc != 2) + [f"{err.count(chr(10))} lines"] * (err.count("\n") != 1)
    report("refusal", case + (f": {faults} in {err!r}" if faults else ""), len(faults), 0)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case, tmp_path):
    edit, argv, words = REFUSALS[case]
    if edit:
        small_checkpoint(tmp_path)
        edit(tmp_path)
        argv = ["--model", str(tmp_path), *argv]
    with redirect_stderr(io.StringIO()) as err:
        try:
            rc = generate.main(argv)
        except SystemExit as end:  # argparse's way
            rc = end.code
    report_refusal(case, rc, err.getvalue(), words)


class MissingOnHub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does for a model or a revision that it does not have."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RevisionNotFound" if "pythia" in self.path else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def command(*argv, **env):
    return subprocess.Popen([sys.executable, os.path.join(HERE, "generate.py"), *argv], env=os.environ | env,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_hub_refusals(tmp_path):
    """The command itself against a Hub that lacks the revision, lacks the model, or is not there at all."""
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), MissingOnHub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    here, nowhere = f"http://127.0.0.1:{hub.server_port}", "http://127.0.0.1:9"
    cases = {
        "unknown revision": (["EleutherAI/pythia-70m", "--revision", "step7"], {"HF_ENDPOINT": here},
                             ["EleutherAI/pythia-70m", "no revision 'step7'"]),
        "unknown model": (["EleutherAI/python-70m"], {"HF_ENDPOINT": here}, ["python-70m", "neither"]),
        "offline": (["EleutherAI/pythia-70m"], {"HF_HUB_OFFLINE": "1"}, ["pythia-70m", "network"]),
        "no network": (["EleutherAI/pythia-70m"], {"HF_ENDPOINT": nowhere}, ["pythia-70m", "network"]),
    }
    running = {case: command("--model", *argv, HF_HOME=str(tmp_path), **env)
               for case, (argv, env, _) in cases.items()}
    for case, process in running.items():
        err = process.communicate(timeout=120)[1]
        report_refusal(case, process.returncode, err, cases[case][2])
    hub.shutdown()


# ------------------------------------------------------------------------------------------- the command line


def test_command_line():
    """Without arguments; with the prompt from standard input; with its reader gone."""
    plain, piped, gone = command(), command("--prompt", "-", "--tokens", "20", "--device", "cpu"), command()
    gone.stdout.close()
    out, err = piped.communicate("Café and", timeout=120)
    fact = re.fullmatch(r"tiny-pythia, float32, cpu \(\d+ threads\): 20 tokens, [\d.]+ ms a token, "
                        r"[\d.]+ tokens/s\n", err)
    report("generate.py", "--prompt - continues standard input, 20 tokens",
           int(fact is None or not out.startswith("Café and") or len(out) < 20), 0)
    out, err = plain.communicate(timeout=120)
    words = re.findall("[a-z]+", out.lower())
    common = sum(word in ("the", "and", "of", "to") for word in words)
    report("generate.py", "exit code without arguments, and other than one line",
           plain.returncode + abs(err.count("\n") - 1), 0)
    report("generate.py", "share of words other than the, and, of, to", 1 - common / len(words), 0.95)
    _, err = gone.communicate(timeout=120)
    report("generate.py", "tracebacks when the reader is gone", err.count("Traceback"), 0)


def test_ctrl_c():
    process = command("--random", "--model", "pythia-14m", "--device", "cpu", "--tokens", "100000")
    first = process.stdout.read(80)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    faults = [process.returncode != 130, not (first + out).endswith("\n"), err.count("\n") != 1,
              "interrupted" not in err]
    report("generate.py", "Ctrl-C: text so far, newline, one closing line", sum(faults), 0)


def test_split_characters():
    """A character over several tokens appears once it is whole; what never becomes whole comes last."""
    text = generate.Text(TINY, None)
    sentence = "naïve — “quoted” 鲸 🐳 end"
    ids = text.encode(sentence)
    pieces = [text.decode(token) for token in ids]
    report("streaming", "pieces with half a character", sum("\ufffd" in piece for piece in pieces), 0)
    report("streaming", "pieces together unlike the text", int("".join(pieces) + text.rest() != sentence), 0)
    text = generate.Text(TINY, None)
    whale = text.encode("a 🐳")[:-1]
    pieces = [text.decode(token) for token in whale] + [text.rest()]
    whole = text.tokenizer.decode(whale)
    report("streaming", "text that ends within a character", int("".join(pieces) != whole), 0)


# --------------------------------------------------------------------------------------------------- sampling

def test_same_seed():
    model = Pythia.random("pythia-14m")
    def text(**kw):
        return list(model.generate([1, 2, 3], 40, **kw))
    same = text(temperature=1, top_p=0.9, seed=5)
    report("sampling", "same seed, another text", int(same != text(temperature=1, top_p=0.9, seed=5)), 0)
    report("sampling", "other seed, same text", int(same == text(temperature=1, top_p=0.9, seed=6)), 0)
    report("sampling", "no seed twice, same text", int(text(temperature=1) == text(temperature=1)), 0)
    report("sampling", "top-k 1 unlike greedy", int(text(temperature=1.5, top_k=1, seed=1) != text()), 0)


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
    df = len(counts) - 1
    quantile = df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3
    return ((counts - expected) ** 2 / expected).sum(), quantile


@pytest.mark.parametrize("settings", [(1, None, None), (0.6, None, None), (1, 10, None), (1, None, 0.7),
                                      (0.8, 20, 0.8)])
def test_frequencies(settings):
    """With a last LayerNorm of gain 0 the logits are the same everywhere, so one long text is many draws."""
    temperature, top_k, top_p = settings
    config = Config(n_layer=1, n_head=1, hidden=16, mlp=16, vocab=40, rotary_dims=4, eos=())
    model = Pythia.random(config, seed=3)
    model.lnf_w.zero_()
    model.lnf_b *= 10
    logits = (model.embed_out @ model.lnf_b).double().numpy()
    draws = [t for seed in (1, 2) for t in model.generate([0], 2048, temperature, top_k, top_p, seed=seed)]
    counts = np.bincount(draws, minlength=len(logits))
    found, limit = chi_square(counts, probabilities(logits, *settings))
    label = f"T {temperature}, top-k {top_k}, top-p {top_p}: "
    report("sampling", label + "chi-square", found, limit)
    found, limit = chi_square(counts, probabilities(logits, temperature * 1.5, top_k, top_p))
    report("sampling", label + "is not T * 1.5", limit, found)


def test_ends():
    """A text ends after the tokens asked for, with end-of-text, or with the last position of the context."""
    model = Pythia.random(replace(Config.from_name("pythia-14m"), n_layer=1, context=64, eos=()))
    free = list(model.generate([1, 2, 3], 1000))
    report("ends", "tokens a context of 64 yields after 3, unlike 62", abs(len(free) - 62), 0)
    report("ends", "tokens unlike the 5 asked for", abs(len(list(model.generate([1], 5))) - 5), 0)
    report("ends", "tokens when 0 are asked for", len(list(model.generate([1], 0))), 0)
    report("ends", "tokens after 64, unlike 1", abs(len(list(model.generate([1] * 64, 9))) - 1), 0)
    model.config = replace(model.config, eos=(free[20],))
    ended = list(model.generate([1, 2, 3], 1000))
    report("ends", "text unlike that up to end-of-text", int(ended != free[:free.index(free[20]) + 1]), 0)
    with pytest.raises(Refused, match="position 64 is past"):
        model(torch.zeros(1, 65, dtype=torch.int64))


def test_not_finite():
    model = Pythia.random("pythia-14m", dtype=torch.float16)
    model.lnf_b.fill_(float("inf"))
    for temperature in (0, 1):
        with pytest.raises(Refused, match="not finite in torch.float16"):
            next(model.generate([1], 1, temperature))


@pytest.mark.parametrize("tokens, words", [([], "empty"), ([[1]], "shape"), ([50304], "50304"), ([-1], "-1")])
def test_bad_tokens(tokens, words):
    with pytest.raises(Refused, match=words):
        Pythia.random(replace(Config.from_name("pythia-14m"), n_layer=1)).generate(tokens, 1)


if __name__ == "__main__":
    # the warning: transformers has imported a pytest plugin (anyio's) before pytest could
    sys.exit(pytest.main([__file__, "-sq", "-Wignore::pytest.PytestAssertRewriteWarning", *sys.argv[1:]]))
