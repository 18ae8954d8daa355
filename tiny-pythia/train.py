"""Train tiny-pythia: Pythia's architecture, small enough to live in a repository.

    python tiny-pythia/train.py --out tiny-pythia austen.txt tinyshakespeare.txt mobydick.txt

Cleans the texts, holds out about a twentieth of each, trains a byte-level BPE tokenizer and then
transformers' own GPTNeoXForCausalLM on the rest, keeps the weights with the lowest held-out loss, and writes
a Hugging Face folder: model.safetensors (fp16), config.json, tokenizer.json, heldout.txt (an excerpt of the
held-out text) and the model card README.md, whose numbers all come from the run. Minutes on a data-centre
GPU; a CPU runs it too, for a few --steps.
"""

import argparse
import hashlib
import math
import platform
import re
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXTokenizer,
)

END = "<|endoftext|>"  # id 0: stands before every piece of text
V, T_MAX = 2048, 2048  # vocabulary, context length
WINDOWS = (2048, 512)  # steps alternate: long windows teach the far positions, short ones the start of a text
PIECES, HELD = 80, (10, 30, 50, 70)  # each text is cut into 80 pieces, of which these four are held out
EXCERPT = 7000  # characters of each text that go into heldout.txt, and on to the end of the paragraph
LR, BETAS, EMA, SEED = 1.5e-3, (0.9, 0.98), 0.99, 1337
EVAL_EVERY, PATIENCE = 100, 6  # steps; evaluations in a row without a new best after which training stops
FINISH_S = 45  # kept back from --minutes for the last evaluation, the samples and the files
TEMPERATURE = 0.8
ABOUT = {
    "austen.txt": "Jane Austen's six novels, 1811 to 1817",
    "tinyshakespeare.txt": "scenes from William Shakespeare's plays",
    "mobydick.txt": "Herman Melville, Moby-Dick, 1851",
}


def clean(text):
    """Text of a file -> list of paragraphs, plain ASCII punctuation, one line for each paragraph of prose.

    Curly quotes and long dashes become the ASCII ones that the other texts use: one sign, one token. Verse
    keeps its lines. It is told from prose by length: all lines of a paragraph but the last average 49
    characters or more in the novels, and less in the plays.
    """
    ascii_signs = {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "_": None}
    text = text.translate(str.maketrans(ascii_signs))
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [" ".join(line.split()) for line in block.strip().split("\n")]
        if not lines[0] or lines[0].startswith("[") or "Signet Classic" in block:  # notes of later editors
            continue
        prose = sum(map(len, lines[:-1])) >= 49 * (len(lines) - 1)
        paragraphs.append((" " if prose else "\n").join(lines))
    return paragraphs


def split(paragraphs):
    """List of paragraphs -> (strings to train on, strings held out), each a contiguous run of paragraphs."""
    cut = [len(paragraphs) * i // PIECES for i in range(PIECES + 1)]
    kept, held, start = [], [], 0
    for i in HELD:
        kept.append("\n\n".join(paragraphs[start:cut[i]]))
        held.append("\n\n".join(paragraphs[cut[i]:cut[i + 1]]))
        start = cut[i + 1]
    return kept + ["\n\n".join(paragraphs[start:])], held


def excerpt(held):
    """Strings held out of a text -> the first one's first paragraphs, EXCERPT characters or a few more."""
    end = held[0].find("\n\n", EXCERPT)
    return held[0] if end < 0 else held[0][:end]


def make_tokenizer(pieces):
    """Byte-level BPE with GPT-NeoX's normalizer and pre-tokenizer, V tokens, END first."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes: any text can be encoded
    bpe.train_from_iterator(pieces, tokenizers.trainers.BpeTrainer(
        vocab_size=V, special_tokens=[END], initial_alphabet=alphabet, show_progress=False))
    return GPTNeoXTokenizer(tokenizer_object=bpe, pad_token=END)


@torch.no_grad()
def losses(model, pieces, device):
    """Loss of every token of the pieces, in nats, each predicted once from at most T_MAX tokens before it.

    pieces: token lists, END first. Returns two tensors, one entry a token: loss, and position in its window.
    """
    loss, position = [], []
    for ids in pieces:
        for i in range(0, len(ids) - 1, T_MAX):
            y = torch.tensor(ids[i + 1:i + 1 + T_MAX], device=device)                    # [T]
            x = torch.tensor(ids[i:i + len(y)], device=device)                           # [T]
            logits = model(input_ids=x[None], use_cache=False).logits[0].float()         # [T, V]
            loss.append(torch.nn.functional.cross_entropy(logits, y, reduction="none"))  # [T]
            position.append(torch.arange(len(y), device=device))
    return torch.cat(loss), torch.cat(position)


def sample(model, tokenizer, prompt, new_tokens, temperature):
    """Prompt -> token ids of prompt and continuation; temperature 0 is greedy."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    how |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "pad_token_id": 0}
    return model.generate(ids, **how)[0].tolist()


def train(config, data, held, device, args, deadline):
    """Train on data [N] until the schedule ends, held-out loss stops falling, or the deadline is near.

    Returns the averaged weights with the lowest held-out loss, their step, the last step and the tokens seen.
    """
    model = GPTNeoXForCausalLM(config).to(device).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    average.eval()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=device == "cuda")
    warmup = min(200, args.steps // 10)
    best, best_step, best_weights, seen = math.inf, 0, None, 0
    began = time.time()
    for step in range(1, args.steps + 1):
        # Where the clock is ahead of the steps, the cosine follows it: slow machines also end at rate zero.
        done = min(1.0, max(step / args.steps, (time.time() - began) / max(deadline - began, 1.0)))
        rate = LR * min(1.0, step / max(warmup, 1)) * (0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        T = WINDOWS[step % len(WINDOWS)]
        start = torch.randint(len(data) - T, (max(1, args.batch_tokens // T), 1), device=device)  # [B, 1]
        x = data[start + torch.arange(T, device=device)]                                           # [B, T]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=x, labels=x, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        seen += x.numel()
        last = step == args.steps or time.time() > deadline
        if step % EVAL_EVERY == 0 or last:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                now = losses(average, held, device)[0].mean().item()
            if now < best:
                best, best_step = now, step
                best_weights = {k: v.detach().clone() for k, v in average.module.state_dict().items()}
            print(f"step {step:5d}/{args.steps}  rate {rate:.2e}  train {loss.item():.4f}  held-out {now:.4f}"
                  f"{' best' if best_step == step else ''}  epoch {seen / len(data):.1f}"
                  f"  {time.time() - began:.0f} s", flush=True)
            if last or step - best_step >= PATIENCE * EVAL_EVERY:
                break
    return best_weights, best_step, step, seen


def model_card(facts):
    """Facts of a run, all strings or numbers -> text of the model card."""
    return """---
license: mit
language: en
library_name: transformers
---
# tiny-pythia

A language model of Pythia's architecture (GPT-NeoX, parallel residual), small enough to be part of a
repository. It writes the English of a few old books and knows nothing else. Its purpose is to be run and tested.

| | |
|---|---|
| shape | {shape} |
| size | {parameters} parameters, fp16, {file_bytes} bytes |
| held-out loss of the fp16 file | {nats:.3f} nats a token, {bits:.3f} bits a byte |
| the same by position in the window | {by_position} |
| training | {steps} steps, {seen} tokens, {epochs:.1f} epochs; the weights of step {best_step} are kept |
| time | {minutes:.1f} minutes on one {machine}, tokenizer and evaluations included, samples not |
| versions | {versions} |
| licence | MIT, as the repository; the texts are in the public domain |

## Data

| file | what | bytes | SHA-256 begins | training tokens | held-out tokens | nats a token | bits a byte |
|---|---|---|---|---|---|---|---|
{rows}

Each text is cut into {pieces} pieces of equally many paragraphs, and pieces {held} are held out. Neither the
tokenizer nor the weights are trained on them, but their loss decides which step is kept. Before a text is cut,
its quotes and dashes become ASCII, the lines of a paragraph of prose are joined, verse keeps its lines, and marks
of italics and bracketed notes are dropped. Held-out bytes are counted after this. The loss of a token is taken
with at most {context} tokens before it. `heldout.txt` has the beginning of each text's first held-out piece.

## Training

```text
{command}
```

{recipe}

## Samples

Greedy, from "It is a truth":

```text
{greedy}
```

Temperature {temperature}, from "ROMEO:":

```text
{play}
```

Temperature {temperature}, from "The captain", the first 150 tokens:

```text
{novel}
```

and tokens 1500 to 1649 of the same text:

```text
{far}
```
""".format(**facts)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, help="plain UTF-8 text files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=4.0, help="limit of the whole run (default 4)")
    parser.add_argument("--steps", type=int, default=3000, help="steps of the schedule (default 3000)")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens of a step (default 32768)")
    parser.add_argument("--dropout", type=float, default=0.2, help="default 0.2")
    parser.add_argument("--weight-decay", type=float, default=0.5, help="default 0.5")
    args = parser.parse_args()
    began = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)

    kept, held = {}, {}
    for path in args.texts:
        if not path.is_file():
            parser.error(f"no text file {path}: give the paths of plain text files")
        kept[path], held[path] = split(clean(path.read_text(encoding="utf-8")))
        if not all(held[path]):
            parser.error(f"{path} is too short: it needs at least {PIECES} paragraphs")
    tokenizer = make_tokenizer([text for path in args.texts for text in kept[path]])
    kept_ids = {path: [[0] + tokenizer.encode(text) for text in kept[path]] for path in args.texts}
    held_ids = {path: [[0] + tokenizer.encode(text) for text in held[path]] for path in args.texts}
    stream = [i for path in args.texts for ids in kept_ids[path] for i in ids]
    data = torch.tensor(stream, device=device)  # [N]
    print(f"{len(tokenizer)} tokens in the vocabulary; {len(data)} training tokens, "
          f"{sum(len(ids) for path in args.texts for ids in held_ids[path])} held-out tokens; "
          f"{time.time() - began:.0f} s", flush=True)

    config = GPTNeoXConfig(
        vocab_size=V, hidden_size=256, num_attention_heads=8, num_hidden_layers=6, intermediate_size=1024,
        hidden_act="gelu", max_position_embeddings=T_MAX, layer_norm_eps=1e-5, use_parallel_residual=True,
        tie_word_embeddings=False, attention_bias=True, initializer_range=0.02,
        bos_token_id=0, eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        attention_dropout=args.dropout, hidden_dropout=args.dropout, attn_implementation="sdpa")
    deadline = began + 60 * args.minutes - FINISH_S
    all_held = [ids for path in args.texts for ids in held_ids[path]]
    weights, best_step, last_step, seen = train(config, data, all_held, device, args, deadline)
    minutes = (time.time() - began) / 60

    config.attention_dropout = config.hidden_dropout = 0.0  # a matter of training only
    model = GPTNeoXForCausalLM(config)
    model.load_state_dict(weights)
    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    excerpts = "\n\n".join(excerpt(held[path]) for path in args.texts)
    (args.out / "heldout.txt").write_text(excerpts + "\n", encoding="utf-8")

    # From here on only what the files say counts.
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device).eval()
    rows, loss, position, held_bytes = [], [], [], 0
    for path in args.texts:
        nats, where = losses(model, [[0] + tokenizer.encode(text) for text in held[path]], device)
        size, raw = sum(len(text.encode()) for text in held[path]), path.read_bytes()
        cells = [path.name, ABOUT.get(path.name, ""), len(raw), hashlib.sha256(raw).hexdigest()[:16],
                 sum(map(len, kept_ids[path])), len(nats), f"{nats.mean():.3f}",
                 f"{nats.sum() / size / math.log(2):.3f}"]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
        loss, position, held_bytes = loss + [nats], position + [where], held_bytes + size
    loss, position = torch.cat(loss), torch.cat(position)
    far = sample(model, tokenizer, "The captain", 1750, TEMPERATURE)
    precision = "bf16 autocast over fp32 weights" if device == "cuda" else "fp32"
    card = model_card({
        "shape": f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
                 f"{config.num_attention_heads} heads, MLP {config.intermediate_size}, "
                 f"vocabulary {V} (byte-level BPE), {T_MAX} positions",
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": (args.out / "model.safetensors").stat().st_size,
        "nats": loss.mean(), "bits": loss.sum() / held_bytes / math.log(2),
        "by_position": ", ".join(f"{loss[(position >= a) & (position <= b)].mean():.3f} at {a} to {b}"
                                 for a, b in ((0, 127), (128, 1023), (1024, 2047))),
        "steps": last_step, "best_step": best_step, "seen": seen, "epochs": seen / len(data),
        "minutes": minutes,
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
                    f"{transformers.__version__}, tokenizers {tokenizers.__version__}",
        "rows": "\n".join(rows), "pieces": PIECES, "held": ", ".join(str(i + 1) for i in HELD),
        "context": T_MAX,
        "command": f"python tiny-pythia/train.py --out {args.out.name} --minutes {args.minutes:g} "
                   f"--steps {args.steps} --batch-tokens {args.batch_tokens} --dropout {args.dropout} "
                   f"--weight-decay {args.weight_decay} " + " ".join(path.name for path in args.texts),
        "recipe": f"AdamW, {args.batch_tokens} tokens a step in windows of {WINDOWS[0]} and {WINDOWS[1]} "
                  f"in turn,\npeak rate {LR}, linear warm-up, cosine to zero, betas {BETAS}, weight decay "
                  f"on\nmatrices, gradients clipped at norm 1, {precision},\nmoving average of the "
                  f"weights with decay {EMA}, seed {SEED}.",
        "temperature": TEMPERATURE,
        "greedy": tokenizer.decode(sample(model, tokenizer, "It is a truth", 60, 0)),
        "play": tokenizer.decode(sample(model, tokenizer, "ROMEO:\n", 150, TEMPERATURE)),
        "novel": tokenizer.decode(far[:150]), "far": tokenizer.decode(far[1500:1650]),
    })
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(card)
    size = sum(f.stat().st_size for f in args.out.iterdir() if f.is_file())
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory" if device == "cuda" else ""
    print(f"{args.out}: {size} bytes in all; {(time.time() - began) / 60:.1f} minutes{peak}")


if __name__ == "__main__":
    main()
