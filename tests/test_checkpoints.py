"""Reading checkpoints: the forms of their files, memory, and what is refused with which sentence."""
import copy
import http.server
import json
import math
import os
import pickle
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import generate
from checkpoint import Refused
from model import Config, Pythia
from tests import helpers
from tests.helpers import (
    exit_of,
    report,
    report_refusal,
    report_refused,
    says,
    small_checkpoint,
)


def save_bin(folder, state):
    """pytorch_model.bin in place of model.safetensors."""
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def of_2023(folder, state):
    """Names, buffers and config fields as in the files of 2023, when Pythia came out."""
    head = next(name for name in state if not name.startswith("gpt_neox."))  # by transformers' version
    state["embed_out.weight"] = state.pop(head)
    for i in range(2):
        prefix = f"gpt_neox.layers.{i}.attention."
        state[prefix + "bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        state[prefix + "masked_bias"] = torch.tensor(-1e9)
        state[prefix + "rotary_emb.inv_freq"] = torch.ones(2)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["attention_bias"]
    (folder / "config.json").write_text(json.dumps(config | {"rotary_pct": 0.25, "rotary_emb_base": 10000}))


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin", "2023"])
def test_formats(form, tmp_path):
    """Also that every matrix is contiguous rows of C: what the kernel reads."""
    folder, what = tmp_path / "a folder with spaces", f"file: {form}"
    hf = small_checkpoint(folder, "100kB" if form == "sharded" else "1GB")
    assert len(list(folder.glob("*.safetensors"))) in (range(3, 99) if form == "sharded" else [1])
    if form in ("bin", "2023"):
        # one tensor under two names, which the file stores once
        hf.gpt_neox.layers[1].attention.dense.weight = hf.gpt_neox.layers[0].attention.dense.weight
        state = dict(hf.state_dict())
        if form == "2023":
            of_2023(folder, state)
        save_bin(folder, state)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    model, tokens = Pythia.from_pretrained(folder), torch.arange(100)[None]
    error = helpers.error_of(model(tokens), hf(tokens).logits)
    report(what, "logits of what transformers saved", error, 1e-4)
    half = Pythia.from_pretrained(folder, dtype=torch.float16)
    wrong = sum(not torch.equal(a.half(), b)
                for a, b in zip(model.parameters(), half.parameters(), strict=True))
    report(what, "tensors loaded as fp16 unlike those cast to fp16", wrong)
    report(what, "matrices that are not contiguous rows of C",
           sum(not w.is_contiguous() or w.shape[1] != 64 for w in model.parameters() if w.ndim == 2))
    matrices = sum(w.numel() for w in model.parameters() if w.ndim == 2)
    report(what, "weights in matrices unlike the config's count", abs(matrices - model.config.weights))
    report(what, "files changed by loading", sum(path.read_bytes() != old for path, old in before.items()))


def peak_memory(folder, small):
    """Prints that of loading the checkpoint in `folder` in fp16, in units of its size."""
    def load():
        model = Pythia.from_pretrained(folder, dtype=torch.float16)
        sum(w.float().sum() for w in model.parameters())  # reads every page, also of files that are mapped
    Pythia.from_pretrained(small)  # imports and allocator pools are not the checkpoint's
    print(helpers.grown(load) / sum(path.stat().st_size for path in Path(folder).iterdir()))


@helpers.on_linux
def test_host_memory(tmp_path):
    """The model is 410m cut to 12 layers and a small vocabulary, in shards."""
    small_checkpoint(tmp_path / "small")
    config = replace(Config.from_name("pythia-410m"), n_layer=12, vocab=1024)
    model = Pythia.random(config, dtype=torch.float16)
    helpers.transformers_twin(model).save_pretrained(tmp_path / "big", max_shard_size="100MB")
    peak = helpers.in_fresh_process(120, peak_memory, str(tmp_path / "big"), str(tmp_path / "small"))
    report("host memory", "peak of loading fp16 / size of the checkpoint", peak, 1.2)


LAST = "gpt_neox.layers.1."


def rope(**fields):
    return says(rope_parameters={"rope_type": "default", "rope_theta": 10000,
                                 "partial_rotary_factor": 0.25} | fields)


def tensors(edit):
    """`edit` changes the dict of tensors that model.safetensors holds."""
    def edit_file(folder):
        state = load_file(folder / "model.safetensors")
        edit(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return edit_file


def put(name, value):
    return tensors(lambda state: state.update({name: value}))


def fill(name, value):
    return tensors(lambda state: state[LAST + name].view(-1)[5].fill_(value))


def truncate(name):
    """Leaves 99 bytes, of model.safetensors a part of its header."""
    def edit(folder):
        if name.endswith("bin"):
            save_bin(folder, load_file(folder / "model.safetensors"))
        os.truncate(folder / name, 99)
    return edit


def cut_off(folder):
    """Ends model.safetensors within the data of a tensor."""
    content = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")  # of the header
    begin, end = json.loads(content[8:8 + size])[LAST + "attention.dense.weight"]["data_offsets"]
    os.truncate(folder / "model.safetensors", 8 + size + (begin + end) // 2)


REFUSALS = {  # name: (what is done to a good checkpoint, words the sentence must contain, arguments)
    "wrong architecture": (says(model_type="llama"), ["model_type", "'llama'"]),
    "unknown architecture": (says(model_type="zeta"), ["zeta"]),
    "sequential residual": (says(use_parallel_residual=False), ["parallel_residual", "False"]),
    "other activation": (says(hidden_act="gelu_new"), ["hidden_act", "'gelu_new'"]),
    "tied embeddings": (says(tie_word_embeddings=True), ["tie_word_embeddings", "True"]),
    "no attention bias": (says(attention_bias=False), ["attention_bias", "False"]),
    "RoPE scaling": (rope(rope_type="linear", factor=2.0), ["rope_type", "'linear'"]),
    "RoPE on odd dims": (rope(partial_rotary_factor=0.2), ["rotary_pct", "0.2"]),
    "missing tensor": (tensors(lambda state: state.pop(LAST + "mlp.dense_h_to_4h.bias")),
                       ["lacks", LAST + "mlp.dense_h_to_4h.bias"]),
    "extra tensor": (put(LAST + "adapter.weight", torch.ones(3)), ["not use", LAST + "adapter.weight"]),
    "name of several lines": (put("a\nb\x1b[31m", torch.ones(3)), ["not use", "a b [31m"]),
    "extra layer": (says(num_hidden_layers=1), ["not use", LAST, "more"]),
    "other shape": (says(vocab_size=301), ["shape", "embed_in", "301"]),
    "heads do not divide": (says(hidden_size=65), ["hidden_size = 65", "heads = 4"]),
    "NaN": (fill("mlp.dense_4h_to_h.bias", math.nan), ["NaN", "layers.1.mlp.dense_4h_to_h.bias"]),
    "Inf": (fill("attention.dense.weight", -math.inf), ["Inf", "layers.1.attention.dense.weight"]),
    "too large for fp16": (fill("mlp.dense_h_to_4h.weight", 1e5),
                           ["Inf", "layers.1.mlp.dense_h_to_4h.weight", "bfloat16"], "--dtype", "float16"),
    "whole numbers": (put(LAST + "attention.dense.bias", torch.ones(64, dtype=torch.int8)),
                      ["layers.1.attention.dense.bias", "int8"]),
    "weights of no bytes": (lambda folder: save_bin(folder, {"w": torch.ones(1).expand(300, 64)}),
                            [" w ", "76800", "4"]),
    "weights nowhere": (lambda folder: save_bin(folder, {"w": torch.ones(300, 64, device="meta")}),
                        [" w ", "76800", " 0 "]),
    "files too small": (says(vocab_size=2**22), ["shape", "asks for", "fetch"]),
    "truncated safetensors": (cut_off, ["model.safetensors", "cannot be read", "fetch"]),
    "truncated header": (truncate("model.safetensors"),
                         ["cannot be read", "header", "fetch"]),
    "truncated bin": (truncate("pytorch_model.bin"), ["cannot be read", "fetch"]),
    "truncated config": (truncate("config.json"), ["cannot be read", "config.json"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["cannot be read", "safetensors"]),
    "no tokenizer": (says(), ["no tokenizer"]),
    "folder with revision": (says(), ["step3000", "folder"], "--revision", "step3000"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case, tmp_path):
    edit, words, *argv = REFUSALS[case]
    small_checkpoint(tmp_path)
    edit(tmp_path)
    report_refusal(case, words, *exit_of(generate.main, ["--model", str(tmp_path), *argv]))


ABSURD = {  # field of config.json: values that are refused with its name
    "hidden_size": (10**9, 10**30, 0, -64, 64.0, "64", None, [64], True, {}),
    "num_hidden_layers": (10**6, 0, -1, 1.5, "2", None, []),
    "num_attention_heads": (0, -4, 128, "4", None, math.nan),
    "intermediate_size": (10**12, 0, -256, math.inf, None, [256]),
    "vocab_size": (10**12, 0, -300, 1e3, "many", None),
    "max_position_embeddings": (10**12, 0, -1, 2048.0, None),
    "layer_norm_eps": (math.nan, math.inf, -1e-5, 0, "small", None, [1e-5]),
    "eos_token_id": (-1, 0.5, "end", [0, None], {}),
    "rope_theta": (0, -1e4, math.nan, math.inf, 10**400, "base", None, [1]),
    "rotary_pct": (0, -0.25, math.nan, math.inf, 1.5, "quarter", None, []),
}


def test_hostile_config(tmp_path):
    small_checkpoint(tmp_path)
    says(rope_parameters=None, rotary_emb_base=10000, rotary_pct=0.25)(tmp_path)
    path = tmp_path / "config.json"
    good = path.read_text()

    def load(**fields):
        path.write_text(good)
        says(**fields)(tmp_path)
        return Pythia.from_pretrained(tmp_path)
    for field, values in ABSURD.items():
        faults = []
        for value in values:
            try:
                faults.append((value, load(**{"rotary_emb_base" if field == "rope_theta" else field: value})))
            except Refused as refusal:
                faults += [(value, str(refusal))] * (f"{field} = {value!r:.80}" not in str(refusal))
        report("hostile", f"{field}: {len(values)} values, not refused{faults or ''}", len(faults))
    report_refused("10**12 weights", ["hidden_size = 16384", "1e+11"], load, num_hidden_layers=1000,
                   hidden_size=2**14)
    load(num_labels=10**12, quantization_config={"quant_method": "bitsandbytes"},
         transformers_weights="elsewhere.safetensors", dtype="int8")  # acts on none of these
    path.write_text("[" * 100_000)
    report_refused("config.json of 100,000 brackets", ["fetch"], Pythia.from_pretrained, tmp_path)


def test_hostile_code(tmp_path):
    small_checkpoint(tmp_path)
    ran, weights = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    says(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(tmp_path)
    Pythia.from_pretrained(tmp_path)
    report("hostile", "auto_map: code of the checkpoint executed", ran.exists())
    (tmp_path / "model.safetensors").unlink()

    class Touch:
        def __reduce__(self):  # unpickling it creates a file
            return open, (str(ran), "w")
    state = {"gpt_neox.embed_in.weight": Touch()}
    for case, save in (("zip", lambda: torch.save(state, weights)),
                       ("of 2019", lambda: torch.save(state, weights, _use_new_zipfile_serialization=False)),
                       ("plain", lambda: weights.write_bytes(pickle.dumps(state, 2)))):
        save()
        report_refused(f"pickle, {case}", ["cannot be read"], Pythia.from_pretrained, tmp_path)
        report("hostile", f"pickle, {case}: executed", ran.exists())
    pickle.loads(weights.read_bytes())
    report("hostile", "pickle: does nothing even where it is executed", not ran.exists())


ODD = [0, 1, -1, 2, 3, 4, 8, 16, 64, 2**20, 2**31, 2**63, 10**12, 10**30, 0.0, 0.25, 1e-5, 1e308, math.nan,
       math.inf, None, True, False, "", "gelu", "gpt_neox", "default", "linear", "F32", "F16", "I64", [], {},
       [0, 8], [16], [2**62, 4]]


def scatter(draw, st, content, counts):
    """Replaces as many bytes of `content` as one of `counts` says."""
    for _ in range(draw(st.sampled_from(counts))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))


def mutated(draw, st, odd, fields):
    """JSON of `fields` (a dict) with up to three of its values, and of its bytes, replaced by odd ones."""
    fields = copy.deepcopy(fields)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 1, 2, 3]))):
        place = fields
        key = draw(st.sampled_from(sorted(place)))
        while isinstance(place[key], dict) and place[key] and draw(st.booleans()):
            place = place[key]
            key = draw(st.sampled_from(sorted(place)))
        place[key] = draw(odd)
    content = bytearray(json.dumps(fields), "utf-8", "surrogatepass")
    scatter(draw, st, content, [0] * 9 + [1, 2, 3])
    return bytes(content)


@helpers.on_linux
@pytest.mark.parametrize(("what", "examples"), [("config.json", 1500), ("model.safetensors", 750)])
def test_fuzz(what, examples, tmp_path):
    """Each damaged file ends in one Refused sentence or in a model that runs, and in little memory. Any other
    exception fails the test, with the smallest edit that raises it."""
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: see requirements.txt")
    from hypothesis import strategies as st
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=32,
        max_position_embeddings=64, eos_token_id=0)).save_pretrained(tmp_path)
    good, is_config = (tmp_path / what).read_bytes(), what == "config.json"
    size = int.from_bytes(good[:8], "little")  # of the header
    fields = json.loads(good if is_config else good[8:8 + size])
    nested = st.recursive(st.integers(-9, 99), lambda inner: st.lists(inner, max_size=3)
                          | st.dictionaries(st.text(), inner, max_size=3))
    odd = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=9) | nested
    seen = {"run": 0, "refused": 0, "no advice": 0}

    def load():
        if not is_config:
            return Pythia.from_pretrained(tmp_path)
        config = Config.from_pretrained(tmp_path)  # a large one takes large files
        return Pythia.random(config) if config.weights < 10**6 else None

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.data())
    def fuzz(data):
        content = mutated(data.draw, st, odd, fields)
        if not is_config:
            length = data.draw(st.sampled_from([len(content)] * 8 + [0, size, 2**31, 2**63, 2**64 - 1]))
            weights = bytearray(good[8 + size:])
            scatter(data.draw, st, weights, range(5))
            content = length.to_bytes(8, "little") + content + weights
        (tmp_path / what).write_bytes(content)
        try:
            model = load()
            list(model.generate([0], 2) if model else [])
            seen["run"] += 1
        except Refused as refusal:
            seen["refused"] += 1
            seen["no advice"] += not re.search(r": (take|fetch|check|give|leave) [^:]+$", str(refusal))
    load()
    memory = helpers.grown(fuzz) / 2**20
    few = min(seen["run"], seen["refused"])
    report("fuzz", f"{what}: {seen['refused']} refused, {seen['run']} run; 2 % / fewer",
           examples / 50 / few if few else math.inf, 1)
    report("fuzz", f"{what}: refusals that do not end with what to do", seen["no advice"])
    report("fuzz", f"{what}: MiB of memory at most", memory, 512)


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


@pytest.fixture(scope="module", autouse=True)
def hub_runs(request, tmp_path_factory):
    """{case: (words, process)} of test_hub_refusals; begun before this file's tests, as one takes long."""
    if "test_hub_refusals" not in [item.name for item in request.session.items]:
        return None
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), MissingOnHub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    here, model = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}, "EleutherAI/pythia-70m"
    cases = {
        "unknown revision": ([model, "--revision", "step7"], here, [model, "no revision 'step7'"]),
        "unknown model": (["EleutherAI/python-70m"], here, ["python-70m", "neither"]),
        "offline": ([model], {"HF_HUB_OFFLINE": "1"}, ["pythia-70m", "network"]),
        "no network": ([model], {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["pythia-70m", "network"]),
    }
    home = tmp_path_factory.mktemp
    return {case: (words, helpers.command("--model", *argv, HF_HOME=str(home("home")), **env))
            for case, (argv, env, words) in cases.items()}


def test_hub_refusals(hub_runs):
    for case, (words, process) in hub_runs.items():
        report_refusal(case, words, process.communicate(timeout=120)[1], process.returncode)
