"""Pythia in plain PyTorch: the definition of the model, and the reference the fused kernel is compared with.

Pythia (arXiv 2304.01373) is GPT-NeoX (arXiv 2204.06745) in ten sizes. Its layer is parallel: attention and
MLP both read the layer's input x, and both are added to it:

    x = x + attn(LN1(x)) + mlp(LN2(x))

Symbols, here and in the kernel: C hidden size, NH heads, HS = C / NH head size, ROT rotary dimensions of a
head, V vocabulary, L layers, MLP = 4 C hidden units of a layer. Two symbols are of this file alone: B is the
number of sequences in a batch, and N the number of new tokens that one call reads, at positions
pos..pos+N-1. Every matrix is stored as rows of length C, so that one copy of the weights serves
this file and the kernel. For this, two of a layer's four matrices are transposed when they are loaded.
"""
import itertools
import math
import secrets
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding, gelu, layer_norm, linear
from torch.nn.functional import scaled_dot_product_attention as attention

from checkpoint import DTYPES, Refused, fetch, first_line, read_config, read_tensors

SIZES = {  # name: (L, C, NH, V); in all ten MLP = 4 C, ROT = HS / 4, and there are 2048 positions
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
# All of PyTorch's attention kernels except cuDNN's, which spends 40 ms a token on a plan for each new length
ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Config:
    """The shape of a model: its sizes, and how many positions (`context`) a text can have."""
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
        """How many weights the matrices have; LayerNorms and biases add few."""
        C = self.hidden
        return 2 * self.vocab * C + self.n_layer * (4 * C * C + 2 * C * self.mlp)

    @classmethod
    def from_name(cls, name):
        """The Config of one of SIZES. A prefix "EleutherAI/" and a suffix "-deduped" are ignored."""
        size = name.removeprefix("EleutherAI/").removesuffix("-deduped")
        if size not in SIZES:
            raise Refused(f"no Pythia size is called {name!r}: take one of {', '.join(SIZES)}")
        L, C, NH, V = SIZES[size]
        return cls(n_layer=L, n_head=NH, hidden=C, mlp=4 * C, vocab=V, rotary_dims=C // NH // 4)

    @classmethod
    def from_pretrained(cls, name_or_folder, revision=None):
        """The Config of a checkpoint on the Hugging Face Hub or in a folder.

        Raises Refused if the files cannot be read, or if this file cannot run such a model.
        """
        return cls(**read_config(fetch(name_or_folder, revision, weights=False)))

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
    """One layer of the model, a transformer block. (In the kernel, a block is a group of threads.)"""

    def __init__(self, config, tensor):
        """`tensor(name, *shape, transposed=False)` supplies a weight under its name within the layer."""
        super().__init__()
        self.config = config
        C, MLP = config.hidden, config.mlp
        self.ln1_w = tensor("input_layernorm.weight", C)
        self.ln1_b = tensor("input_layernorm.bias", C)
        self.ln2_w = tensor("post_attention_layernorm.weight", C)
        self.ln2_b = tensor("post_attention_layernorm.bias", C)
        self.w_qkv = tensor("attention.query_key_value.weight", 3 * C, C)         # [NH, (q, k, v), HS] rows
        self.b_qkv = tensor("attention.query_key_value.bias", 3 * C)
        self.w_out = tensor("attention.dense.weight", C, C, transposed=True)      # row: weights of o[h, d]
        self.b_out = tensor("attention.dense.bias", C)
        self.w_up = tensor("mlp.dense_h_to_4h.weight", MLP, C)                    # row: makes hidden unit j
        self.b_up = tensor("mlp.dense_h_to_4h.bias", MLP)
        self.w_down = tensor("mlp.dense_4h_to_h.weight", MLP, C, transposed=True)  # row: weights of unit j
        self.b_down = tensor("mlp.dense_4h_to_h.bias", C)

    def forward(self, x, rope, cache_kv=None, pos=0):
        """The next layer's x [B, N, C] from this layer's x [B, N, C], at positions pos..pos+N-1.

        `rope` [2, N, ROT/2] fp32 holds cosines and sines of these positions. `cache_kv`
        [2, B, NH, context, HS] holds keys and values of positions 0..pos-1 and gets the new ones.
        """
        C, eps = self.config.hidden, self.config.eps
        attn = self.attend(layer_norm(x, (C,), self.ln1_w, self.ln1_b, eps), rope, cache_kv, pos)
        hidden = linear(layer_norm(x, (C,), self.ln2_w, self.ln2_b, eps), self.w_up, self.b_up)
        mlp = linear(gelu(hidden), self.w_down.T, self.b_down)                    # [B, N, MLP] -> [B, N, C]
        # x is the largest of the three, so a sum with x rounds off the most. So x is in one sum only.
        return x + (attn + mlp)

    def attend(self, x, rope, cache_kv, pos):
        (B, N, C), NH, HS = x.shape, self.config.n_head, self.config.head_size
        qkv = linear(x, self.w_qkv, self.b_qkv).view(B, N, NH, 3, HS)
        self.rotate(qkv[:, :, :, :2], rope)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)                                      # each [B, NH, N, HS]
        if cache_kv is not None:
            cache_kv[0, :, :, pos:pos + N] = k
            cache_kv[1, :, :, pos:pos + N] = v
            k, v = cache_kv[:, :, :, :pos + N]                                    # each [B, NH, pos+N, HS]
        mask = None
        if N > 1 and pos > 0:                                                     # query n sees keys 0..pos+n
            mask = torch.ones(N, pos + N, dtype=torch.bool, device=x.device).tril(pos)
        o = attention(q, k, v, mask, is_causal=N > 1 and pos == 0)                # scale HS**-0.5
        return linear(o.transpose(1, 2).reshape(B, N, C), self.w_out.T, self.b_out)

    def rotate(self, qk, rope):
        """RoPE (arXiv 2104.09864) in place, on the first ROT of HS dimensions of qk [B, N, NH, 2, HS]."""
        cos, sin = rope[:, :, None, None]                                         # [N, 1, 1, ROT/2] fp32
        a, b = qk[..., :self.config.rotary_dims].chunk(2, dim=-1)                 # pairs (i, i + ROT/2)
        qk[..., :self.config.rotary_dims] = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Pythia(nn.Module):
    """The whole model, made by `Pythia.from_pretrained` or `Pythia.random`."""

    def __init__(self, config, tensor):
        """`tensor(name, *shape, transposed=False)` supplies a weight under its name in the checkpoint."""
        super().__init__()
        self.config = config
        C, V = config.hidden, config.vocab
        self.embed_in = tensor("gpt_neox.embed_in.weight", V, C)
        self.blocks = nn.ModuleList()
        for i in range(config.n_layer):
            def layer_tensor(name, *shape, i=i, **kw):
                return tensor(f"gpt_neox.layers.{i}.{name}", *shape, **kw)
            self.blocks.append(Block(config, layer_tensor))
        self.lnf_w = tensor("gpt_neox.final_layer_norm.weight", C)
        self.lnf_b = tensor("gpt_neox.final_layer_norm.bias", C)
        self.embed_out = tensor("lm_head.weight", V, C)
        # RoPE (arXiv 2104.09864): at position p, pair i of dimensions turns by the angle p * theta**(-2i/ROT)
        position = torch.arange(config.context, dtype=torch.float32, device=self.embed_in.device)
        pair = torch.arange(0, config.rotary_dims, 2, dtype=torch.float32, device=self.embed_in.device)
        angle = torch.outer(position, 1.0 / config.rope_theta ** (pair / config.rotary_dims))
        self.rope = torch.stack((angle.cos(), angle.sin()))                       # [2, context, ROT/2] fp32

    def _apply(self, *args, **kw):
        """Does what .to(), .half(), .cuda() do. The RoPE table moves with the weights, but stays float32."""
        super()._apply(*args, **kw)
        self.rope = self.rope.to(self.embed_in.device)
        return self

    def forward(self, tokens, cache=None, pos=0):
        """Logits [B, N, V] for tokens [B, N] int64 at positions pos..pos+N-1.

        With a `cache` from `new_cache`, the tokens attend to its positions before pos, and their keys and
        values are added to it. Without one, they attend only to each other. Raises Refused past the last
        position.
        """
        return linear(self.body(tokens, cache, pos), self.embed_out)

    @sdpa_kernel(ATTENTION_KERNELS)
    def body(self, tokens, cache, pos):
        """Everything before the LM head: the final LayerNorm's output [B, N, C]."""
        end = pos + tokens.shape[1]
        if end > self.config.context:
            raise Refused(f"position {end - 1} is past the last of {self.config.context} positions: "
                          "shorten the prompt or ask for fewer tokens")
        x = embedding(tokens, self.embed_in)                                      # [B, N, C]
        for i, block in enumerate(self.blocks):
            x = block(x, self.rope[:, pos:end], None if cache is None else cache[i], pos)
        return layer_norm(x, (self.config.hidden,), self.lnf_w, self.lnf_b, self.config.eps)

    def new_cache(self, batch=1):
        """A key/value cache [L, 2, B, NH, context, HS], not initialised: a row is written before it is
        read."""
        c = self.config
        return torch.empty(c.n_layer, 2, batch, c.n_head, c.context, c.head_size,
                           dtype=self.embed_in.dtype, device=self.embed_in.device)

    def generate(self, tokens, max_new_tokens, temperature=0.0, top_k=None, top_p=None, seed=None,
                 fused=None):
        """Yields up to `max_new_tokens` ids (ints) that continue `tokens` (list or 1-D tensor), as they come.

        `temperature`, `top_k`, `top_p` and `seed` are `Sampler`'s. Without a seed, each call draws a
        different text. The text ends early with a token of `config.eos`, which is yielded, or after the last
        position. The model reads the prompt. `fused`, a `build.Fused(model)`, then decodes with the kernel.
        Raises Refused, before any work, for invalid arguments.
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
        decoder = fused or Reference(self)
        if decoder.model is not self:
            raise Refused("this decoder belongs to another model: take Fused(model) of the one that "
                          "generates")
        sampler = Sampler(temperature, top_k, top_p, secrets.randbits(64) if seed is None else seed)
        steps = min(max_new_tokens, c.context - len(tokens) + 1)
        return self.stream(tokens.to(self.embed_in.device), steps, sampler, decoder)

    @torch.inference_mode()
    def stream(self, tokens, steps, sampler, decoder):
        """Yields `steps` ids after `tokens` [N], or fewer if an end-of-text token comes: see `generate`."""
        if steps == 0:
            return
        text_number, pos = decoder.begin(), len(tokens)
        x = self.body(tokens[None], decoder.cache, 0)[0, -1]                      # reads the whole prompt
        first = int(sampler(linear(x, self.embed_out), pos))
        for token in itertools.chain([first], decoder.decode(first, pos, steps - 1, sampler, text_number)):
            if token < 0:
                raise Refused(f"the logits are not finite in {self.embed_out.dtype}: take dtype float32 or "
                              "bfloat16, without fused")
            yield token
            if token in self.config.eos:
                return

    @classmethod
    def from_pretrained(cls, name_or_folder, revision=None, dtype=torch.float32, device="cpu"):
        """A checkpoint from the Hugging Face Hub ("EleutherAI/pythia-70m", revision="step3000") or a folder.

        The files are safetensors or .bin, whole or sharded; `dtype` is one of DTYPES or its name. Raises
        Refused if the files cannot be loaded, or do not fit this model exactly.
        """
        from transformers.utils import logging
        dtype = DTYPES.get(dtype, dtype)
        check_device(dtype, device)
        folder = fetch(name_or_folder, revision)
        config = Config.from_pretrained(folder)
        weights = read_tensors(folder)

        def refuse(fault):
            raise Refused(f"{folder} {fault}: fetch its files again, or take a Pythia checkpoint that is not "
                          "quantised")

        def tensor(name, *shape, transposed=False):
            """Moves one weight out of the dict, so that there are never two copies of the whole model."""
            if name not in weights:
                refuse(f"lacks {name}")
            w, asked = weights.pop(name), shape[::-1] if transposed else shape
            if w.shape != asked:
                refuse(f"has {name} of shape {list(w.shape)}, but its config.json asks for {list(asked)}")
            w = w.to(device, dtype)
            if not torch.stack(w.aminmax()).isfinite().all():                     # aminmax passes NaN on
                raise Refused(f"{folder} has NaN or Inf in {name}, read as {dtype}: take dtype "
                              "float32 or bfloat16, or fetch its files again")
            # Transposes in place, so that only one matrix at a time has a second copy. A matrix may be a view
            # of a mapped file. The mapping is private, so the file does not change.
            if transposed:
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
        channels of x far larger than the rest. The weights depend on seed, dtype and kind of device alone.
        """
        dtype = DTYPES.get(dtype, dtype)
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
            elif transposed:  # [inputs, outputs]: the result is added to x, so it shrinks with L
                w.normal_(0, (shape[0] * 2 * config.n_layer) ** -0.5, generator=rng)
                w[:, outliers] *= 10
            else:             # [outputs, inputs]
                w.normal_(0, shape[1] ** -0.5, generator=rng)
            return nn.Parameter(w, requires_grad=False)
        return cls(config, tensor)


@dataclass
class Reference:
    """The decoder that `Pythia.generate` takes without `fused`: one call of the model for each token."""
    model: Pythia

    def __post_init__(self):
        self.cache = self.model.new_cache()

    def begin(self):
        """Begins another text."""

    def decode(self, token, pos, steps, sampler, text_number=None):
        """Yields `steps` ids (ints) that follow the id `token` at position `pos`.

        `text_number` is for a decoder whose cache another text can take over, such as build.Fused.
        """
        for at in range(pos, pos + steps):
            tokens = torch.tensor([[token]], device=self.cache.device)
            token = int(sampler(self.model(tokens, self.cache, at)[0, 0], at + 1))
            yield token


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token from logits [V].

    `temperature` 0 takes the likeliest token. Above 0 the token is drawn from softmax(logits / temperature),
    restricted to the tokens that are kept. First, only the `top_k` likeliest tokens are kept. Of these,
    top-p keeps a token if the likelier ones together have less than the share `top_p` of the probability
    of all `top_k`. Of equal logits, the smaller id is likelier.

    The draw is an argmax. Each token has a noisy logit, logit - temperature * log(delay), where delay is
    independent and exponentially distributed with mean 1. A token has the largest noisy logit with exactly
    its softmax probability (the Gumbel-max trick). delay depends on `seed`, on the position that the token
    will have, and on the token alone. So from the same logits the kernel draws the same token.
    """
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature <= 1e30:
            raise Refused(f"temperature {self.temperature} is not possible: take 0 (greedy) to 1e30")
        if self.top_k is not None and self.top_k < 1:
            raise Refused(f"top-k {self.top_k} leaves no token: take 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise Refused(f"top-p {self.top_p} is not a probability that leaves a token: "
                          "take more than 0, at most 1")
        check_seed(self.seed)

    def __call__(self, logits, position):
        """The token (0-d int64) at `position`, from logits [V]; -1 where the largest logit is not finite."""
        best, token = logits.max(-1)                                              # the first of equals
        if self.temperature > 0:
            logits = logits.float().nan_to_num()
            kept = self.kept(logits)
            token = kept[(logits[kept] + self.noise(kept, position)).argmax()]
        return token.where(best.isfinite(), -1)

    def noise(self, tokens, position):
        """-temperature * log(delay) [n] fp32 for token ids [n], by Philox4x32-10 (Salmon et al., SC11).

        Philox keeps no state. It scrambles a counter, here (token // 4, position), and a key, here the seed,
        into four words of 32 bits. These serve four tokens.
        """
        count, low32 = [tokens // 4, position, 0, 0], 2**32 - 1
        key = self.seed & low32, self.seed >> 32 & low32
        for _ in range(10):
            a, b = count[0] * 0xD2511F53, count[2] * 0xCD9E8D57
            count = [b >> 32 & low32 ^ count[1] ^ key[0], b & low32,
                     a >> 32 & low32 ^ count[3] ^ key[1], a & low32]
            key = (key[0] + 0x9E3779B9) & low32, (key[1] + 0xBB67AE85) & low32
        word = torch.stack(count, 1).gather(1, tokens[:, None] % 4)[:, 0]
        u = word.float() * 2.0**-32 + 2.0**-33                                    # above 0, up to 1
        return -self.temperature * torch.log(-torch.log1p(-u))

    def kept(self, logits):
        """The ids [n] that top-k and top-p keep of logits [V]. The mass is in integers, as in the kernel."""
        ranked, order = logits.sort(descending=True, stable=True)                 # equal ones by id
        ranked, order = ranked[:self.top_k], order[:self.top_k]
        if self.top_p is not None and self.top_p < 1:
            mass = (((ranked - ranked[0]) / self.temperature).exp() * 2.0**30).long()
            limit = math.ceil(self.top_p * float(mass.sum()))  # a token stays if the mass before it is less
            order = order[mass.cumsum(0) - mass < limit]
        return order.sort().values


def check_seed(seed):
    """Refuses a seed that is not an integer of 64 bits."""
    if not -2**63 <= seed < 2**64:
        raise Refused(f"seed {seed} is not possible: take one from -2**63 to 2**64 - 1")


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
