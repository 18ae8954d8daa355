"""Draws the README's figures: python assets/draw.py. The plots bench-*.svg are bench.py's."""
from html import escape
from pathlib import Path

STYLE = """
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.small { font-size: 11.5px } .big { font-size: 15px; font-weight: 600 } .soft { fill: #59636e }
.on { fill: #fff; font-size: 11.5px } .middle { text-anchor: middle } .end { text-anchor: end }
.dot { fill: #2f73b8 } .axpy { fill: #c2660a } .kv { fill: #2a8c5f } .units { fill: url(#units) }
.r0 { fill: #2f73b8 } .r1 { fill: #c2660a } .r2 { fill: #2a8c5f } .r3 { fill: #8250b8 }
.faint { fill: #e4e8ec } .none { fill: none; stroke: #8c959f } .pale { opacity: .35 }
.line { fill: none; stroke: #59636e; stroke-width: 1.4 } .dash { stroke-dasharray: 4 3 }
.sync { fill: none; stroke: #d0312d; stroke-width: 3 } .thin { stroke-width: 1.4 } .red { fill: #d0312d }
@media (prefers-color-scheme: dark) {
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
    whole = "\n".join([head, f"<style>{STYLE}\n</style>", DEFS, *shapes, "</svg>\n"])
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
    x, w, n = 20, 464, 8
    text(x, 18, "A team of C/8 threads. Each owns the same eight columns of everything, all the time.", "big")
    cells(x, 32, w, 26, n, "none", ["thread 0", "1", "2", "3", "…", "", "", "C/8 − 1"])
    cells(x, 60, w, 24, n, "dot", ["8 of x"] * n)
    cells(x, 86, w, 24, n, "axpy", ["8 of y"] * n)
    text(500, 76, "x, the token so far: a blue row gives dot(row, x)")
    text(500, 102, "y, what it gains: an orange row adds number × row")
    arrow(8, 470, 8, 126)
    groups = [(["dot"] * 3, "q, k, v rows of my head", "shared by its cluster; all get q, k, v"),
              (["dot", "axpy"] * 2, "hidden units", "h = GELU(dot(up row, x)), y += h × down row"),
              (["kv"] * 2, "cached keys and values", "attention: o = softmax(q · k) v"),
              (["dot", "axpy"], "hidden units", ""),
              (["axpy"] * 2, "output rows of my head", "y += o[d] × row d"),
              (["dot", "axpy"] * 2, "hidden units", "more of them in blocks without a head")]
    top = y = 124
    for kinds, what, how in groups:
        text(500, y + 11, what)
        text(500, y + 26, how, "soft small")
        for kind in kinds:
            box(x, y, w - 2, 11, kind) if kind == "kv" else cells(x, y, w, 11, n, kind)
            y += 14
        y += 8
    for i, mix in enumerate(("d" * 9 + "u" * 6 + "k" * 6 + "u" * 4 + "a" * 6, "", "")):  # two without a head
        for j, at in enumerate(range(top + 10, y - 8, 7)):
            pair = ("dot", "axpy")[j % 2]
            kind = {"d": "dot", "k": "kv", "a": "axpy"}.get(mix[j:j + 1], pair)
            box(812 + 26 * i, at, 20, 5, kind + " pale")
    text(888, top + 2, "other blocks", "end small soft")
    y += 6
    path(f"M{x} {y} H888", "sync")
    text(x, y + 19, "(4) once a layer: what all blocks have added is the next x", "red")
    y += 32
    for _ in range(3):
        cells(x, y, w, 11, n, "dot pale")
        y += 14
    text(500, y - 28, "the next layer: the same again", "soft")
    text(500, y - 12, "its rows are on their way before (4) is passed", "soft small")
    text(x, y + 14, "Rows stream past; every byte is read once a token.", "soft")
    save("picture", 900, y + 24, "One decode step: rows of C stream past threads that own eight columns each")


def rows():
    text(10, 18, "The four matrices of a layer, and the LM head: all rows of C", "big")
    at = 10
    for name, many, kind, what in (("w_qkv", 3, "dot", "a row makes a q, k or v"),
                                   ("w_out, transposed", 1, "axpy", "a row is what o[d] adds"),
                                   ("w_up", 4, "dot", "a row makes h[j]"),
                                   ("w_down, transposed", 4, "axpy", "a row is what h[j] adds"),
                                   ("embed_out", 5, "dot", "a row makes a logit")):
        text(at, 44, name)
        for i in range(many * 4):
            box(at, 52 + 6 * i, 140, 4.5, kind + (" pale" if many == 5 and i > 17 else ""))
        count = "V" if many == 5 else f"{many} C" if many > 1 else "C"
        text(at, 190, f"{count} rows: {kind}", "small")
        text(at, 206, what, "small soft")
        at += 178
    for x, kind, title, other in ((10, "dot", "dot(row, x): multiply, add up, one number", "x"),
                                  (460, "axpy", "axpy: y += number × row", "y")):
        text(x, 240, title)
        for i, (label, shade) in enumerate((("row", kind), (other, "faint"))):
            text(x, 266 + 30 * i, label, "small soft")
            cells(x + 28, 252 + 30 * i, 280, 18, 8, shade)
    for i in range(8):
        text(55 + 35 * i, 279, "×", "middle small soft")
        arrow(505 + 35 * i, 271, 505 + 35 * i, 281)
    arrow(318, 276, 340, 276)
    box(346, 267, 33, 18, "dot")
    text(774, 266, "×", "soft")
    box(788, 252, 33, 18, "axpy")
    save("rows", 900, 310, "Every matrix is stored as rows of C, for two inner loops: dot and axpy")


def columns():
    text(10, 18, "A tile of 8 rows, and the C/8 threads that hold every row between them", "big")
    for x, kind, share in ((10, "dot", "x"), (520, "axpy", "y")):
        text(x, 38, "thread", "small soft")
        cells(x, 44, 320, 20, 8, "none", ["0", "1", "2", "3", "…", "", "", "C/8−1"])
        cells(x, 196, 320, 22, 8, "faint", [f"8 of {share}"] * 8)
        for r in range(8):
            cells(x, 70 + 15 * r, 320, 12, 8, kind)
            number, tail = (356, 332) if kind == "dot" else (470, 513)
            box(number, 70 + 15 * r, 40, 12, kind)
            arrow(tail, 76 + 15 * r, tail + 20, 76 + 15 * r) if kind == "dot" else None
    text(376, 60, "8 sums", "middle small")
    text(512, 60, "8 values", "end small")
    for i in range(8):
        arrow(539 + 40 * i, 187, 539 + 40 * i, 196)
    text(10, 242, "dot: each thread multiplies its columns; the team adds up")
    text(10, 260, "8 rows at once: shuffles in a warp, then one sync, (c)")
    text(470, 242, "axpy: each thread adds to its own eight of y,")
    text(470, 260, "which stay in registers; nothing is exchanged")
    save("columns", 900, 272, "A thread owns eight columns of every row, of x and of y")


def barrier():
    text(10, 18, "One layer, from left to right (not to scale)", "big")
    steps = [("S1", 40, "faint"), ("S2 q, k, v rows", 166, "dot"), ("", 56, "units"), ("S3 S4 S5", 96, "kv"),
             ("", 56, "units"), ("S6 S7 out", 84, "axpy"), ("", 84, "units")]
    y = 60
    for cluster, head in ((0, "head 0"), (1, "head 1"), (65, "no head")):
        text(10, y + 16, f"cluster {cluster}")
        text(10, y + 33, head, "small soft")
        for rank in range(2):
            at, x = y + 28 * rank, 134
            text(128, at + 15, f"rank {rank}", "end small soft")
            for words, w, kind in [("S1", 40, "faint"), ("", 542, "units")] if head == "no head" else steps:
                box(x, at, w - 2, 22, kind, words)
                x += w
            box(742, at, 30, 22, "faint", "S9")
            box(806, at, 34, 22, "faint", "S1")
        for x1, x2 in ((340, 396), (492, 548), (716, 741))[2 * (head == "no head"):]:
            arrow(x1, y + 22, x2, y + 38, "sync thin")
            arrow(x1, y + 28, x2, y + 12, "sync thin")
        y += 78
    text(10, y - 88, "…", "soft")
    for x, name in ((368, "(1)"), (520, "(2)"), (729, "(3)"), (789, "(4)")):
        text(x, 48, name, "middle red")
    path(f"M789 56 V{y - 14}", "sync")
    y += 6
    box(10, y - 11, 26, 14, "units")
    text(44, y, "S8, hidden units of this block alone: up row, down row, up row, …", "small")
    box(500, y - 11, 26, 14, "kv")
    text(534, y, "attention over this rank's cached tokens", "small")
    text(10, y + 22, "(1), (2), (3) stay within a cluster; (1) and (2) travel while hidden units are "
                     "worked on. In a layer, (4) is the only one of the whole grid.", "small soft")
    save("barrier", 850, y + 34, "A head is a cluster's, a hidden unit a block's; one sync of the grid")


def collectives():
    text(10, 18, "cluster_gather: everybody gets everything", "big")
    text(470, 18, "cluster_reduce: each rank adds up its columns", "big")
    for r in range(4):
        for x in (10 + 110 * r, 470 + 110 * r):
            text(x + 45, 42, f"rank {r}", "middle small soft")
        x = 10 + 110 * r
        box(x + 18, 52, 54, 24, f"r{r}", f"part {r}")
        arrow(165, 80, x + 45, 146)
        x = 470 + 110 * r
        arrow(591 + 23 * r, 80, x + 45, 146)
        for i in range(4):
            box(10 + 110 * r, 150 + 26 * i, 90, 24, f"r{i}", f"part {i}")
            box(x + 23 * i, 52, 21, 24, f"r{r}", f"y{i}")
            box(x, 150 + 26 * i, 90, 24, f"r{i}", f"y{r} of rank {i}")
        text(x + 45, 272, f"their sum: y{r}", "middle small")
    for x in (10, 820):
        text(x, 100, "rank 1", "small soft")
        text(x, 115, "pushes", "small soft")
    text(10, 272, "every rank's inbox: q, k, v of the head", "small")
    text(10, 302, "A push is a store into another block's shared memory that also counts its bytes on that "
                  "block's mbarrier.", "small soft")
    text(10, 318, "The wait there, (1) or (3), ends when all bytes have come: the data announces itself.",
         "small soft")
    save("collectives", 900, 330, "cluster_gather and cluster_reduce, in a cluster of four blocks")


def ring():
    text(10, 18, "Stages in shared memory, between one lane that copies and the threads that compute", "big")
    for i, kind in enumerate(["faint"] * 2 + ["axpy", "dot"] * 2 + ["dot pale"] + ["faint"] * 2):
        box(80 + 80 * i, 64, 74, 30, kind, "empty" if kind == "faint" else "")
    for x, words in ((277, "workers read here"), (597, "producer's copy lands here")):
        text(x, 52, words, "middle small")
        arrow(x, 55, x, 63)
    path("M800 79 H826 V106 H54 V79 H76", "line", "tip")
    text(80, 124, "(F) full: its bytes have landed, workers may read it", "small soft")
    text(796, 124, "(E) empty: all warps have read it, the producer may refill it", "end small soft")
    for y, words in ((172, "copies"), (206, "arithmetic"), (252, "full stages")):
        text(10, y, words)
    box(100, 158, 700, 20, "units")
    for x, w, kind, words in ((100, 300, "units", ""), (402, 46, "faint", "S9"), (454, 44, "faint", "S1"),
                              (500, 300, "units", "")):
        box(x, 192, w, 20, kind, words)
    path("M100 276 H400 L500 236 L600 276 H800")
    path("M100 228 H800", "line dash")
    text(796, 242, "ring full", "end small soft")
    text(560, 258, "what has piled up is used up", "small soft")
    path("M451 150 V284", "sync")
    text(451, 300, "(4)", "middle red")
    text(100, 300, "time → (not to scale)", "small soft")
    text(490, 300, "copies wait for room and their pace, not for (4)", "small soft")
    save("ring", 850, 310, "Copies run ahead through a ring of stages, past barriers")


def sums():
    text(10, 18, "Clusters add to x in the order in which they finish. u = 2⁻²²", "big")
    as_floats = ("(4 + u) + u", "= 4"), ("4 + (u + u)", "= 4.00000048")
    as_integers = ("(16777216 + 1) + 1", "= 16777218"), ("16777216 + (1 + 1)", "= 16777218")
    for x, kind, title, sides in ((10, "axpy", "as fp32: another order, other bits", as_floats),
                                  (470, "dot", "as integers, in units of u: always the same", as_integers)):
        text(x, 46, title)
        for i, (left, right) in enumerate(sides):
            box(x, 56 + 34 * i, 200, 28, kind, left)
            text(x + 212, 75 + 34 * i, right)
    x = 40
    text(10, 160, "bit", "small soft")
    for w, kind, bits, what in ((130, "faint", "63", "sign, NaN mark"),
                                (150, "none", "55", "room for the sum"),
                                (220, "dot", "46", "what one cluster adds: < 65536"),
                                (210, "none", "30", "its fraction, in units of 2⁻²²"),
                                (120, "axpy", "8", "additions so far")):
        box(x, 146, w - 2, 26, kind, what)
        text(x + 2, 186, bits, "small soft")
        x += w
    text(x - 4, 186, "0", "small soft end")
    save("sums", 900, 198, "Sums of integers do not depend on their order")


for figure in (picture, rows, columns, barrier, collectives, ring, sums):
    figure()
