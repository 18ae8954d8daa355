"""Continues a prompt with a Pythia; without arguments, with the small one beside this file.

examples:
  python generate.py --prompt "Call me" --tokens 500 --seed 7
  python generate.py --model EleutherAI/pythia-1b --revision step3000 --dtype bfloat16
  python generate.py --model EleutherAI/pythia-2.8b --fused --prompt "The meaning of life is"
  python generate.py --model pythia-2.8b --random --fused --temperature 0     (speed only, no download)

Prompt and text go to standard output as they come, everything else to standard error. The last line
there has model, dtype, device, new tokens, ms a token and tokens/s. These times are from the first to the
last new token, without loading and prompt. The line also says why a text ended before it had --tokens. Exit
code: 0; 2 and one sentence for what cannot be done; 130 after Ctrl-C.
"""
import os
import signal

if __name__ == "__main__":  # until there is text, Ctrl-C ends the process; an import may swallow it
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import math
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from types import SimpleNamespace

HERE = os.path.dirname(os.path.realpath(__file__))
TINY = os.path.join(HERE, "tiny-pythia")


def arguments(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"generate.py: {message}; see --help\n")
    add = parser.add_argument
    add("--model", default=TINY, metavar="NAME",
        help="Hub name such as EleutherAI/pythia-160m-deduped, or a folder (default: tiny-pythia)")
    either = parser.add_mutually_exclusive_group().add_argument  # random weights have no revision
    either("--revision", metavar="REV",
        help="training checkpoint of a Hub model, step0 to step143000 (default: the last)")
    either("--random", action="store_true",
        help="random weights of the size that --model names: no download and no tokenizer, so the prompt's "
             "bytes are taken as token ids, and ids are printed")
    add("--prompt", default="When Elizabeth saw the sea for the first time, she", metavar="TEXT",
        help="text to continue, or - to read it from standard input, less one newline at its end (default: "
             "%(default)r)")
    add("--tokens", type=int, default=200, metavar="N", help="new tokens, at most (default: %(default)s)")
    add("--temperature", type=float, default=0.7, metavar="T",
        help="0 takes the likeliest token, 1 draws by the model's own probabilities (default: %(default)s)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only (default: from all)")
    add("--top-p", type=float, default=0.95, metavar="P",
        help="draw from the fewest tokens that hold the probability P only (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N",
        help="same seed, same text on the same kind of device (default: %(default)s)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"),
        help="of weights, activations and cache (default: float32 on a CPU, else float16)")
    add("--fused", action="store_true",
        help="decode with the kernel in fused_block.cu, in launches of 8 tokens: needs float16, a GPU of "
             "compute capability 9.0 (10.0 and 12.0 are untested), and nvcc, which compiles it once for each "
             "size")
    add("--graph", action=BooleanOptionalAction, default=True,
        help="with --fused: replay a CUDA graph (default: yes)")
    add("--explain", action="store_true",
        help="print how the kernel would lay out this model's work on a GPU, and end; needs no GPU")
    return parser.parse_args(argv)


def main(argv=None):
    """Runs the command; returns its exit code."""
    args = arguments(argv)
    from checkpoint import Refused, out_of_memory  # --help does not wait for torch
    try:
        return run(args)
    except (Refused, RuntimeError, MemoryError) as error:  # the kernel's, CUDA's, an allocator's
        sentence = str(error).partition("\n")[0]
        if out_of_memory(error):
            sentence = f"{args.model} does not fit into memory: take a smaller one, or another device"
    print("generate.py:", sentence, file=sys.stderr)
    return 2


def run(args):
    """Does what the arguments ask for; returns the exit code."""
    import torch

    from checkpoint import Refused, fetch
    from model import Config, Pythia
    if args.explain:
        from emulator.emulator import explain
        try:
            config = Config.from_name(args.model)
        except Refused:  # not one of the ten sizes
            quiet(args.model)
            config = Config.from_pretrained(args.model, args.revision)
        return explain(config)
    prompt = read_prompt(args.prompt)
    device = args.device or ("cuda" if torch.cuda.is_available() else
                             "mps" if torch.backends.mps.is_available() else "cpu")
    kind = device.partition(":")[0]
    dtype = args.dtype or ("float32" if kind == "cpu" else "float16")
    if args.random:
        model = Pythia.random(args.model, args.seed, dtype, device)
        text = SimpleNamespace(encode=lambda prompt: list(prompt.encode()),   # instead of a tokenizer
                               decode=lambda token: f" {token}", rest=lambda: "")
    else:
        quiet(args.model)
        folder = fetch(args.model, args.revision)
        model, text = Pythia.from_pretrained(folder, None, dtype, device), Text(folder)
    fused = None
    if args.fused:
        from build import Fused
        fused = Fused(model, graph=args.graph)
    tokens = model.generate(text.encode(prompt), args.tokens, args.temperature, args.top_k, args.top_p,
                            args.seed, fused)
    name = os.path.basename(os.path.normpath(args.model))
    name += f"@{args.revision}" if args.revision else " (random weights)" if args.random else ""
    where = {"cpu": f"cpu ({torch.get_num_threads()} threads)", "mps": "mps"}.get(kind)
    where = where or torch.cuda.get_device_name(device)
    how = "" if not args.fused else ", fused kernel" if args.graph else ", fused kernel without a graph"
    return stream(tokens, args.tokens, prompt, text, model.config, f"{name}, {dtype}, {where}{how}")


def read_prompt(prompt):
    """The argument, or with "-" all of standard input. Bytes that are not UTF-8 become U+FFFD."""
    if prompt != "-":
        return prompt.encode(errors="surrogateescape").decode(errors="replace")
    try:
        return sys.stdin.buffer.read().decode(errors="replace").removesuffix("\n")
    except (AttributeError, OSError) as error:  # it is closed, or a folder
        from checkpoint import Refused
        raise Refused("standard input cannot be read: give the prompt itself") from error


def stream(tokens, wanted, prompt, text, config, what):
    """Prints the prompt, the tokens as they come, and the closing line; returns the exit code."""
    times, token, end = [], None, ""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(prompt, end="", flush=True)
        for token in tokens:
            times.append(time.perf_counter())
            print(text.decode(token), end="", flush=True)
        if token in config.eos:
            end = ", ended with the end-of-text token"
        elif len(times) < wanted:
            end = f", ended because all {config.context} positions of the context are used"
    except KeyboardInterrupt:
        end = ", interrupted"
    finally:
        print(text.rest(), flush=True)
    speed = ""
    if len(times) > 1:
        seconds = (times[-1] - times[0]) / (len(times) - 1)
        speed = f", {seconds * 1e3:.3f} ms a token, {1 / seconds:.1f} tokens/s"
    print(f"{what}: {len(times)} tokens{speed}{end}", file=sys.stderr)
    return 130 if end == ", interrupted" else 0


class Text:
    """The tokenizer of a checkpoint, and a text that grows token by token."""

    def __init__(self, name_or_folder, revision=None):
        from checkpoint import Refused, fetch, loading
        folder, self.vocab = fetch(name_or_folder, revision), math.inf
        if os.path.exists(path := os.path.join(folder, "tokenizer.json")):
            from tokenizers import Tokenizer
            self.tokenizer = loading(Tokenizer.from_file)(path)
            self.tokenizer.no_truncation()  # a file may have it for batches
            self.tokenizer.no_padding()
        else:
            from transformers import AutoTokenizer
            self.tokenizer = loading(AutoTokenizer.from_pretrained)(folder, trust_remote_code=False)
            self.vocab = len(self.tokenizer)  # on larger ids, which a model may have, some raise
            if self.vocab <= len(self.tokenizer.all_special_ids):  # transformers made one up
                raise Refused(f"{folder} has no tokenizer: put its tokenizer.json beside its weights")

    def encode(self, prompt):
        ids = self.tokenizer.encode(prompt)
        self.ids = list(getattr(ids, "ids", ids))
        self.start, self.shown = 0, len(self.ids)  # of the last piece; how many tokens are text already
        return self.ids[:]

    def decode(self, token):
        """The text that `token` completes: nothing while a character is still lacking bytes."""
        if token < self.vocab:
            self.ids.append(token)
        piece = self.rest()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return piece

    def rest(self):
        """What `decode` still holds back: the text may end within a character."""
        # decoded after the piece before it, as a tokenizer may drop the space at the beginning of a text
        before, both = (self.tokenizer.decode(self.ids[self.start:end], skip_special_tokens=True)
                        for end in (self.shown, len(self.ids)))
        return both[len(before):]


def quiet(model):
    """Keeps the libraries' remarks off standard error, and progress bars off anything but a terminal."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging
    logging.set_verbosity_error()
    hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        hub.disable_progress_bars()
    elif not os.path.exists(model):
        print(f"asking the Hub for {model} (HF_HUB_OFFLINE=1 prevents this)", file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, HERE)  # PYTHONSAFEPATH leaves it out
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stdout is None:
        print("generate.py: standard output is closed: give it a file or a terminal", file=sys.stderr)
        sys.exit(2)
    sys.stdout.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader, such as `head`, has closed the pipe
            print(f"generate.py: the text cannot be written ({error}): give standard output more room",
                  file=sys.stderr)
            sys.exit(2)
