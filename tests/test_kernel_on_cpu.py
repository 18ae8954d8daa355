"""The kernel's own source on a CPU, beyond its block: ranges of layers, several tokens, texts, edges."""
from itertools import pairwise
from unittest.mock import MagicMock

import pytest
import torch

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
