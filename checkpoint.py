"""Reading a checkpoint from a folder or the Hugging Face Hub: its files, fields and tensors.

Every refusal about files stands here. This file knows nothing of the model but the names in its files.
"""
import functools
import json
import os
import re
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_ELEMENTS = 10**11  # weights, and keys and values of a full context: eight times pythia-12b's


class Refused(ValueError):
    """What was asked for cannot be done. The message tells the user, in one line, why and what to do."""

    def __init__(self, message):  # it may quote names in a file, which may hold line ends
        super().__init__("".join(c if c.isprintable() else " " for c in message))


def loading(read):
    """A decorator: whatever `read(path)` raises over the file or folder `path` becomes Refused."""
    @functools.wraps(read)
    def reading(path, **kw):
        try:
            return read(path, **kw)
        except Refused:
            raise
        except Exception as error:  # over a damaged file, readers raise nearly every type there is
            if out_of_memory(error):
                raise Refused(f"the memory is too small to read {path}: take a smaller model") from error
            # torch's own advice is to run the code in such a file
            cause = "it is not a file of tensors" if "weights_only" in str(error) else first_line(error)
            raise Refused(f"{path} cannot be read ({cause}): fetch it again, or git lfs pull") from error
    return reading


def fetch(name, revision=None, weights=True):
    """The folder of a checkpoint: `name`, or a folder of the Hub's cache, which gets the files that it lacks.

    Without `weights` these are the configs alone. Without a network the cache has to do. Raises Refused.
    """
    if os.path.isfile(name):
        raise Refused(f"{name} is a file: give the folder of config.json and weights (of a .gguf, the model "
                      "that it was made from)")
    if os.path.isdir(name):
        if revision is not None:
            raise Refused(f"{name} is a folder, which has no revision {revision!r}: leave it out")
        return name
    from huggingface_hub import HfApi, errors, snapshot_download
    failure = None
    try:
        HfApi().model_info(str(name), revision=revision, timeout=10)  # what follows would wait without an end
    except Exception as error:  # noqa: BLE001 (no network, or no such model: the cache may have it)
        failure = error
    snapshot = functools.partial(snapshot_download, str(name), revision=revision, ignore_patterns="*/*",
                                 local_files_only=failure is not None)
    files = ["*.json", "*.txt", "*.model", "*.safetensors"] if weights else ["*config.json"]
    try:
        folder = snapshot(allow_patterns=files)
        if weights and not any(Path(folder).glob("model.safetensors*")):
            snapshot(allow_patterns="pytorch_model*")
        return folder
    except Exception as error:
        if folder := getattr(error, "snapshot_path", None):  # no network, and some files are lacking
            return folder
        error = failure or error
        if isinstance(error, errors.RevisionNotFoundError):
            fault = f"has no revision {revision!r}: leave it out, or take one such as step3000"
        elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            fault = ("is neither a folder nor a model on the Hub: give a folder, or a name such as "
                     "EleutherAI/pythia-70m")
        else:
            fault = (f"is no folder, its revision {revision or 'main'!r} is not downloaded, and cannot be "
                     f"({first_line(error)}): check the network, and the disk of HF_HOME")
        raise Refused(f"{name} {fault}") from error


@loading
def read_config(folder):
    """The fields of model.Config, {name: value}, that the files of a checkpoint give.

    Raises Refused with the first field that this model cannot run.
    """
    from transformers import GPTNeoXConfig  # slow to import, not always needed
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise Refused(f"{folder} has no config.json: give the folder of a whole model, not of an adapter (in "
                      "the Hub's cache, one below snapshots)")
    given = GPTNeoXConfig.get_config_dict(folder)[0]
    # transformers reads all spellings of these, and acts on nothing else here, such as sizes of tables
    spellings = ("rope_parameters", "rope_scaling", "rotary_pct", "rotary_emb_base")
    default = GPTNeoXConfig(**{key: given[key] for key in spellings if key in given})
    rope = dict(default.rope_parameters)
    fields = default.to_dict() | {"model_type": None, "is_causal": True} | given
    fields["rope_type"] = rope["rope_type"]

    def refuse(says, runs):
        raise Refused(f"config.json says {says}, but this model runs only {runs}: take a Pythia checkpoint")

    def number(field, least, most, value=None, kind=int):
        value = fields.get(field) if value is None else value
        if type(value) not in (int, kind) or not least <= value <= most:
            refuse(f"{field} = {value!r:.80}", f"{least} to {most} ({kind.__name__})")
        return value
    for field, runs in {"model_type": "gpt_neox", "use_parallel_residual": True, "hidden_act": "gelu",
                        "tie_word_embeddings": False, "attention_bias": True, "is_causal": True,
                        "rope_type": "default"}.items():
        if fields[field] != runs:
            refuse(f"{field} = {fields[field]!r:.80}", repr(runs))
    L, C = number("num_hidden_layers", 1, 1000), number("hidden_size", 1, 2**17)
    NH, F = number("num_attention_heads", 1, C), number("intermediate_size", 1, 2**20)
    V, context = number("vocab_size", 1, 2**24), number("max_position_embeddings", 1, 2**20)
    if C % NH:
        refuse(f"hidden_size = {C} and num_attention_heads = {NH}", "heads of equal size")
    if (head := fields.get("head_dim") or C // NH) != C // NH:
        refuse(f"head_dim = {head!r:.80}", f"hidden_size / num_attention_heads, {C // NH}")
    rotary_pct = number("rotary_pct", 0, 1, rope["partial_rotary_factor"], float)
    rotary_dims = int(C // NH * rotary_pct)
    if rotary_dims < 2 or rotary_dims % 2:
        refuse(f"rotary_pct = {rotary_pct}, {rotary_dims} of {C // NH} dimensions", "pairs of dimensions")
    try:                                       # as transformers' generate() takes the ends of a text
        generation = json.loads(Path(folder, "generation_config.json").read_bytes())
    except (OSError, ValueError):
        generation = given
    for source in (given, generation):
        eos = source.get("eos_token_id")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        eos = tuple(number("eos_token_id", 0, 2**63 - 1, token) for token in eos)
    config = {"n_layer": L, "n_head": NH, "hidden": C, "mlp": F, "vocab": V, "rotary_dims": rotary_dims,
              "context": context, "eps": number("layer_norm_eps", 1e-12, 1, kind=float),
              "rope_theta": number("rope_theta", 1, 1e12, rope["rope_theta"], float), "eos": eos}
    elements = 2 * V * C + L * (4 * C * C + 2 * C * F) + 2 * L * C * context
    if elements > MOST_ELEMENTS:
        refuse(f"num_hidden_layers = {L}, hidden_size = {C}, intermediate_size = {F}, vocab_size = {V}, "
               f"max_position_embeddings = {context}, together {elements:.2g} weights, keys and values",
               f"up to {MOST_ELEMENTS:.2g}")
    return config


@loading
def read_tensors(folder):
    """A checkpoint's tensors {name: w}, on the CPU: mapped from the disk, but for old forms of .bin.

    Names are those of today's GPTNeoXForCausalLM. Raises Refused for tensors that are not floating-point.
    """
    from transformers.modeling_utils import load_state_dict
    for file in ("model.safetensors", "model.safetensors.index.json",          # transformers' own order
                 "pytorch_model.bin", "pytorch_model.bin.index.json"):
        if os.path.exists(path := os.path.join(folder, file)):
            break
    else:
        raise FileNotFoundError("it has neither model.safetensors nor pytorch_model.bin")
    parts = set(json.loads(Path(path).read_bytes())["weight_map"].values()) if "index" in file else {file}
    unused = ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"  # in files of 2023
    inner = "embed_in.", "layers.", "final_layer_norm."  # as the model without its head is saved
    weights, places = {}, set()
    for path in (os.path.join(folder, part) for part in sorted(parts)):
        for key, w in loading(load_state_dict)(path).items():
            if key.endswith(unused):
                continue
            if not w.is_floating_point() or w.dtype == torch.float4_e2m1fn_x2:  # which torch cannot convert
                raise Refused(f"{path} has {key} in {w.dtype}, as quantised checkpoints do: take one in "
                              f"{', '.join(DTYPES)}")
            if (size := 0 if w.is_meta else w.untyped_storage().nbytes()) < w.nbytes:
                raise Refused(f"{path} has {key} of {w.nbytes} bytes, but stores only {size} of them: fetch "
                              "it again")
            if w.data_ptr() in places:                        # one of two would be transposed with the other
                w = w.clone()
            places.add(w.data_ptr())
            weights["gpt_neox." * key.startswith(inner) + key] = w.detach().contiguous()
    if "embed_out.weight" in weights:                         # the older name, which transformers prefers
        weights["lm_head.weight"] = weights.pop("embed_out.weight")
    return weights


def out_of_memory(error):
    """Whether memory was lacking, which libraries say in many ways."""
    words = r"(allocate|enough|out of) memory|os error 12|failed to map segment"
    return isinstance(error, MemoryError) or re.search(words, str(error), re.IGNORECASE) is not None


def first_line(error):
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
