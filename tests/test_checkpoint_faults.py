"""Checkpoints as users have them: other names, old fields, other tokenizers; and what is no checkpoint.

Each test compares with transformers or with the file itself, or asks for the sentence that helps.
"""
import http.server
import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from checkpoint import fetch
from generate import Text, main
from model import Config, Pythia
from tests.helpers import HERE, TINY, report, report_refusal, report_refused


@pytest.fixture
def tiny(tmp_path):
    """A copy of tiny-pythia in a folder of its own."""
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def edit(path, change):
    """`change` edits the dict that a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def theirs(folder):
    return GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32)


def report_same_logits(what, check, folder):
    """Ours from the files in `folder` are transformers', bit for bit where the arithmetic is the same."""
    tokens = torch.arange(40)[None]
    a, b = Pythia.from_pretrained(folder)(tokens), theirs(folder)(tokens).logits
    report(what, check, (a - b).abs().max() / b.std(), 1e-4)


# --------------------------------------------------------------------------------------- the end of a text

ENDS = {  # what is done to: config.json, generation_config.json (None: there is none; text: its content)
    "a list": ({}, {"eos_token_id": [0, 262]}),
    "other than config.json's": ({"eos_token_id": 5}, {"eos_token_id": 262}),
    "null": ({}, {"eos_token_id": None}),
    "none of it": ({"eos_token_id": 262}, None),
    "no file, and a list in config.json": ({"eos_token_id": [7, 262]}, None),
    "no file, and null in config.json": ({"eos_token_id": None}, None),
    "a damaged file": ({"eos_token_id": 262}, "{"),
    "an empty one": ({}, "{}")}


@pytest.mark.parametrize("case", ENDS)
def test_ends_of_a_text(case, tiny):
    config, generation = ENDS[case]
    edit(tiny / "config.json", lambda fields: fields.update(config))
    if generation is None:
        (tiny / "generation_config.json").unlink()
    elif isinstance(generation, str):
        (tiny / "generation_config.json").write_text(generation)
    else:
        edit(tiny / "generation_config.json", lambda fields: fields.update(generation))
    expected = theirs(tiny).generation_config.eos_token_id
    expected = () if expected is None else tuple(torch.tensor(expected).view(-1).tolist())
    report("end of a text", f"generation_config.json has {case}: unlike transformers",
           Config.from_pretrained(tiny).eos != expected)


def test_text_that_ends(tiny):
    prompt = Text(tiny).encode("The sea was calm, and")
    free = list(Pythia.from_pretrained(tiny).generate(prompt, 20))
    edit(tiny / "generation_config.json", lambda fields: fields.update(eos_token_id=[0, free[9]]))
    ended = list(Pythia.from_pretrained(tiny).generate(prompt, 20))
    tokens = torch.tensor([prompt])
    expected = theirs(tiny).generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=0)
    report("end of a text", "tokens unlike transformers'", ended != expected[0, len(prompt):].tolist())
    report("end of a text", "goes on to the 20th token", len(ended) == 20)


# -------------------------------------------------------------------------------------------- the tokenizer

def of_file(**parts):
    """A change of a tokenizer.json: these parts of it are others."""
    def change(path):
        tokenizer = Tokenizer.from_file(str(path))
        for name, value in parts.items():
            setattr(tokenizer, name, value)
        tokenizer.save(str(path))
    return change


def for_batches(path):
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(path))


TOKENIZERS = {
    "splits at each e": of_file(pre_tokenizer=pre.Sequence(
        [pre.Split("e", "isolated"), pre.ByteLevel(add_prefix_space=False)])),
    "adds a first token": of_file(post_processor=processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])),
    "adds a space": of_file(pre_tokenizer=pre.ByteLevel(add_prefix_space=True)),
    "writes small letters": of_file(normalizer=normalizers.Lowercase())}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer_of_the_file(case, tiny):
    path, prompt = tiny / "tokenizer.json", "In the Year 2024, 123456789 whales"
    before = Tokenizer.from_file(str(path)).encode(prompt).ids
    TOKENIZERS[case](path)
    ids = Tokenizer.from_file(str(path)).encode(prompt).ids
    report("tokenizer", f"that {case}: ids unlike the file's", Text(tiny).encode(prompt) != ids)
    report("tokenizer", f"that {case}: is like the one before", ids == before)


def test_tokenizer_for_batches(tiny):
    """What a file says of truncation and padding is for training: a prompt is neither cut nor filled."""
    prompt = "It is a truth universally acknowledged"
    ids = Text(tiny).encode(prompt)
    for_batches(tiny / "tokenizer.json")
    report("tokenizer", "for batches: prompts cut or filled", Text(tiny).encode(prompt) != ids)


def trained(folder, split, decoder):
    """A small tokenizer of another kind, as tokenizer.json in `folder`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoder
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator([Path(HERE, "README.md").read_text()],
                                  trainers.BpeTrainer(vocab_size=600, special_tokens=special[:2]))
    state = json.loads(tokenizer.to_str())
    for token in special[2:]:
        state["model"]["vocab"].setdefault(token, len(state["model"]["vocab"]))
    (folder / "tokenizer.json").write_text(json.dumps(state))


KINDS = {
    "byte level": None,
    "Metaspace": (pre.Metaspace(), decoders.Metaspace()),
    "byte fallback": (pre.Metaspace(), decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)]))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["Call me", "The whale ", "caf\ufffd", "\U0001f433"])
def test_streamed_text(kind, prompt, tiny):
    """All pieces are what the tokenizer makes of all tokens at once, after what it makes of the prompt."""
    if KINDS[kind]:
        trained(tiny, *KINDS[kind])
    text = Text(tiny)
    new = text.encode(" Ishmael. Some years ago \u2014 never mind how long 鲸 precisely")
    vocabulary = Tokenizer.from_file(str(tiny / "tokenizer.json")).get_vocab()
    some = [token for name, token in vocabulary.items() if not name.startswith("<0x")]  # bytes by themselves
    drawn = torch.randint(len(some), (200,), generator=torch.Generator().manual_seed(0)).tolist()
    new, ids = [*new, 0, *(some[i] for i in drawn), len(vocabulary) + 7, *new], text.encode(prompt)
    pieces = "".join([text.decode(token) for token in new]) + text.rest()
    before, both = (text.tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids + new))
    report("streaming", f"{kind}, after {prompt!r}: unlike the text at once", before + pieces != both)


def test_other_tokenizers(tiny):
    """Without tokenizer.json, transformers' own: of its older files, or of none, as bytes have."""
    ids = Text(tiny).encode("Call me Ishmael")
    state = json.loads((tiny / "tokenizer.json").read_text())["model"]
    (tiny / "vocab.json").write_text(json.dumps(state["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["merges"]]
    (tiny / "merges.txt").write_text("\n".join(merges))
    (tiny / "tokenizer.json").unlink()
    report("tokenizer", "vocab.json and merges.txt: other ids", Text(tiny).encode("Call me Ishmael") != ids)
    edit(tiny / "tokenizer_config.json", lambda fields: (fields.clear(), fields.update(
        tokenizer_class="ByT5Tokenizer")))
    text = Text(tiny)
    ids = text.encode("naïve")
    again = "".join([text.decode(token) for token in [*ids, 2000]]) + text.rest()
    report("tokenizer", "without a fast backend: bytes unlike the text", again != "naïve")
    (tiny / "evil.py").write_text(f"open({str(tiny / 'ran')!r}, 'w')\n")
    edit(tiny / "tokenizer_config.json", lambda fields: (fields.clear(), fields.update(
        tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})))
    report_refused("tokenizer that is code", ["cannot be read"], Text, tiny)
    report("tokenizer", "that is code: executed", (tiny / "ran").exists())


# --------------------------------------------------------------------------------------- names and fields

def rewrite(folder, change, form="safetensors"):
    """`change` makes another dict of the tensors in model.safetensors."""
    path = folder / "model.safetensors"
    state = {name: w.clone() for name, w in change(load_file(path)).items()}
    path.unlink()
    if form == "safetensors":
        save_file(state, path, {"format": "pt"})
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:  # one file a tensor
        files = {name: f"part-{i}.safetensors" for i, name in enumerate(state)}
        for name, file in files.items():
            save_file({name: state[name]}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def inner(state):
    """As GPTNeoXModel, without its head, names its weights; the head is beside them."""
    return {name.removeprefix("gpt_neox."): w for name, w in state.items()}


def old_head(state):
    return {name if "gpt_neox" in name else "embed_out.weight": w for name, w in state.items()}


def two_heads(*order):
    def change(state):
        w = old_head(state).pop("embed_out.weight")
        layers = {name: w for name, w in state.items() if "gpt_neox" in name}
        return layers | {name: w if name == "embed_out.weight" else w.flip(0) for name in order}
    return change


NAMES = {
    "no prefix": inner,
    "no prefix, the old head": lambda state: inner(old_head(state)),
    "two heads": two_heads("embed_out.weight", "lm_head.weight"),
    "two heads, the other way": two_heads("lm_head.weight", "embed_out.weight")}


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
@pytest.mark.parametrize("case", NAMES)
def test_names_of_weights(case, form, tiny):
    rewrite(tiny, NAMES[case], form)
    report_same_logits("names", f"{case}, {form}: logits unlike transformers'", tiny)


def test_missing_fields(tiny):
    """A field that transformers has a default for may be missing: in tiny-pythia these are its own values."""
    names = [name for name in vars(GPTNeoXConfig()) if not name.startswith("_")]
    own = json.loads((tiny / "config.json").read_text())
    same = [name for name, value in own.items() if name in names and getattr(GPTNeoXConfig(), name) == value]
    edit(tiny / "config.json", lambda fields: [fields.pop(name) for name in same])
    report("fields", "layer_norm_eps is not among those left out", "layer_norm_eps" not in same)
    report_same_logits("fields", f"{len(same)} left out: logits unlike transformers'", tiny)


def test_fields_that_count(tiny):
    """transformers follows these fields, so a checkpoint that has them is another model."""
    path, good, own = tiny / "config.json", (tiny / "config.json").read_text(), Config.from_pretrained(tiny)
    for field, value in (("head_dim", 16), ("head_dim", 64), ("head_dim", "32"), ("is_causal", False)):
        edit(path, lambda fields, field=field, value=value: fields.update({field: value}))
        report_refused(f"{field} {value}", [f"{field} = {value!r}"], Config.from_pretrained, tiny)
        path.write_text(good)
    for field, value in (("head_dim", 32), ("head_dim", None), ("is_causal", True), ("sliding_window", 4)):
        edit(path, lambda fields, field=field, value=value: fields.update({field: value}))
        report("fields", f"{field} {value}: another config", Config.from_pretrained(tiny) != own)
        path.write_text(good)


def test_names_of_dtypes():
    for name in ("float32", "float16", "bfloat16"):
        made = Pythia.from_pretrained(TINY, dtype=name), Pythia.random("pythia-14m", dtype=name)
        wrong = sum(model.embed_in.dtype != getattr(torch, name) for model in made)
        report("dtype", f"{name!r}: models of another", wrong)
    report_refused("dtype int8", ["int8", "float16"], Pythia.from_pretrained, TINY, dtype="int8")


# ------------------------------------------------------------------------------------------ no checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 11583680\n"


def no_weights(name, content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)
    return change


def adapter(folder):
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def quantised(dtype, suffix):
    def change(state):
        name = "gpt_neox.layers.0.attention.dense."
        return state | {name + "weight": state[name + "weight"].to(dtype), name + suffix: torch.ones(3)}
    return lambda folder: rewrite(folder, change)


NO_CHECKPOINTS = {  # name: (what is done, words that the sentence has to have)
    "pointer of git-lfs as .bin": (no_weights("pytorch_model.bin", POINTER), ["_model.bin", "git lfs pull"]),
    "pointer of git-lfs": (no_weights("model.safetensors", POINTER), ["model.safetensors", "git lfs pull"]),
    "web page as .bin": (no_weights("pytorch_model.bin", b"<!doctype html>"), ["_model.bin", "fetch"]),
    "pickled module": (no_weights("pytorch_model.bin", pickle.dumps(torch.nn.Linear(2, 2))),
                       ["pytorch_model.bin", "fetch"]),
    "adapter": (adapter, ["config.json", "adapter"]),
    "weights as .gguf": (no_weights("model.gguf", b"GGUF"), ["neither model.safetensors nor"]),
    "8 bits": (quantised(torch.int8, "SCB"), ["int8", "quantised"]),
    "float8 with scales": (quantised(torch.float8_e4m3fn, "weight_scale"), ["weight_scale", "quantised"]),
    "file that is cut off": (lambda folder: os.truncate(folder / "model.safetensors", 10**6),
                             ["model.safetensors", "cannot be read"]),
    "shard that is missing": (lambda folder: (rewrite(folder, dict, "sharded"),
                                              (folder / "part-3.safetensors").unlink()),
                              ["part-3.safetensors", "No such file"]),
    "damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'),
                          ["tokenizer.json", "cannot be read"])}


@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_no_checkpoints(case, tiny, capsys):
    change, words = NO_CHECKPOINTS[case]
    change(tiny)
    rc = main(["--model", str(tiny), "--tokens", "1"])
    said = capsys.readouterr().err
    report_refusal(case, words, said, rc)
    report("refusal", f"{case}: torch's advice to run what is in the file", "weights_only" in said)


def test_files_instead_of_folders(tiny):
    (tiny / "pythia.Q4.gguf").write_bytes(b"GGUF")
    for file, word in (("model.safetensors", "give the folder"), ("pythia.Q4.gguf", "made from")):
        report_refused(f"{file} as a model", ["is a file", word], Pythia.from_pretrained, tiny / file)


# ------------------------------------------------------------------------------------- the Hub and its cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """A Hub with one model, the files of the server's folder; it remembers what it was asked for."""

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.asked.append(path)
        name, body = path.rpartition("/")[2], b""
        if path.startswith("/api/models/a/tiny/tree/"):
            files = self.server.folder.iterdir()
            body = json.dumps([{"type": "file", "path": file.name, "size": file.stat().st_size,
                                "oid": file.name} for file in files]).encode()
        elif path.startswith("/api/models/a/tiny"):
            body = json.dumps({"id": "a/tiny", "modelId": "a/tiny", "sha": COMMIT, "siblings": [], "tags": [],
                               "private": False, "downloads": 0, "likes": 0}).encode()
        elif (self.server.folder / name).is_file():
            body = (self.server.folder / name).read_bytes()
        self.send_response(200 if body else 404)
        for key, value in (("Content-Length", len(body)), ("ETag", f'"{name}"'), ("X-Repo-Commit", COMMIT),
                           ("Content-Type", "application/json")):
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    """A server of the model a/tiny, and an empty cache; without a network after server_close()."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = tiny, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        here + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def unplug(hub):
    hub.shutdown()
    hub.server_close()


def test_what_is_fetched(hub):
    """Each file that is read, once; weights in one form; and without a network what is there is enough."""
    (hub.folder / "pytorch_model.bin").write_bytes(b"never read")
    (hub.folder / "fp32").mkdir()
    Config.from_pretrained("a/tiny")
    files = {file.name for file in Path(fetch("a/tiny", weights=False)).iterdir()}
    report("hub", "for the config alone: weights", len(files & {"model.safetensors", "pytorch_model.bin"}))
    hub.asked.clear()
    folder = fetch("a/tiny")
    files = {file.name for file in Path(folder).iterdir()}
    needed = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    more = files & {"pytorch_model.bin", "fp32"}
    report("hub", "files that are lacking, or not needed", len(needed - files) + len(more))
    hub.asked.clear()
    report("hub", "the second time: another folder", fetch("a/tiny") != folder)
    report("hub", "the second time: questions to the Hub", len(hub.asked), 2)
    unplug(hub)
    start = time.perf_counter()
    model, text = Pythia.from_pretrained("a/tiny"), Text(fetch("a/tiny"))
    report("hub", "no network: seconds to load what is there", time.perf_counter() - start, 5)
    report("hub", "no network: another text", list(model.generate(text.encode("Call me"), 5))
           != list(Pythia.from_pretrained(TINY).generate(Text(TINY).encode("Call me"), 5)))
    report_refused("revision that is not there", ["a/tiny", "'step7'", "network"], fetch, "a/tiny", "step7")
    (Path(folder) / "special_tokens_map.json").unlink(missing_ok=True)
    (Path(folder) / "tokenizer_config.json").unlink()  # another program may have needed less
    report("hub", "no network, files lacking that are not read: refused", fetch("a/tiny") != folder)


def test_bin_from_the_hub(hub):
    rewrite(hub.folder, dict, "bin")
    report_same_logits("hub", "only pytorch_model.bin: logits unlike transformers'", fetch("a/tiny"))


def test_folder_of_the_cache(hub, tmp_path):
    """The folder that a model's name leads to in the cache is not yet that of its files."""
    fetch("a/tiny")
    report_refused("models--a--tiny", ["config.json", "snapshots"], Pythia.from_pretrained,
                   tmp_path / "hub" / "models--a--tiny")
    report_refused("folder with a revision", ["step3000", "folder"], fetch, TINY, "step3000")
