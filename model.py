"""Pythia in plain PyTorch: the definition of the model, and the reference the fused kernel is compared with.

Pythia (arXiv 2304.01373) is GPT-NeoX (arXiv 2204.06745) in ten sizes. Its block is parallel: attention and
MLP both read the block's input x, and both are added to it:

    y = x + attn(LN1(x)) + mlp(LN2(x))

Symbols, here and in the kernel: C hidden size, NH heads, HS = C / NH head size, F = 4 C MLP width,
V vocabulary, L layers, B batch, T tokens, R rotary dimensions of a head. Every matrix is stored as rows of
length C (two of a block's four are transposed while loading), so that one copy of the weights serves
this file and the kernel.
"""
import ctypes
import json
import math
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {  # name: (L, C, NH, V); in all ten F = 4 C, R = HS / 4, and there are 2048 positions
    "pythia-14m": (6, 128, 4, 50304),
    "pythia-31m": (6, 256, 8, 50304),
    "pythia-70m": (6, 512, 8, 50304),
    "pythia-160m": (12, 768, 12, 50304),
    "pythia-410m": (24, 1024, 16, 50304),
    "pythia-1b": (16, 2048, 8, 50304),
    "pythia-1.4b": (24, 2048, 16, 50304),
    "pythia-2.8b": (32, 2560, 32, 50304),
    "pythia-6.9b": (32, 4096, 32, 50432),
    "pythia-12b": (36, 5120, 40, 50688),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_ELEMENTS = 10**11  # weights, and keys and values of a full context: eight times pythia-12b's


class Refused(ValueError):
    """What was asked for cannot be done. The message tells the user, in one line, why and what to do."""

    def __init__(self, message):  # it may quote names in a file, which may hold line ends
        super().__init__("".join(c if c.isprintable() else " " for c in message))


@dataclass(frozen=True)
class Config:
    """The shape of a model: counts of layers, heads, elements, and for `context` positions."""
    n_layer: int
    n_head: int
    hidden: int
    mlp: int
    vocab: int
    rotary_dims: int
    context: int = 2048
    rope_theta: float = 10000.0
    eps: float = 1e-5
    eos: tuple[int, ...] = (0,)  # tokens that end a text

    @property
    def head_size(self):
        return self.hidden // self.n_head

    @property
    def weights(self):
        """How many weights the matrices have; LayerNorms and biases are few."""
        C = self.hidden
        return 2 * self.vocab * C + self.n_layer * (4 * C * C + 2 * C * self.mlp)

    @classmethod
    def from_name(cls, name):
        """The Config of one of SIZES; "EleutherAI/" before and "-deduped" after the name change nothing."""
        size = name.removeprefix("EleutherAI/").removesuffix("-deduped")
        if size not in SIZES:
            raise Refused(f"no Pythia size is called {name!r}: take one of {', '.join(SIZES)}")
        L, C, NH, V = SIZES[size]
        return cls(n_layer=L, n_head=NH, hidden=C, mlp=4 * C, vocab=V, rotary_dims=C // NH // 4)

    @classmethod
    def from_pretrained(cls, name_or_folder, revision=None):
        """The Config of a checkpoint on the Hugging Face Hub or in a folder; Refused as by Pythia's."""
        if revision is not None and os.path.isdir(name_or_folder):
            raise Refused(f"{name_or_folder} is a folder and has no revision {revision!r}: leave it out")
        with loading(name_or_folder, revision):
            return read_config(name_or_folder, revision)

    def to_transformers(self):
        """The GPTNeoXConfig of the same model."""
        from transformers import GPTNeoXConfig
        return GPTNeoXConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.n_layer,
            num_attention_heads=self.n_head, intermediate_size=self.mlp, max_position_embeddings=self.context,
            layer_norm_eps=self.eps, eos_token_id=list(self.eos), rope_parameters={
                "rope_type": "default", "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_dims / self.head_size})


class Block(nn.Module):
    """One layer."""

    def __init__(self, config, tensor, rope_cos, rope_sin):
        """`tensor` as Pythia's, for names within the layer; `rope_cos` and `rope_sin` [context, R/2] fp32."""
        super().__init__()
        self.config = config
        C, F = config.hidden, config.mlp
        self.ln1_w = tensor("input_layernorm.weight", C)
        self.ln1_b = tensor("input_layernorm.bias", C)
        self.ln2_w = tensor("post_attention_layernorm.weight", C)
        self.ln2_b = tensor("post_attention_layernorm.bias", C)
        self.w_qkv = tensor("attention.query_key_value.weight", 3 * C, C)         # rows: NH x (q, k, v) x HS
        self.b_qkv = tensor("attention.query_key_value.bias", 3 * C)
        self.w_out = tensor("attention.dense.weight", C, C, transposed=True)      # row: what o[h, d] adds
        self.b_out = tensor("attention.dense.bias", C)
        self.w_up = tensor("mlp.dense_h_to_4h.weight", F, C)                      # row: makes hidden unit j
        self.b_up = tensor("mlp.dense_h_to_4h.bias", F)
        self.w_down = tensor("mlp.dense_4h_to_h.weight", F, C, transposed=True)   # row: what unit j adds
        self.b_down = tensor("mlp.dense_4h_to_h.bias", C)
        self.register_buffer("rope_cos", rope_cos, persistent=False)              # shared by all layers
        self.register_buffer("rope_sin", rope_sin, persistent=False)

    def forward(self, x, cache_kv=None, pos=0):
        """y [B, T, C] from x [B, T, C], whose tokens stand at positions pos..pos+T-1.

        `cache_kv` [2, B, NH, context, HS] holds keys and values of positions 0..pos-1 and gets the new ones.
        """
        C, eps = self.config.hidden, self.config.eps
        attn = self.attend(F.layer_norm(x, (C,), self.ln1_w, self.ln1_b, eps), cache_kv, pos)
        hidden = F.linear(F.layer_norm(x, (C,), self.ln2_w, self.ln2_b, eps), self.w_up, self.b_up)
        mlp = F.linear(F.gelu(hidden), self.w_down.T, self.b_down)                # [B, T, F] -> [B, T, C]
        return x + (attn + mlp)                                                   # rounds once at x's size

    def attend(self, x, cache_kv, pos):
        (B, T, C), NH, HS = x.shape, self.config.n_head, self.config.head_size
        qkv = F.linear(x, self.w_qkv, self.b_qkv).view(B, T, NH, 3, HS)
        self.rotate(qkv[:, :, :, :2], pos)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)                                      # each [B, NH, T, HS]
        if cache_kv is not None:
            cache_kv[0, :, :, pos:pos + T] = k
            cache_kv[1, :, :, pos:pos + T] = v
            k, v = cache_kv[:, :, :, :pos + T]                                    # each [B, NH, pos+T, HS]
        mask = None
        if T > 1 and pos > 0:                                                     # query t sees keys 0..pos+t
            mask = torch.ones(T, pos + T, dtype=torch.bool, device=x.device).tril(pos)
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1 and pos == 0)  # scale HS**-0.5
        return F.linear(o.transpose(1, 2).reshape(B, T, C), self.w_out.T, self.b_out)

    def rotate(self, qk, pos):
        """RoPE (arXiv 2104.09864) in place, on the first R of HS dimensions of qk [B, T, NH, 2, HS]."""
        T, R = qk.shape[1], self.config.rotary_dims
        cos = self.rope_cos[pos:pos + T, None, None]                              # [T, 1, 1, R/2] fp32
        sin = self.rope_sin[pos:pos + T, None, None]
        a, b = qk[..., :R].to(cos.dtype).chunk(2, dim=-1)                         # pairs (i, i + R/2)
        qk[..., :R] = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Pythia(nn.Module):
    """The whole model, made by `Pythia.from_pretrained` or `Pythia.random`."""

    def __init__(self, config, tensor):
        """`tensor(name, *shape, transposed=False)` supplies a weight under its name in the checkpoint."""
        super().__init__()
        self.config = config
        C, V = config.hidden, config.vocab
        self.embed_in = tensor("gpt_neox.embed_in.weight", V, C)
        # RoPE (arXiv 2104.09864): at position p, pair i of dimensions turns by the angle p * theta**(-2i/R)
        position = torch.arange(config.context, dtype=torch.float32, device=self.embed_in.device)
        pair = torch.arange(0, config.rotary_dims, 2, dtype=torch.float32, device=self.embed_in.device)
        angle = torch.outer(position, 1.0 / config.rope_theta ** (pair / config.rotary_dims))
        self.register_buffer("rope_cos", angle.cos(), persistent=False)           # [context, R/2] fp32
        self.register_buffer("rope_sin", angle.sin(), persistent=False)
        self.blocks = nn.ModuleList()
        for i in range(config.n_layer):
            def layer_tensor(name, *shape, i=i, **kw):
                return tensor(f"gpt_neox.layers.{i}.{name}", *shape, **kw)
            self.blocks.append(Block(config, layer_tensor, self.rope_cos, self.rope_sin))
        self.lnf_w = tensor("gpt_neox.final_layer_norm.weight", C)
        self.lnf_b = tensor("gpt_neox.final_layer_norm.bias", C)
        self.embed_out = tensor("lm_head.weight", V, C)

    def forward(self, tokens, cache=None, pos=0):
        """Logits [B, T, V] for tokens [B, T] int64 at positions pos..pos+T-1.

        With a `cache` from `new_cache`, which gets their keys and values, they see what it holds before pos;
        without one, only each other. Raises Refused past the last position.
        """
        return F.linear(self.body(tokens, cache, pos), self.embed_out)

    def body(self, tokens, cache, pos):
        """All but the LM head: the final LayerNorm's output [B, T, C]."""
        last = pos + tokens.shape[1] - 1
        if last >= self.config.context:
            raise Refused(f"position {last} is past the last of {self.config.context} positions: "
                          "shorten the prompt or ask for fewer tokens")
        x = F.embedding(tokens, self.embed_in)                                    # [B, T, C]
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], pos)
        return F.layer_norm(x, (self.config.hidden,), self.lnf_w, self.lnf_b, self.config.eps)

    def new_cache(self, batch=1):
        """A key/value cache [L, 2, B, NH, context, HS]. Rows are written before they are read."""
        c = self.config
        return torch.empty(c.n_layer, 2, batch, c.n_head, c.context, c.head_size,
                           dtype=self.embed_in.dtype, device=self.embed_in.device)

    def generate(self, tokens, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None,
                 fused=False, graph=True):
        """Yields up to `max_new_tokens` ids (ints) that continue `tokens` (list or 1-D tensor), as they come.

        `temperature` 0 takes the likeliest token; above 0 draws from softmax(logits / temperature), cut to
        the `top_k` likeliest tokens and then to the fewest that hold probability `top_p`. `seed` repeats the
        draws on the same kind of device. The text ends early with a token of `config.eos`, which is yielded,
        or after the last position. With `fused`, tokens come `Fused.TOKENS` at a time at temperature 0, and
        `graph` matters. Raises Refused, before any work, for arguments that cannot be.
        """
        c, tokens = self.config, torch.as_tensor(tokens, dtype=torch.int64)
        if tokens.ndim != 1:
            raise Refused(f"the prompt has shape {list(tokens.shape)}: give one sequence of tokens")
        if len(tokens) == 0:
            raise Refused("the prompt is empty: give at least one token")
        if len(tokens) > c.context:
            raise Refused(f"the prompt has {len(tokens)} tokens, the context only {c.context}: shorten it")
        if tokens.min() < 0 or tokens.max() >= c.vocab:
            raise Refused(f"the prompt holds {int(tokens.min())} to {int(tokens.max())}, the vocabulary only "
                          f"0 to {c.vocab - 1}: use the tokenizer that belongs to the model")
        if max_new_tokens < 0:
            raise Refused(f"{max_new_tokens} new tokens cannot be made: ask for 0 or more")
        check_seed(seed)
        rng = torch.Generator(self.embed_in.device)
        rng.seed() if seed is None else rng.manual_seed(seed)
        sampler = Sampler(temperature, top_k, top_p, rng)
        steps = min(max_new_tokens, c.context - len(tokens) + 1)
        fused = self.fuse(graph=graph) if fused else None
        return self.decode(tokens.to(self.embed_in.device), steps, sampler, fused)

    def decode(self, tokens, steps, sampler, fused):
        """What `choices` yields, up to the token that ends a text; Refused at logits that are not finite."""
        for token in self.choices(tokens, steps, sampler, fused):
            if token < 0:
                raise Refused(f"the logits are not finite in {self.embed_out.dtype}: take dtype float32 or "
                              "bfloat16, without fused")
            yield token
            if token in self.config.eos:
                return

    @torch.inference_mode()
    def choices(self, tokens, steps, sampler, fused):
        """Yields `steps` tokens (ints) that follow `tokens` [T]; the first pass reads all of these."""
        cache, pos = fused.cache if fused else self.new_cache(), 0
        for _ in range(steps):
            x = self.body(tokens[None], cache, pos)[:, -1:]
            pos += len(tokens)
            tokens = sampler(F.linear(x, self.embed_out)[0, 0]).view(1)           # from logits [V]
            yield int(tokens)
            if fused:
                yield from fused.decode(tokens, pos, steps - 1, sampler)
                return

    @classmethod
    def from_pretrained(cls, name_or_folder, revision=None, dtype=torch.float32, device="cpu"):
        """A checkpoint from the Hugging Face Hub ("EleutherAI/pythia-70m", revision="step3000") or a folder.

        The files are safetensors or .bin, whole or sharded. Raises Refused where they cannot be had, or are
        not exactly this model.
        """
        from transformers.utils import logging
        check_device(dtype, device)
        config = Config.from_pretrained(name_or_folder, revision)
        with loading(name_or_folder, revision):
            weights = read_files(name_or_folder, revision, config)

        def refuse(fault):
            raise Refused(f"{name_or_folder} {fault}: fetch its files again, or take a Pythia checkpoint")

        def tensor(name, *shape, transposed=False):
            """Takes one weight away from what was read, so that all weights never exist twice."""
            if name not in weights:
                refuse(f"lacks {name}")
            w, asked = weights.pop(name), shape[::-1] if transposed else shape
            if w.shape != asked:
                refuse(f"has {name} of shape {list(w.shape)}, but its config.json asks for {list(asked)}")
            w = w.to(device, dtype)
            if not torch.stack(w.aminmax()).isfinite().all():                     # aminmax passes NaN on
                raise Refused(f"{name_or_folder} has NaN or Inf in {name}, read as {dtype}: take dtype "
                              "float32 or bfloat16, or fetch its files again")
            if transposed:  # in the same memory, which for a file that is mapped are its (private) pages
                w = w.view(shape).copy_(w.T.contiguous())
            bar.update()
            return nn.Parameter(w, requires_grad=False)
        with logging.tqdm(total=len(weights), desc=f"Moving weights to {device}") as bar:
            model = cls(config, tensor)
        if names := sorted(weights):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            refuse(f"has tensors this model does not use: {', '.join(names[:3])}{more}")
        return model

    @classmethod
    def random(cls, name, seed=0, dtype=torch.float32, device="cpu"):
        """A model of the shape `name` (one of SIZES, or a Config) with random weights made on the device.

        They are as hard on arithmetic as trained ones: LayerNorm gains around 1, biases that are not 0, four
        channels of the residual stream far larger than the rest. Seed, dtype and kind of device fix them.
        """
        check_device(dtype, device)
        check_seed(seed)
        config = name if isinstance(name, Config) else Config.from_name(name)
        rng = torch.Generator(device).manual_seed(seed)
        outliers = torch.randperm(config.hidden, generator=rng, device=device)[:4]

        def tensor(name, *shape, transposed=False):
            w = torch.empty(shape, dtype=dtype, device=device)
            if name.endswith("bias"):
                w.normal_(0, 0.1, generator=rng)
            elif len(shape) == 1:
                w.uniform_(0.4, 1.6, generator=rng)
            elif name.endswith("embed_in.weight"):
                w.normal_(0, 1, generator=rng)
                w[:, outliers] *= 10
            elif transposed:  # [inputs, outputs] into the residual stream, whose size must not grow with L
                w.normal_(0, (shape[0] * 2 * config.n_layer) ** -0.5, generator=rng)
                w[:, outliers] *= 10
            else:             # [outputs, inputs]
                w.normal_(0, shape[1] ** -0.5, generator=rng)
            return nn.Parameter(w, requires_grad=False)
        return cls(config, tensor)

    def fuse(self, cache=None, graph=True, source=None, **tuning):
        """A `Fused` decoder of this model; compiles the kernel the first time.

        `cache` (from `new_cache`) is shared with the reference, so that either can go on where the other
        stopped. `graph` replays a captured CUDA graph; `tuning`: arguments of build.constants. Raises Refused
        where the kernel cannot run.
        """
        return Fused(self, cache, graph, source, tuning)


@dataclass
class Sampler:
    """Chooses tokens as `Pythia.generate` says, on the device of the logits, and does not wait for it."""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    rng: torch.Generator | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise Refused(f"temperature {self.temperature} is not possible: take 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise Refused(f"top-k {self.top_k} leaves no token: take 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise Refused(f"top-p {self.top_p} is not a probability that leaves a token: "
                          "take more than 0, at most 1")

    def __call__(self, logits):
        """A token (0-d int64) from logits [V]; -1 where they are not finite."""
        best, token = logits.max(-1)                                              # the first of equals
        if self.temperature > 0:
            logits = (logits.float() - best) / self.temperature                   # 0 and less: none overflows
            logits, order = logits.sort(descending=True, stable=True)
            probs = logits[:self.top_k].nan_to_num().softmax(-1)
            if self.top_p:
                probs = probs.where(probs.cumsum(-1) - probs < self.top_p, 0)     # likelier ones hold top_p
            # which of exponential clocks with these rates rings first; torch.multinomial waits for the device
            token = order.take((probs / torch.empty_like(probs).exponential_(generator=self.rng)).argmax())
        return token.where(best.isfinite(), -1)


def check_seed(seed):
    """Refuses a seed that torch's generators do not take; None stands for any."""
    if seed is not None and not -2**63 <= seed < 2**64:
        raise Refused(f"seed {seed} is not possible: take one from -2**63 to 2**64 - 1")


def read_config(name, revision):
    """The Config of a checkpoint. Raises Refused with the first field of its config.json that cannot be."""
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
    config = Config(n_layer=L, n_head=NH, hidden=C, mlp=F, vocab=V, rotary_dims=rotary_dims, context=context,
                    rope_theta=number("rope_theta", 1, 1e12, rope["rope_theta"], float),
                    eps=number("layer_norm_eps", 1e-12, 1, kind=float),
                    eos=tuple(number("eos_token_id", 0, 2**63 - 1, token) for token in eos))
    if (elements := config.weights + 2 * L * C * context) > MOST_ELEMENTS:
        refuse(f"num_hidden_layers = {L}, hidden_size = {C}, intermediate_size = {F}, vocab_size = {V}, "
               f"max_position_embeddings = {context}, together {elements:.2g} weights, keys and values",
               f"up to {MOST_ELEMENTS:.2g}")
    return config


def read_files(name, revision, config):
    """A checkpoint's tensors {name: w}, on the CPU: mapped from the disk, but for old forms of .bin.

    Raises Refused for tensors that are not floating-point, and for files cut off or too small for `config`.
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
        if part.endswith(".safetensors"):
            check_length(name, part)
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
    if config.weights > 2 * stored:                                            # else what is wrong has a name
        raise Refused(f"{name} has files with {stored} weights, but its config.json asks for "
                      f"{config.weights}: fetch its files again")
    return weights


def check_length(name, path):
    """Refuses a .safetensors file that ends before its header says, and names a tensor that is cut.

    The file (github.com/huggingface/safetensors, "Format"): 8 bytes, little-endian, the header's length in
    bytes; the header, JSON {tensor: {"data_offsets": [begin, end], ...}}; the bytes that the offsets count.
    """
    cut = None
    with open(path, "rb") as file, suppress(Exception):  # a header of another form: safetensors refuses it
        length = int.from_bytes(file.read(8), "little")
        held = os.path.getsize(path) - 8 - length
        if held < 0:
            cut = "its header"
        else:
            header = json.loads(file.read(min(length, 10**7)))                 # 1000 layers take 2 MB
            header.pop("__metadata__", None)
            cut = next((tensor for tensor, entry in header.items() if entry["data_offsets"][1] > held), None)
    if cut is not None:
        raise Refused(f"{name} has {os.path.basename(path)} cut off in {cut}: fetch its files again")


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


def check_device(dtype, device):
    """Refuses a dtype that is not one of DTYPES, and a device that cannot multiply matrices of it."""
    if dtype not in DTYPES.values():
        raise Refused(f"dtype {dtype} is not supported on {device}: take {', '.join(DTYPES)}")
    try:
        one = torch.ones(8, 8, dtype=dtype, device=device)
        (one @ one).sum().item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise Refused(f"device {device} cannot compute in {dtype} ({first_line(error)}): "
                      "take another dtype, or device cpu") from error


def first_line(error):
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


class Fused:
    """Decode steps as launches of the kernel in fused_block.cu; made by `Pythia.fuse`.

    It shares the model's weights and a key/value cache, and owns the few buffers that a launch works in.
    Token and position live on the device (`state`), so a step needs nothing from the host.
    """
    TOKENS = 8                                                                    # greedy ones in a launch

    def __init__(self, model, cache, graph, source, tuning):
        from build import SOURCE, constants, device_arch, load
        c, device, dtype = model.config, model.embed_in.device, model.embed_in.dtype
        if device.type != "cuda" or dtype != torch.float16:
            raise Refused(f"the fused kernel runs float16 on a CUDA GPU, not {dtype} on {device.type}: "
                          "take dtype float16 and device cuda, or leave fused out")
        arch, sms = device_arch(device), torch.cuda.get_device_properties(device).multi_processor_count
        self.defines = constants(c, arch, sms=sms, **tuning)
        self.library = load(self.defines, arch, source or SOURCE)
        self.library.fused_prepare.restype = self.library.fused_launch.restype = ctypes.c_char_p
        clusters = ctypes.c_int()
        with torch.cuda.device(device):
            check(self.library.fused_prepare(ctypes.byref(clusters)))
        self.clusters, size = clusters.value, self.defines["CLUSTER"]
        if self.clusters * size * 2 < sms:
            raise Refused(f"this GPU has room for {self.clusters} clusters of {size} blocks at once, on "
                          f"{sms} multiprocessors: end what else runs on it, or take a smaller cluster")
        cache = model.new_cache() if cache is None else cache
        shape = (c.n_layer, 2, 1, c.n_head, c.context, c.head_size)
        if (cache.shape, cache.dtype, cache.device) != (shape, dtype, device) or not cache.is_contiguous():
            raise Refused(f"the cache is {list(cache.shape)} {cache.dtype} on {cache.device}, the model "
                          f"needs {list(shape)} {dtype} on {device}, contiguous: take one from "
                          "new_cache()")
        self.use_graph, self.captured = graph, None
        self.allocate(model, cache, sms)

    def allocate(self, model, cache, sms):
        """Makes what a launch works in, and the kernel's parameter: pointers to that, weights and cache."""
        c, device = model.config, cache.device
        self.config, self.device, self.cache = c, device, cache
        self.state = torch.zeros(16, dtype=torch.int32, device=device)            # the kernel's State
        self.residual = torch.zeros(2, c.hidden, dtype=torch.int64, device=device)
        self.logits = torch.zeros(c.vocab, device=device)
        self.history = torch.zeros(c.context, dtype=torch.int32, device=device)   # tokens chosen, by position
        self.failure = torch.zeros(4, dtype=torch.int32, pin_memory=device.type == "cuda")  # outlives CUDA
        self.taps = torch.zeros(6 * c.hidden + c.mlp, device=device)
        self.timeline = torch.zeros(sms, c.n_layer + 1, 10, dtype=torch.int64, device=device)
        tensors = [*model.blocks.parameters(),  # in the order of Block, which is that of the kernel's Layer
                   model.embed_in, model.lnf_w, model.lnf_b, model.embed_out, model.rope_cos, model.rope_sin,
                   cache, self.residual, self.logits, self.history, self.state, self.failure, self.taps,
                   self.timeline]
        self.tensors = [t.detach() for t in tensors]  # keeps the memory, whatever becomes of the model
        if any(t.data_ptr() % 16 or not t.is_contiguous() for t in self.tensors):
            raise Refused("a weight is not contiguous, or not at a multiple of 16 bytes: load the model anew")
        self.pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in self.tensors))

    def __call__(self, tokens, cache, pos):
        """Logits [1, 1, V] fp32 of one token [1, 1] at `pos`, with the reference's signature."""
        if tokens.shape != (1, 1) or cache is not self.cache:
            raise Refused("a fused step takes one token and the cache it was made with: take the model for "
                          "others")
        self.start(tokens, pos)
        self.launch(0, self.config.n_layer, tokens=1)
        return self.logits.clone().view(1, 1, -1)

    def start(self, token, pos):
        """Makes `token` (int or tensor of one) at position `pos` the input of the next step."""
        if not 0 <= pos < self.config.context:
            raise Refused(f"position {pos} is not one of the {self.config.context}: shorten the prompt, or "
                          "ask for fewer tokens")
        self.state[0:1].copy_(torch.as_tensor(token).view(1))
        self.state[1] = pos

    def launch(self, first_layer, last_layer, tokens=0):
        """Layers first_layer..last_layer - 1 on the current stream.

        From layer 0 on, x is the token's embedding; later, what the last launch left. With `tokens`,
        last_layer has to be n_layer: logits and argmax follow, and the position advances. With more than one,
        first_layer has to be 0: all layers go on with the argmax, up to the end of the context.
        """
        with torch.cuda.device(self.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            check(self.library.fused_launch(self.pointers, self.clusters, first_layer, last_layer,
                                            tokens, stream))

    def step(self, sampler=None, tokens=1):
        """`tokens` in one launch, without waiting for it: replays its graph, captured when first asked for.

        The kernel takes the likeliest token; a `sampler` chooses anew, one token a launch.
        """
        if not self.use_graph:
            return self.launch_and_choose(sampler, tokens)
        if self.captured != (sampler, tokens):
            self.capture(sampler, tokens)
        self.graph.replay()

    def launch_and_choose(self, sampler, tokens):
        self.launch(0, self.config.n_layer, tokens)
        if sampler is not None:
            token = sampler(self.logits)
            self.state[:1] = token
            self.history.index_copy_(0, self.state[1:2].long() - 1, token.view(1).int())

    def capture(self, sampler, tokens):
        graph = torch.cuda.CUDAGraph()
        if sampler is not None:
            drawn = sampler.rng.get_state()
            sampler(self.logits)                                                  # loads PyTorch's kernels
            sampler.rng.set_state(drawn)
            graph.register_generator_state(sampler.rng)
        side = torch.cuda.Stream(self.device)  # the default is on the GPU that captured first
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=side):
            self.launch_and_choose(sampler, tokens)
        self.graph, self.captured = graph, (sampler, tokens)

    def decode(self, token, pos, steps, sampler=None):
        """Yields `steps` tokens (ints) after `token` at `pos`; the GPU goes on while the host reads."""
        if steps > 0:
            self.start(token, pos)
        if sampler is not None and sampler.temperature == 0:
            sampler = None                                                        # the kernel does as much
        most = self.TOKENS if sampler is None else 1
        launches = [slice(at, min(at + most, pos + steps)) for at in range(pos, pos + steps, most)]
        reader, host = torch.cuda.Stream(self.device), torch.zeros(most, dtype=torch.int32).pin_memory()
        ready = [torch.cuda.Event(), torch.cuda.Event()]
        for n in range(len(launches) + 1):
            if n < len(launches):
                tokens = launches[n].stop - launches[n].start
                # the last may be shorter: to capture another graph for it would take longer
                (self.step if tokens == most else self.launch_and_choose)(sampler, tokens)
                ready[n % 2].record(torch.cuda.current_stream(self.device))
            if n > 0:
                made = self.history[launches[n - 1]]
                with torch.cuda.stream(reader):
                    reader.wait_event(ready[(n - 1) % 2])
                    host[:len(made)].copy_(made, non_blocking=True)
                self.wait(reader)
                yield from host[:len(made)].tolist()

    def wait(self, stream):
        """Waits for `stream`; RuntimeError names the sync that a launch gave up at, if one did."""
        try:
            stream.synchronize()
        except RuntimeError as error:
            sync, block, layer, seen = self.failure.tolist()
            if sync == 0:
                raise
            name = ["", "(1)", "(2)", "(3)", "(4)", "(5)", "(F)", "(E)", "(h)"][sync]
            lacking = {4: f", where x lacked {seen} of its sums,",
                       5: f", where {seen} blocks had not arrived,"}.get(sync, "")
            raise RuntimeError(f"the fused kernel waited too long at sync {name}{lacking} in block {block}, "
                               f"layer {layer}, and gave up: start a new process") from error


def check(error):
    """Raises what a function of the kernel's library returned (bytes), if anything."""
    if error:
        raise RuntimeError(f"CUDA refused the fused kernel: {error.decode()}")
