"""The kernel's own source on a CPU, beyond its block: ranges of layers, several tokens, texts, edges."""
from dataclasses import replace
from itertools import pairwise
from unittest.mock import MagicMock

import pytest
import torch

from model import Pythia, Sampler
from tests import helpers
from tests.helpers import AHEAD, SMALL, random_half, report, report_tokens

pytest_plugins = ["tests.fixtures"]


def test_simulated_ranges(simulated):
    fused, L = simulated(random_half(SMALL, "cpu"), 3, cluster=2), SMALL.n_layer
    fused.cache.normal_(generator=torch.Generator().manual_seed(0))

    def logits(*cuts):
        fused.start(7, 100)
        for first, last in pairwise(cuts):
            fused.launch(first, last, tokens=int(last == L))
        return fused.logits.clone()
    whole, ranges = logits(0, L), ((0, 1, L), (0, 2, L), (0, 1, 2, L), (0, L))
    unlike = sum(not torch.equal(logits(*cuts), whole) for cuts in ranges)
    report("on a CPU", f"steps in several launches, of {len(ranges)}, with other bits", unlike)


@pytest.mark.parametrize("config, tuning", [(SMALL, {}), (AHEAD, {"threads": 128})], ids=["70m", "14m"])
def test_simulated_tokens(simulated, config, tuning):
    report_tokens("on a CPU", simulated(random_half(config, "cpu"), 3, cluster=2, **tuning), 0, (3, 1, 2))


def test_simulated_decode(simulated, monkeypatch):
    """Texts in launches of Fused.TOKENS, and of what is left, against steps of one token."""
    fused = simulated(random_half(AHEAD, "cpu"), 3, cluster=2, threads=128)
    fused.use_graph, launch, tokens = False, fused.launch, []
    monkeypatch.setattr(fused, "launch", lambda *args: (tokens.append(args[2]), launch(*args)))
    for name in ("stream", "current_stream"):  # there is nothing to wait for
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    fused.cache.fill_(0)
    fused.start(5, 0)
    for _ in range(19):
        launch(0, AHEAD.n_layer, tokens=1)
    text, wrong = fused.history[:19].tolist(), 0
    for steps, launches in ((0, []), (1, [1]), (8, [8]), (9, [8, 1]), (19, [8, 8, 3])):
        tokens.clear()
        fused.history.zero_()
        wrong += list(fused.decode(5, 0, steps)) != text[:steps] or tokens != launches
    report("on a CPU", "texts of 0 to 19 tokens, with other tokens or launches", wrong)


def test_simulated_edges(simulated):
    model, V = random_half(SMALL, "cpu"), SMALL.vocab
    fused = simulated(model, 3, cluster=2)

    def logits(token):
        fused.cache.fill_(0)
        fused.start(token, 0)
        fused.launch(0, SMALL.n_layer, tokens=1)
        return fused.logits.clone()
    for token, instead in ((-1, 0), (V, V - 1)):  # -1 stands where logits were not finite
        report("edges on a CPU", f"token {token}: logits unlike those of {instead}",
               not torch.equal(logits(token), logits(instead)))
    helpers.report_edges("edges on a CPU", model, fused)


def test_simulated_draws(simulated):
    """Each token is the one that Sampler draws from the kernel's logits, by one vote, or by several."""
    fused = simulated(random_half(AHEAD, "cpu"), 3, cluster=2, threads=128)
    fused.cache.normal_(generator=torch.Generator().manual_seed(0))
    for settings in helpers.DRAWS:
        wrong, votes, sampler = 0, int(fused.state[3]), Sampler(*settings, seed=7)
        fused.start(5, 0, sampler)
        for position in range(1, 21):
            fused.launch(0, AHEAD.n_layer, tokens=1)
            wrong += int(fused.state[0]) != int(sampler(fused.logits, position))
        votes = int(fused.state[3]) - votes
        report("on a CPU", f"draws of {settings}, of 20, in {votes} votes, unlike Sampler's", wrong)
        several = settings[1] == 1 or settings[2] == 1e-9  # where most candidates are not kept
        report("on a CPU", "draws by several votes, if there have to be", several and votes < 30)


@pytest.mark.parametrize("settings", helpers.DRAWS)
def test_simulated_frequencies(simulated, settings):
    model = random_half(replace(helpers.CHI_SQUARE, mlp=8, context=64), "cpu")
    logits, drawn = helpers.flat_logits(model), []
    fused = simulated(model, 2, cluster=1, threads=32)
    for seed in range(10):
        fused.start(5, 0, Sampler(*settings, seed))
        for _ in range(8):
            fused.launch(0, 1, tokens=8)
        drawn += fused.history.tolist()
    helpers.report_frequencies("on a CPU", logits, settings, drawn)


def test_simulated_text(simulated):
    """Greedy and drawn tokens of tiny-pythia: those of the reference in fp32, with the same seed."""
    full = Pythia.from_pretrained(helpers.TINY)
    model = Pythia.from_pretrained(helpers.TINY, dtype=torch.float16)
    fused, n = simulated(model, 4, cluster=1, extra={"MIN_BLOCKS": 4}), 8
    for settings in ((0.0, None, None), (0.8, 50, 0.95)):
        first, *text = full.generate([5, 6, 7], n + 1, *settings, seed=3)
        model(torch.tensor([[5, 6, 7]]), fused.cache, 0)
        fused.start(first, 3, Sampler(*settings, seed=3))
        fused.launch(0, model.config.n_layer, tokens=n)
        report("on a CPU", f"tiny-pythia, {settings}: tokens of {n} unlike the reference's",
               sum(a != b for a, b in zip(fused.history[3:3 + n].tolist(), text, strict=True)))
