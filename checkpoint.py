"""Reading a checkpoint from a folder or the Hugging Face Hub: the fields of its config.json and its tensors.

Every refusal about files stands here. This file knows nothing of the model but the names in its files.
"""
import os
from contextlib import contextmanager

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_ELEMENTS = 10**11  # weights, and keys and values of a full context: eight times pythia-12b's


class Refused(ValueError):
    """What was asked for cannot be done. The message tells the user, in one line, why and what to do."""

    def __init__(self, message):  # it may quote names in a file, which may hold line ends
        super().__init__("".join(c if c.isprintable() else " " for c in message))


def read_config(name, revision):
    """The fields of model.Config, {name: value}, that a checkpoint's config.json gives.

    Raises Refused with the first field that this model cannot run.
    """
    from transformers import GPTNeoXConfig  # slow to import, not always needed
    fields = GPTNeoXConfig.get_config_dict(name, revision=revision)[0]
    # transformers reads all spellings of these, and acts on nothing else in the file, such as sizes of tables
    spellings = ("rope_parameters", "rope_scaling", "rotary_pct", "rotary_emb_base")
    rope = GPTNeoXConfig(**{key: fields[key] for key in spellings if key in fields}).rope_parameters

    def refuse(says, runs):
        raise Refused(f"config.json says {says}, but this model runs only {runs}: take a Pythia checkpoint")

    def number(field, least, most, value=None, kind=int):
        value = fields.get(field) if value is None else value
        if type(value) not in (int, kind) or not least <= value <= most:
            refuse(f"{field} = {value!r:.80}", f"{least} to {most} ({kind.__name__})")
        return value
    needed = {"model_type": "gpt_neox", "use_parallel_residual": True, "hidden_act": "gelu",
              "tie_word_embeddings": False, "attention_bias": True, "rope_type": "default"}
    given = needed | {"model_type": None} | fields | {"rope_type": rope["rope_type"]}
    for field, runs in needed.items():
        if given[field] != runs:
            refuse(f"{field} = {given[field]!r:.80}", repr(runs))
    L, C = number("num_hidden_layers", 1, 1000), number("hidden_size", 1, 2**17)
    NH, F = number("num_attention_heads", 1, C), number("intermediate_size", 1, 2**20)
    V, context = number("vocab_size", 1, 2**24), number("max_position_embeddings", 1, 2**20)
    if C % NH:
        refuse(f"hidden_size = {C} and num_attention_heads = {NH}", "heads of equal size")
    rotary_pct = number("rotary_pct", 0, 1, rope["partial_rotary_factor"], float)
    rotary_dims = int(C // NH * rotary_pct)
    if rotary_dims < 2 or rotary_dims % 2:
        refuse(f"rotary_pct = {rotary_pct}, {rotary_dims} of {C // NH} dimensions", "pairs of dimensions")
    eos = fields.get("eos_token_id", 0)
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    config = {"n_layer": L, "n_head": NH, "hidden": C, "mlp": F, "vocab": V, "rotary_dims": rotary_dims,
              "context": context, "eps": number("layer_norm_eps", 1e-12, 1, kind=float),
              "rope_theta": number("rope_theta", 1, 1e12, rope["rope_theta"], float),
              "eos": tuple(number("eos_token_id", 0, 2**63 - 1, token) for token in eos)}
    elements = 2 * V * C + L * (4 * C * C + 2 * C * F) + 2 * L * C * context
    if elements > MOST_ELEMENTS:
        refuse(f"num_hidden_layers = {L}, hidden_size = {C}, intermediate_size = {F}, vocab_size = {V}, "
               f"max_position_embeddings = {context}, together {elements:.2g} weights, keys and values",
               f"up to {MOST_ELEMENTS:.2g}")
    return config


def read_tensors(name, revision, least):
    """A checkpoint's tensors {name: w}, on the CPU: mapped from the disk, but for old forms of .bin.

    Raises Refused for tensors that are not floating-point, and for files that hold fewer than `least` weights.
    """
    from transformers.modeling_utils import load_state_dict
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files
    for file in ("model.safetensors", "model.safetensors.index.json",          # transformers' own order
                 "pytorch_model.bin", "pytorch_model.bin.index.json"):
        if path := cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False):
            break
    else:
        raise FileNotFoundError("it has neither model.safetensors nor pytorch_model.bin")
    unused = ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"  # in files of 2023
    weights, places = {}, set()
    for part in get_checkpoint_shard_files(name, path, revision=revision)[0] if "index" in file else [path]:
        for key, w in load_state_dict(part, map_location="cpu").items():
            if key.endswith(unused):
                continue
            if not w.is_floating_point() or w.dtype == torch.float4_e2m1fn_x2:  # which torch cannot convert
                raise Refused(f"{name} has {key} in {w.dtype}: take a checkpoint in {', '.join(DTYPES)}")
            if (size := 0 if w.is_meta else w.untyped_storage().nbytes()) < w.nbytes:
                raise Refused(f"{name} has {key} of {w.nbytes} bytes, but stores only {size} of them: fetch "
                              "its files again")
            if w.data_ptr() in places:                        # one of two would be transposed with the other
                w = w.clone()
            places.add(w.data_ptr())
            weights["lm_head.weight" if key == "embed_out.weight" else key] = w.detach().contiguous()
    stored = sum(w.numel() for w in weights.values())
    if stored < least:
        raise Refused(f"{name} has files with {stored} weights, far fewer than its config.json asks for: fetch "
                      "its files again")
    return weights


@contextmanager
def loading(name, revision):
    """Turns whatever is raised over a checkpoint's files into Refused."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:  # over a damaged file, readers raise nearly every type there is
        cause = type(error.__cause__ or error).__name__
        if os.path.isdir(name):
            sentence = f"the checkpoint in {name} cannot be read ({first_line(error)}): fetch it again"
        elif "Revision" in cause or "not a valid git identifier" in str(error):
            sentence = f"{name} has no revision {revision!r}: leave it out, or take one such as step3000"
        elif "LocalEntry" in cause or "Offline" in cause or "Connection" in cause:
            sentence = (f"{name} is neither a folder nor downloaded before, and the Hub cannot be reached: "
                        "check the network, or give a folder")
        elif "Repo" in cause or "HFValidation" in cause or "Gated" in cause:
            sentence = (f"{name} is neither a folder nor a model on the Hub: "
                        "give a folder, or a name such as EleutherAI/pythia-70m")
        else:
            sentence = f"{name} cannot be loaded ({first_line(error)}): check the name, or fetch it again"
        raise Refused(sentence) from error


def first_line(error):
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
