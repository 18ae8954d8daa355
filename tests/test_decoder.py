"""Fused as real programs use it: odd defaults, changed models, two texts at once. The kernel runs on a CPU."""
import dataclasses
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from model import Pythia, Sampler
from test_block import HANGS
from tests.helpers import AHEAD, TINY, random_half, report, report_refused

pytest_plugins = ["tests.fixtures"]
TUNING = {"cluster": 2, "threads": 128}


@pytest.fixture
def decoder(simulated, monkeypatch):
    """A function that makes a decoder of a model, whose generators run without a GPU's streams."""
    for name in ("stream", "current_stream"):  # there is nothing to wait for
        monkeypatch.setattr(torch.cuda, name, MagicMock())

    def make(model, **kw):
        fused = simulated(model, 3, **TUNING, **kw)
        fused.use_graph = False
        fused.cache.fill_(0)
        return fused
    return make


def logits_of(fused):
    fused.start(7, 0)
    fused.launch(0, fused.config.n_layer, tokens=1)
    return fused.logits.clone()


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(),
                                    lambda m: m.half().float()], ids=["half", "bfloat16", "double", "both"])
def test_rope_stays_float32(change):
    """The table keeps its dtype and bits, so that far positions keep their angles."""
    tables = change(Pythia.from_pretrained(TINY)).rope, Pythia.from_pretrained(TINY).rope
    report("model.py", "RoPE's table after a change of dtype: other bits",
           tables[0].dtype != torch.float32 or not torch.equal(*tables))


def test_torch_defaults(decoder):
    """torch's default dtype, and inference mode, change no buffer."""
    right = logits_of(decoder(random_half(AHEAD, "cpu")))
    try:
        torch.set_default_dtype(torch.float16)
        fused = decoder(random_half(AHEAD, "cpu"))
        wrong = not torch.equal(logits_of(fused), right)
    finally:
        torch.set_default_dtype(torch.float32)
    report("decoder", "default dtype float16: other logits", wrong)
    report("decoder", "default dtype float16: bytes of logits too few", fused.logits.nbytes != 4 * AHEAD.vocab)
    with torch.inference_mode():
        fused = decoder(random_half(AHEAD, "cpu"))
    report("decoder", "made in inference mode, used outside: other logits",
           not torch.equal(logits_of(fused), right))


def test_changed_models(decoder):
    """All that the kernel is handed is compared with what it expects. What is added shifts nothing."""
    right = logits_of(decoder(random_half(AHEAD, "cpu")))
    model = random_half(AHEAD, "cpu")
    model.blocks[0].lora_a = nn.Parameter(torch.ones(3))
    model.blocks[0].register_parameter("a_first", nn.Parameter(torch.ones(5)))
    report("decoder", "parameters added to a layer: other logits",
           not torch.equal(logits_of(decoder(model)), right))

    def changed(name, change):
        model = random_half(AHEAD, "cpu")
        owner = model.blocks[0] if hasattr(model.blocks[0], name) else model
        setattr(owner, name, nn.Parameter(change(getattr(owner, name).detach()), requires_grad=False))
        return model
    for case, name, change, words in (
            ("LayerNorm in float32", "ln1_w", lambda w: w.float(), ["blocks[0].ln1_w", "float32", "float16"]),
            ("shorter bias", "b_up", lambda w: w[:-8].clone(), ["blocks[0].b_up", "56", "64"]),
            ("matrix in columns", "w_up", lambda w: w.T.contiguous().T, ["blocks[0].w_up", "not contiguous"]),
            ("larger vocabulary", "embed_out", lambda w: torch.cat((w, w)), ["embed_out", "128"])):
        report_refused(case, words, decoder, changed(name, change))


def test_two_texts(decoder):
    """A generator that is left half way notices that another text has begun, before it yields a wrong token."""
    model = random_half(replace(AHEAD, eos=()), "cpu")
    fused = decoder(model)
    alone = list(model.generate([3, 4, 5], 20, 1.0, seed=1, fused=fused))
    older = model.generate([3, 4, 5], 20, 1.0, seed=1, fused=fused)
    seen = [next(older) for _ in range(4)]
    newer = model.generate([9, 8], 20, 1.0, seed=2, fused=fused)
    torch.cuda.current_stream().wait_event.reset_mock()
    first = next(newer)  # has read its prompt into the cache
    waited = [call.args for call in torch.cuda.current_stream().wait_event.call_args_list]
    report("decoder", "two texts: the newer one does not wait for the last launch", waited != [(fused.last,)])
    try:
        seen.extend(older)
        said = "no refusal"
    except ValueError as refusal:
        said = str(refusal)
    report("decoder", f"two texts: the older one says {said!r:.40}", "another text has begun" not in said)
    report("decoder", "two texts: tokens of the older one that are wrong",
           sum(a != b for a, b in zip(seen, alone, strict=False)))
    again = list(model.generate([9, 8], 20, 1.0, seed=2, fused=fused))
    rest = [first, *model.generate([9, 8], 20, 1.0, seed=2, fused=fused)][1:]
    report("decoder", "two texts: a text after them differs", again != rest)
    report_refused("decoder of another model", ["another model"], random_half(AHEAD, "cpu").generate, [3], 4,
                   fused=fused)


def test_settings_are_not_replayed(decoder):
    """A sampler cannot change behind a launch; the settings of one text do not reach the next."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampler(1.0).temperature = 0.0
    model = random_half(replace(AHEAD, eos=()), "cpu")
    fused = decoder(model)
    greedy, drawn = (list(fused.decode(5, 0, 12, sampler)) for sampler in (Sampler(), Sampler(5.0, seed=3)))
    report("decoder", "temperature 5: the greedy text", greedy == drawn)
    report("decoder", "greedy again: another text", list(fused.decode(5, 0, 12)) != greedy)


def test_ranges_that_cannot_be(decoder):
    fused = decoder(random_half(replace(AHEAD, n_layer=2), "cpu"))
    report_refused("layer 1 of a new decoder", ["layer 1 has no input", "layer 0"], fused.launch, 1, 2)
    fused.start(7, 0)
    fused.launch(0, 1)
    fused.launch(1, 2, tokens=1)
    report_refused("layer 1 after a whole token", ["layer 1 has no input"], fused.launch, 1, 2)
    report_refused("text past the context", ["past the last of 512", "fewer tokens"],
                   lambda: list(fused.decode(7, 500, 13)))


def test_report_of_a_failure(decoder, patched):
    """Whichever call meets the error first says which sync it was."""
    fused = decoder(random_half(AHEAD, "cpu"), source=patched(*HANGS["(4)"]))
    for case, call in (("a step", lambda: fused(torch.tensor([[7]]), fused.cache, 0)),
                       ("a text", lambda: list(fused.decode(7, 0, 3)))):
        fused.failure.zero_()
        try:
            call()
            said = "no error"
        except RuntimeError as error:
            said = str(error)
        report("decoder", f"{case} that waits in vain says {said!r:.45}", "sync (4)" not in said)
