"""Draws the figures of README.md and docs/: python assets/draw.py. plot.py draws the plots bench-*.svg.

A figure brings its own background, and colours for a light and for a dark screen. An image cannot see the
page around it, so with its own background it is legible on any page, whichever of the two the browser picks.
"""
import sys
from html import escape
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model import Sampler

STYLE = """
.card { fill: #fff; stroke: #d0d7de }
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.small { font-size: 11.5px } .big { font-size: 15px; font-weight: 600 } .soft { fill: #59636e }
.on { fill: #fff; font-size: 11.5px } .middle { text-anchor: middle } .end { text-anchor: end }
.dot { fill: #2f73b8 } .axpy { fill: #c2660a } .kv { fill: #2a8c5f } .units { fill: url(#units) }
.r0 { fill: #2f73b8 } .r1 { fill: #c2660a } .r2 { fill: #2a8c5f } .r3 { fill: #8250b8 }
.faint { fill: #e4e8ec } .none { fill: none; stroke: #8c959f } .pale { opacity: .35 }
.line { fill: none; stroke: #59636e; stroke-width: 1.4 } .dash { stroke-dasharray: 4 3 }
.sync { fill: none; stroke: #d0312d; stroke-width: 3 } .thin { stroke-width: 1.4 } .red { fill: #d0312d }
@media (prefers-color-scheme: dark) {
  .card { fill: #0d1117; stroke: #30363d }
  text { fill: #e6edf3 } .soft { fill: #9da7b1 } .on { fill: #fff } .faint { fill: #2d333b }
  .line { stroke: #9da7b1 } .sync { stroke: #ff6b64 } .red { fill: #ff6b64 }
}"""
DEFS = """<defs>
<pattern id="units" width="8" height="8" patternUnits="userSpaceOnUse">
<rect class="dot" width="4" height="8"/><rect class="axpy" x="4" width="4" height="8"/></pattern>
<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto"
 markerUnits="userSpaceOnUse"><path d="M0 0 8 4 0 8z" class="soft"/></marker>
<marker id="redtip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto"
 markerUnits="userSpaceOnUse"><path d="M0 0 8 4 0 8z" class="red"/></marker></defs>"""
shapes = []


def save(name, width, height, title):
    """Writes what has been drawn so far."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{escape(title)}</title>'
    card = f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" class="card" rx="6"/>'
    whole = "\n".join([head, f"<style>{STYLE}\n</style>", DEFS, card, *shapes, "</svg>\n"])
    Path(__file__).with_name(name + ".svg").write_text(whole)
    shapes.clear()


def text(x, y, words, kind=""):
    shapes.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>')


def box(x, y, w, h, kind, words=""):
    shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" class="{kind}" rx="1.5"/>')
    if words:
        plain = kind.split()[0] in ("faint", "none")
        text(x + w / 2, y + h / 2 + 4, words, "middle small" if plain else "middle on")


def path(d, kind="line", tip=None):
    shapes.append(f'<path d="{d}" class="{kind}"' + (f' marker-end="url(#{tip})"' if tip else "") + "/>")


def arrow(x1, y1, x2, y2, kind="line"):
    path(f"M{x1:g} {y1:g} {x2:g} {y2:g}", kind, "redtip" if "sync" in kind else "tip")


def cells(x, y, w, h, n, kind, words=()):
    """A row of C: n threads' pieces side by side."""
    for i in range(n):
        box(x + i * w / n, y, w / n - 2, h, kind, words[i] if words else "")


def picture():
    x, w, n = 30, 464, 8
    text(x, 28, "A team of C/8 threads. Each thread owns the same eight columns of every row.", "big")
    cells(x, 42, w, 26, n, "none", ["thread 0", "1", "2", "3", "…", "", "", "C/8 − 1"])
    cells(x, 70, w, 24, n, "dot", ["8 of x"] * n)
    cells(x, 96, w, 24, n, "axpy", ["8 of y"] * n)
    text(510, 86, "x, the layer's input: a blue row gives dot(row, x)")
    text(510, 112, "y, what the layer adds: an orange row adds number × row")
    arrow(18, 480, 18, 136)
    groups = [(["dot"] * 3, "q, k, v rows of a head", "the blocks of a cluster share them"),
              (["dot", "axpy"] * 2, "hidden units", "h = GELU(dot(up row, x)), y += h × down row"),
              (["kv"] * 2, "cached keys and values", "attention: o = softmax(q · k) v"),
              (["dot", "axpy"], "hidden units", ""),
              (["axpy"] * 2, "output rows of the head", "y += o[d] × row d"),
              (["dot", "axpy"] * 2, "hidden units", "more of them in blocks without a head")]
    top = y = 134
    for kinds, what, how in groups:
        text(510, y + 11, what)
        text(510, y + 26, how, "soft small")
        for kind in kinds:
            box(x, y, w - 2, 11, kind) if kind == "kv" else cells(x, y, w, 11, n, kind)
            y += 14
        y += 8
    for i, mix in enumerate(("d" * 9 + "u" * 6 + "k" * 6 + "u" * 4 + "a" * 6, "", "")):  # two without a head
        for j, at in enumerate(range(top + 10, y - 8, 7)):
            pair = ("dot", "axpy")[j % 2]
            kind = {"d": "dot", "k": "kv", "a": "axpy"}.get(mix[j:j + 1], pair)
            box(822 + 26 * i, at, 20, 5, kind + " pale")
    text(898, top + 2, "other blocks", "end small soft")
    y += 6
    path(f"M{x} {y} H898", "sync")
    text(x, y + 19, "(4) once a layer: x of the next layer is complete when every cluster has added to it",
         "red")
    y += 32
    for _ in range(3):
        cells(x, y, w, 11, n, "dot pale")
        y += 14
    text(510, y - 28, "the next layer: the same again", "soft")
    text(510, y - 12, "its rows are on their way before (4) is passed", "soft small")
    text(x, y + 14, "Rows stream past the threads; a token reads every byte of the weights once.", "soft")
    save("picture", 920, y + 30,
         "One decode step: rows of weights stream past threads that own eight columns each")


def rows():
    text(20, 28, "The four matrices of a layer, and the LM head: all of them rows of C numbers", "big")
    at = 20
    for name, many, kind, what in (("w_qkv", 3, "dot", "a row makes a q, k or v"),
                                   ("w_out, transposed", 1, "axpy", "a row is what o[d] adds"),
                                   ("w_up", 4, "dot", "a row makes h[j]"),
                                   ("w_down, transposed", 4, "axpy", "a row is what h[j] adds"),
                                   ("embed_out", 5, "dot", "a row makes a logit")):
        text(at, 54, name)
        for i in range(many * 4):
            box(at, 62 + 6 * i, 140, 4.5, kind + (" pale" if many == 5 and i > 17 else ""))
        count = "V" if many == 5 else f"{many} C" if many > 1 else "C"
        text(at, 200, f"{count} rows: {kind}", "small")
        text(at, 216, what, "small soft")
        at += 178
    for x, kind, title, other in ((20, "dot", "dot(row, x): multiply, add up, one number", "x"),
                                  (470, "axpy", "axpy: y += number × row", "y")):
        text(x, 250, title)
        for i, (label, shade) in enumerate((("row", kind), (other, "faint"))):
            text(x, 276 + 30 * i, label, "small soft")
            cells(x + 28, 262 + 30 * i, 280, 18, 8, shade)
    for i in range(8):
        text(65 + 35 * i, 289, "×", "middle small soft")
        arrow(515 + 35 * i, 281, 515 + 35 * i, 291)
    arrow(328, 286, 350, 286)
    box(356, 277, 33, 18, "dot")
    text(784, 276, "×", "soft")
    box(798, 262, 33, 18, "axpy")
    save("rows", 920, 326, "Every matrix is stored as rows of C numbers, for two inner loops: dot and axpy")


def columns():
    text(20, 28, "A tile of 8 rows, and the C/8 threads that hold every row between them", "big")
    for x, kind, share in ((20, "dot", "x"), (540, "axpy", "y")):
        text(x, 48, "thread", "small soft")
        cells(x, 54, 320, 20, 8, "none", ["0", "1", "2", "3", "…", "", "", "C/8−1"])
        cells(x, 206, 320, 22, 8, "faint", [f"8 of {share}"] * 8)
        for r in range(8):
            cells(x, 80 + 15 * r, 320, 12, 8, kind)
            number, tail = (366, 342) if kind == "dot" else (490, 533)
            box(number, 80 + 15 * r, 40, 12, kind)
            arrow(tail, 86 + 15 * r, tail + 20, 86 + 15 * r) if kind == "dot" else None
    text(386, 70, "8 sums", "middle small")
    text(532, 70, "8 numbers", "end small")
    for i in range(8):
        arrow(559 + 40 * i, 197, 559 + 40 * i, 206)
    text(20, 252, "dot: each thread multiplies its columns, then the team adds")
    text(20, 270, "up 8 rows at once: shuffles in each warp, one barrier (c)")
    text(490, 252, "axpy: each thread adds to its own eight columns of y,")
    text(490, 270, "which stay in its registers; threads exchange nothing")
    save("columns", 900, 286, "A thread owns eight columns of every row, of x and of y")


def ring():
    text(20, 28, "Slots in shared memory, between one thread that copies and the threads that compute", "big")
    for i, kind in enumerate(["faint"] * 2 + ["axpy", "dot"] * 2 + ["dot pale"] + ["faint"] * 2):
        box(90 + 80 * i, 74, 74, 30, kind, "empty" if kind == "faint" else "")
    for x, words in ((287, "workers read this slot"), (607, "a copy lands in this slot")):
        text(x, 62, words, "middle small")
        arrow(x, 65, x, 73)
    path("M810 89 H836 V116 H64 V89 H86", "line", "tip")
    text(90, 134, "full: the slot's bytes have landed, workers may read", "small soft")
    text(806, 134, "empty: all warps have read the slot, the producer may refill it", "end small soft")
    for y, words in ((182, "copies"), (216, "arithmetic"), (262, "full slots")):
        text(20, y, words)
    box(110, 168, 700, 20, "units")
    for x, w, kind, words in ((110, 300, "units", ""),
                              (412, 46, "faint", "sum y"), (464, 44, "faint", "read x"),
                              (510, 300, "units", "")):
        box(x, 202, w, 20, kind, words)
    path("M110 286 H410 L510 246 L610 286 H810")
    path("M110 238 H810", "line dash")
    text(806, 252, "all slots full", "end small soft")
    text(570, 268, "then workers use up what has landed", "small soft")
    path("M461 160 V294", "sync")
    text(461, 310, "(4)", "middle red")
    text(110, 310, "time → (not to scale)", "small soft")
    text(500, 310, "copies wait for an empty slot, not for (4)", "small soft")
    save("ring", 870, 326, "Copies run ahead through a ring of slots, past the sync of the grid")


def collectives():
    text(20, 28, "cluster_gather: every rank gets every part", "big")
    text(480, 28, "cluster_reduce: each rank adds up its columns", "big")
    for r in range(4):
        for x in (20 + 110 * r, 480 + 110 * r):
            text(x + 45, 52, f"rank {r}", "middle small soft")
        x = 20 + 110 * r
        box(x + 18, 62, 54, 24, f"r{r}", f"part {r}")
        arrow(175, 90, x + 45, 156)
        x = 480 + 110 * r
        arrow(601 + 23 * r, 90, x + 45, 156)
        for i in range(4):
            box(20 + 110 * r, 160 + 26 * i, 90, 24, f"r{i}", f"part {i}")
            box(x + 23 * i, 62, 21, 24, f"r{r}", f"y{i}")
            box(x, 160 + 26 * i, 90, 24, f"r{i}", f"y{r} of rank {i}")
        text(x + 45, 282, f"their sum: y{r}", "middle small")
    for x in (20, 830):
        text(x, 110, "rank 1", "small soft")
        text(x, 125, "pushes", "small soft")
    text(20, 282, "the inbox of each rank: q, k, v of the head", "small")
    text(20, 312, "A push is a store into another block's shared memory that also counts its bytes on a "
                  "barrier of that block.", "small soft")
    text(20, 328, "A block waits at (1) or (3) until all bytes of its inbox have come. It needs no other "
                  "signal.", "small soft")
    save("collectives", 920, 344, "cluster_gather and cluster_reduce, in a cluster of four blocks")


def words():
    text(20, 28, "One word of x: 64 bits that hold a value and count its additions", "big")
    x = 50
    text(20, 64, "bit", "small soft")
    for w, kind, bits, what in ((130, "faint", "63", "sign, NaN mark"),
                                (150, "none", "55", "room for the sum"),
                                (220, "dot", "46", "one cluster's part, below 65536"),
                                (210, "dot", "30", "its fraction, units of 2⁻²²"),
                                (120, "axpy", "8", "additions so far")):
        box(x, 50, w - 2, 26, kind, what)
        text(x + 2, 90, bits, "small soft")
        x += w
    text(x - 4, 90, "0", "small soft end")
    text(20, 124, "66 clusters and the carrier add to each word: 67 additions. A reader looks at the count.")
    for i, (count, then) in enumerate((("67", "complete"), ("66", "read again"), ("67", "complete"),
                                       ("67", "complete"))):
        at = 50 + 210 * i
        box(at, 138, 130, 24, "dot" if count == "67" else "dot pale", "value")
        box(at + 132, 138, 50, 24, "axpy" if count == "67" else "axpy pale", count)
        text(at + 91, 180, then, "middle small" + (" red" if count == "66" else " soft"))
    text(20, 206, "The value and its count arrive in one addition, so no flag and no fence has to follow the "
                  "data.", "small soft")
    save("words", 900, 222, "A word of x carries its own count of additions")


def sums():
    text(20, 28, "Clusters add to x in the order in which they finish. u = 2⁻²²", "big")
    as_floats = ("(4 + u) + u", "= 4"), ("4 + (u + u)", "= 4.00000048")
    as_integers = ("(16777216 + 1) + 1", "= 16777218"), ("16777216 + (1 + 1)", "= 16777218")
    for x, kind, title, sides in ((20, "axpy", "fp32: another order, other bits", as_floats),
                                  (480, "dot", "integers, in units of u: the same bits", as_integers)):
        text(x, 56, title)
        for i, (left, right) in enumerate(sides):
            box(x, 66 + 34 * i, 200, 28, kind, left)
            text(x + 212, 85 + 34 * i, right)
    text(20, 168, "The carrier: no buffer is cleared", "big")
    text(20, 190, "The buffer still holds 5, the x of an earlier layer. x is 8. Two clusters add 1 and 2. "
                  "The carrier adds 8 − 5 = 3.")
    orders = ((("old", "5"), ("carrier", "+ 3"), ("cluster 0", "+ 1"), ("cluster 1", "+ 2")),
              (("old", "5"), ("cluster 1", "+ 2"), ("carrier", "+ 3"), ("cluster 0", "+ 1")))
    for i, order in enumerate(orders):
        y, total = 204 + 50 * i, 0
        for j, (by, what) in enumerate(order):
            kind = {"old": "none", "carrier": "r2"}.get(by, "dot")
            box(20 + 150 * j, y, 118, 24, kind, f"{by}: {what}")
            total += int(what.replace(" ", ""))
            text(79 + 150 * j, y + 39, str(total), "middle small soft")
            arrow(140 + 150 * j, y + 12, 166 + 150 * j, y + 12)
        box(620, y, 118, 24, "axpy", f"next x: {total}")
    text(752, 220, "8 + 1 + 2", "soft")
    text(752, 270, "in any order", "soft")
    save("sums", 900, 312,
         "Sums of integers do not depend on their order, and the carrier replaces the old x")


def drawing(seed=32):
    """With top-p 0.8, the largest noisy logit is refused, and the largest among likelier tokens is kept."""
    tokens, top_p = ("sea", "house", "garden", "ship", "moon"), 0.8
    logits = np.array([4.0, 3.2, 2.6, 1.4, 0.5])
    mass = np.exp(logits - logits[0])
    share = mass / mass.sum()
    before = np.cumsum(share) - share  # what likelier tokens hold
    noisy = logits + Sampler(1.0, seed=seed).noise(torch.arange(5), position=7).numpy()
    first = noisy.argmax()
    second = noisy[:first].argmax()
    assert before[first] >= top_p > before[second], "this seed does not show a refusal"
    text(20, 28, "Drawing a token is an argmax over noisy logits (temperature 1, top-p 0.8)", "big")
    for x, name in ((20, "token"), (120, "logit"), (186, "share"), (252, "likelier tokens hold"),
                    (410, "noise"), (480, "noisy logit = logit + noise")):
        text(x, 54, name, "small soft")
    for i, token in enumerate(tokens):
        y = 64 + 30 * i
        text(20, y + 15, token)
        text(120, y + 15, f"{logits[i]:.1f}")
        text(186, y + 15, f"{share[i]:.0%}")
        text(252, y + 15, f"{before[i]:.0%}" + (", so it is cut" if before[i] >= top_p else ""),
             "" if before[i] < top_p else "soft")
        text(410, y + 15, f"{noisy[i] - logits[i]:+.1f}".replace("-", "−"))
        kind = "axpy" if i == first else "r2" if i == second else "dot"
        box(480, y, 32 * max(noisy[i], 0.5), 20, kind + (" pale" if i > first else ""), f"{noisy[i]:.1f}")
        if i in (first, second):
            what = "largest of all" if i == first else "largest of the likelier"
            text(492 + 32 * noisy[i], y + 15, what)
    y = 64 + 30 * len(tokens) + 22
    text(20, y, f"1. All blocks agree on the largest noisy logit: “{tokens[first]}”. The likelier tokens hold "
                f"{before[first]:.0%}, so top-p refuses it.")
    text(20, y + 20, f"2. They vote again, among the likelier tokens: “{tokens[second]}”. "
                     f"The tokens before it hold {before[second]:.0%}, so it is kept.")
    text(20, y + 42, "The noise is a function of seed, position and token. A refusal draws no new noise.",
         "small soft")
    save("drawing", 900, y + 58,
         "Drawing a token is an argmax: logits plus noise, then a test of the candidate")


def layer():
    text(20, 28, "One layer, from left to right (not to scale)", "big")
    steps = [("S0 S1", 40, "faint"), ("S2 q, k, v rows", 166, "dot"), ("", 56, "units"),
             ("S3 S4 S5", 96, "kv"), ("", 56, "units"), ("S6 S7 out", 84, "axpy"), ("", 84, "units")]
    y = 70
    for cluster, head in ((0, "head 0"), (1, "head 1"), (65, "no head")):
        text(20, y + 16, f"cluster {cluster}")
        text(20, y + 33, head, "small soft")
        for rank in range(2):
            at, x = y + 28 * rank, 144
            text(138, at + 15, f"rank {rank}", "end small soft")
            for name, w, kind in [("S0 S1", 40, "faint"), ("", 542, "units")] if head == "no head" else steps:
                box(x, at, w - 2, 22, kind, name)
                x += w
            box(752, at, 30, 22, "faint", "S9")
            box(814, at, 42, 22, "faint", "S0 S1")
        for x1, x2 in ((350, 406), (502, 558), (726, 751))[2 * (head == "no head"):]:
            arrow(x1, y + 22, x2, y + 38, "sync thin")
            arrow(x1, y + 28, x2, y + 12, "sync thin")
        y += 78
    text(20, y - 88, "…", "soft")
    for x, name in ((378, "(1)"), (530, "(2)"), (739, "(3)"), (799, "(4)")):
        text(x, 58, name, "middle red")
    path(f"M799 66 V{y - 14}", "sync")
    y += 6
    box(20, y - 11, 26, 14, "units")
    text(54, y, "S8, hidden units: up row, down row, up row, …", "small")
    box(350, y - 11, 26, 14, "kv")
    text(384, y, "RoPE, attention over cached tokens", "small")
    box(610, y - 11, 26, 14, "faint")
    text(644, y, "read x, LayerNorm; sum y", "small")
    text(20, y + 22, "(1), (2) and (3) are syncs of a cluster; (1) and (2) travel while the block works on "
                     "hidden units. (4) is the layer's only sync of the grid.", "small soft")
    save("layer", 870, y + 38,
         "A cluster computes a head, each block computes hidden units, one sync of the grid")


for figure in (picture, rows, columns, ring, collectives, words, sums, drawing, layer):
    figure()
