"""fused_block.cu in numpy: its clusters, ranks, teams, stages and sums, as loops that a debugger can follow.

    python emulator/emulator.py                           one token of tiny-pythia, compared with float64
    python emulator/emulator.py --explain pythia-2.8b     how the work is laid out; needs no GPU, no compiler

A function here that mirrors a function of the kernel has the same name and order. Arithmetic is float64.
Thread blocks run one after another, so a sync is the place where one loop over blocks ends and the next loop
begins. Comments such as (4) are the kernel's names of syncs. The constants are read from the kernel's source.
Data passes from producer to workers in order and without a label, as in the ring: if the workers expect
a different tile from the one that the producer copies, results are wrong. What has not arrived is NaN.
"""
import argparse
import math
import re
import sys
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))  # for `python emulator/emulator.py`
import build
from build import SHARED_BYTES, constants
from checkpoint import Refused
from model import Config, Pythia

SOURCE = build.SOURCE.read_text()

# ---- constants ---------------------------------------------------------------------------------------------

def evaluate(expression, names):
    """The value of a C++ expression, which may contain `names` {name: number}."""
    condition, choice, rest = expression.partition(" ? ")
    if choice:
        yes, _, no = rest.partition(" : ")
        return evaluate(yes if evaluate(condition, names) else no, names)
    python = re.sub(r"(?<=[\d.])(f|ll)\b|(?<=\d)'", "", expression)
    for cpp, word in (("/", "//"), ("&&", "and"), ("||", "or")):
        python = python.replace(cpp, word)
    return eval(python, {"ceil_div": ceil_div}, names)


def ceil_div(a, b):
    return -(-a // b)


def kernel_constants(defines):
    """Every constexpr number of fused_block.cu as an attribute, for the -D constants of build.constants.

    Two more attributes: .column [TEAM, COLS]: the columns that a thread of a team owns; .row [TEAMS,
    TEAM_LANES]: the row of a tile that a lane finishes. Raises Refused where a static_assert of the kernel
    would fail.
    """
    k = dict(defines)
    for several in re.findall(r"constexpr (?:int|float|long long) (\w+ = [^;]*);", SOURCE):
        for one in re.split(r", (?=\w+ = )", several):
            name, _, expression = one.partition(" = ")
            k[name] = evaluate(expression, k)
    for condition, why in re.findall(r'static_assert\(([^"]*),\s+"([^"]*)"\);', SOURCE):
        if "sizeof" not in condition and not evaluate(condition, k):
            raise Refused(f"the kernel has no code for these sizes: {why}")
    column, = re.findall(r"int column\(int i\) const \{ return (.*?); \}", SOURCE)
    row, = re.findall(r"const int my_row = (.*?);", SOURCE)
    threads, columns = np.arange(k["TEAM"])[:, None], np.arange(k["COLS"])
    k["column"] = evaluate(column, k | {"team_thread": threads, "i": columns})
    k["row"] = evaluate(row, k | {"team": np.arange(k["TEAMS"])[:, None], "lane": np.arange(k["TEAM_LANES"])})
    return SimpleNamespace(**k)


# ---- who does what -----------------------------------------------------------------------------------------

Plan = namedtuple("Plan", "rank cluster clusters units filler first_cached end_cached")


class Portion(namedtuple("Portion", "size tiled first_tiled first_rest blocks")):
    """The rows that one block is dealt: `tiled` rows, in tiles dealt out in turn to `blocks` blocks, then a
    short stretch."""

    def at(self, i):
        """The number of the block's `i`-th row, for an i that is a multiple of TILE_ROWS."""
        return self.first_tiled + i * self.blocks if i < self.tiled else self.first_rest + i - self.tiled


def deal(k, first, n, index, blocks):
    """Which of the rows first..first + n - 1 block `index` (of `blocks`) gets."""
    tiled = n // blocks // k.TILE_ROWS * k.TILE_ROWS
    rest = n - tiled * blocks
    begin, end = rest * index // blocks, rest * (index + 1) // blocks
    first_rest = first + tiled * blocks + begin
    return Portion(tiled + end - begin, tiled, first + index * k.TILE_ROWS, first_rest, blocks)


def make_plan(k, block, blocks, position):
    """The plan of one of `blocks` thread blocks, for a token that has `position` tokens before it."""
    rank, cluster, clusters = block % k.RANKS, block // k.RANKS, blocks // k.RANKS
    heads, busy = k.NH // clusters, k.NH % clusters * k.RANKS
    cost_bytes = (8 * k.HS * k.C + 2 * k.KV_COST * k.HS * position) // k.RANKS + k.ATTENTION_BYTES
    cost_grains = 64 * cost_bytes // k.C
    many_grains = (256 * k.MLP + cost_grains * k.NH * k.RANKS) // blocks
    few_grains = max(0, many_grains - (heads + 1) * cost_grains)
    units_of_busy = few_grains * busy // 256
    units = (deal(k, 0, units_of_busy, block, busy) if block < busy else
             deal(k, units_of_busy, k.MLP - units_of_busy, block - busy, blocks - busy))
    slices = 2 * (heads + (block < busy)) + 1
    filler = ceil_div(ceil_div(units.size, slices), k.TILE_ROWS) * k.TILE_ROWS
    tokens = ceil_div(position, k.RANKS)
    first_cached, end_cached = min(tokens * rank, position), min(tokens * (rank + 1), position)
    return Plan(rank, cluster, clusters, units, filler, first_cached, end_cached)


# What a slot of the ring holds: n rows of a matrix from `first` on, with the biases of `biases` rows; or, as
# matrix "kv", k and v of n cached tokens of a head.
Slot = namedtuple("Slot", "matrix layer head first n biases bytes")


def producer(k, block, blocks, position, first_layer, end_layer, lm_head):
    """Yields a block's Slots for one token in the order in which its producer copies them."""
    def rows(matrix, layer, first, last):
        for row in range(first, last, k.TILE_ROWS):
            n = min(k.TILE_ROWS, last - row)
            for done in range(0, n, k.HALF_TILE_ROWS):
                part = min(k.HALF_TILE_ROWS, n - done)
                biases = n if matrix in ("w_qkv", "w_up") and done == 0 else 0
                bias_bytes = ceil_div(row % 8 + n, 8) * 16 if biases else 0
                yield Slot(matrix, layer, None, row + done, part, biases, part * k.C * 2 + bias_bytes)

    def rows_of(matrix, layer, portion, done, end):
        for i in range(done, end, k.TILE_ROWS):
            row = portion.at(i)
            for name in matrix:
                yield from rows(name, layer, row, row + min(k.TILE_ROWS, end - i))

    def tokens(layer, head, first, last):
        for t in range(first, last, k.KV_POSITIONS):
            n = min(k.KV_POSITIONS, last - t)
            yield Slot("kv", layer, head, t, n, 0, 2 * n * k.HS * 2)

    plan, mlp = make_plan(k, block, blocks, position), ["w_up", "w_down"]
    for layer in range(first_layer, end_layer):
        done, size = 0, plan.units.size
        for h in range(plan.cluster, k.NH, plan.clusters):
            qkv, out = h * 3 * k.HS + plan.rank * k.QKV_ROWS, h * k.HS + plan.rank * k.OUT_ROWS
            yield from rows("w_qkv", layer, qkv, qkv + k.QKV_ROWS)
            yield from rows_of(mlp, layer, plan.units, done, min(done + plan.filler, size))
            done = min(done + plan.filler, size)
            yield from tokens(layer, h, plan.first_cached, plan.end_cached)
            yield from rows_of(mlp, layer, plan.units, done, min(done + plan.filler, size))
            done = min(done + plan.filler, size)
            yield from rows("w_out", layer, out, out + k.OUT_ROWS)
        yield from rows_of(mlp, layer, plan.units, done, size)
    if lm_head:
        lm_rows = deal(k, 0, k.V, block, blocks)
        yield from rows_of(["embed_out"], -1, lm_rows, 0, lm_rows.size)


# ---- the workers -------------------------------------------------------------------------------------------

class Worker:
    """One thread block. (In the kernel, a Worker is one thread.) Arrays hold the registers of all its
    threads: x [TEAM, COLS], the same in all teams; y [TEAMS, TEAM, COLS]. A push is an assignment to a peer's
    inbox."""

    def __init__(self, grid, block):
        k = self.k = grid.k
        self.grid, self.block, self.plan = grid, block, make_plan(k, block, grid.blocks, grid.position)
        self.ring = producer(k, block, grid.blocks, grid.position, *grid.range)
        self.qkv = np.full(3 * k.HS, np.nan)                                # (1) inbox
        self.rank_o = np.full((k.RANKS, k.OUT_ROWS), np.nan)                   # (2) inbox
        self.rank_peak_denom = np.full((k.RANKS, 2), np.nan)                        # (2) inbox
        self.sums = np.full((k.RANKS * k.TEAMS, k.OWN), np.nan)                 # (3) inbox

    def in_rank(self, rank):
        return self.grid.workers[self.plan.cluster * self.k.RANKS + rank]

    def wait_full(self):
        """(F) The next slot of the ring, its biases, and how often each of its values has been used."""
        at, k, grid = next(self.ring), self.k, self.grid
        rows = slice(at.first, at.first + at.n)
        if at.matrix == "kv":
            slot = np.full((2, k.KV_POSITIONS, k.HS), np.nan)
            slot[:, :at.n] = grid.cache[at.layer, :, 0, at.head, rows].double()
            return slot, None, grid.touched["kv"][at.layer, at.head, rows]
        slot, biases = np.full((k.HALF_TILE_ROWS, k.C), np.nan), np.full(k.TILE_BIASES, np.nan)
        slot[:at.n] = grid.weight(at.layer, at.matrix, rows)
        if at.biases:                                                       # copied from a multiple of 8 on
            start, n = at.first - at.first % 8, ceil_div(at.first % 8 + at.biases, 8) * 8
            biases[:n] = grid.weight(at.layer, at.matrix.replace("w", "b", 1), slice(start, start + n))
        return slot, biases, grid.touched[at.matrix][at.layer][rows]

    def tile(self, n):
        """The next tile, n rows, a team at a time: yields biases, team, their r, rows [r, TEAM, COLS]."""
        k = self.k
        for half_tile in range(k.HALF_TILES):
            if half_tile * k.HALF_TILE_ROWS >= n:
                break
            slot, biases, touched = self.wait_full()
            for team in range(k.TEAMS):
                slot_rows = np.arange(team, min(k.HALF_TILE_ROWS, n - half_tile * k.HALF_TILE_ROWS), k.TEAMS)
                place = slot_rows[:, None, None], k.column
                touched[place] += 1
                r = half_tile * k.ROWS // k.HALF_TILES + slot_rows // k.TEAMS
                yield biases if half_tile == 0 else None, team, r, slot[place]

    def dot_tile(self, x, n, skip, has_bias):
        """[n]: the next tile's rows . x, plus its biases, of which the first `skip` belong to other rows."""
        k, sums, bias = self.k, np.full(self.k.TILE_ROWS, np.nan), 0
        for biases, team, r, rows in self.tile(n):
            threads = (rows * x).sum(2)                                     # [.., TEAM]
            warps = threads.reshape(len(r), k.TEAM_WARPS, k.TEAM_LANES).sum(2)   # reduce_rows
            sums[k.row[team, r]] = warps.sum(1)                             # (c)
            if biases is not None and has_bias:
                bias = biases[skip:skip + n]
        return sums[:n] + bias

    def axpy_tile(self, a, n):
        """y += a[n] * the next tile's rows."""
        for _, team, r, rows in self.tile(n):
            self.y[team] += np.tensordot(a[self.k.row[team, r]], rows, 1)

    def read_residual(self, x_now):
        """S0"""
        assert not self.grid.lacking(x_now).any(), "words of x are not whole"  # (4)
        self.x = self.grid.value_of(x_now)[self.k.column]                  # (a)

    def normalize(self):
        """S1: two passes within a thread, then groups of n values merge: lanes in pairs, then warps."""
        k, n, lane = self.k, self.k.COLS, np.arange(self.k.TEAM_LANES)
        mean = self.x.mean(1)
        squares = ((self.x - mean[:, None]) ** 2).sum(1)
        mean, squares = mean.reshape(k.TEAM_WARPS, k.TEAM_LANES), squares.reshape(k.TEAM_WARPS, k.TEAM_LANES)
        while n < k.COLS * k.TEAM_LANES:
            other = lane ^ n // k.COLS                                      # of __shfl_xor_sync
            squares = squares + squares[:, other] + (mean[:, other] - mean) ** 2 * (0.5 * n)
            mean, n = 0.5 * (mean + mean[:, other]), 2 * n
        part = mean[:, 0]                                                   # (b)
        mean = part.sum() / k.TEAM_WARPS
        squares = (squares[:, 0] + n * (part - mean) ** 2).sum()
        self.x = (self.x - mean) / math.sqrt(squares / k.C + k.LN_EPS)

    def affine(self, layer, gain, bias):
        weight, column = self.grid.weight, self.k.column
        return self.x * weight(layer, gain)[column] + weight(layer, bias)[column]

    def qkv_rows(self, h):
        """S2, and ClusterGather: every rank gets every rank's rows."""
        k, first = self.k, self.plan.rank * self.k.QKV_ROWS
        for i in range(0, k.QKV_ROWS, k.TILE_ROWS):
            n = min(k.TILE_ROWS, k.QKV_ROWS - i)
            value = self.dot_tile(self.xn1, n, (h * 3 * k.HS + first + i) % 8, True)
            for r in range(k.RANKS):
                self.in_rank(r).qkv[first + i:first + i + n] = value

    def rotate_and_append(self, layer, h):
        """S3, S4: the last rank writes to the cache; all ranks use k and v as the cache rounds them."""
        k, grid, half = self.k, self.grid, self.k.ROT // 2
        for v in self.qkv[:k.HS], self.qkv[k.HS:2 * k.HS]:
            a, b = v[:half].copy(), v[half:2 * half].copy()
            v[:half], v[half:2 * half] = a * grid.cos - b * grid.sin, b * grid.cos + a * grid.sin
        self.q = self.qkv[:k.HS] * (k.HS**-0.5 * math.log2(math.e))         # the softmax is in powers of 2
        new = torch.tensor(self.qkv[k.HS:], dtype=grid.cache.dtype).view(2, k.HS)
        self.k_now, self.v_now = new.double().numpy()
        if self.plan.rank == k.RANKS - 1:
            grid.cache[layer, :, 0, h, grid.position] = new
        self.qkv[:] = np.nan                                                # (d)

    def attend(self, layer, h):
        """S5: each of WARPS * WARP_POSITIONS groups of lanes has peak, denom and o of its own positions."""
        k, plan = self.k, self.plan
        warp, sub = np.indices((k.WARPS, k.WARP_POSITIONS))
        peak, denom = np.full(warp.shape, -1e30), np.zeros(warp.shape)
        o = np.zeros((*warp.shape, k.HS))
        if plan.rank == k.RANKS - 1:                                            # the token of this step
            peak[-1, 0], denom[-1, 0], o[-1, 0] = self.k_now @ self.q, 1, self.v_now
            self.grid.touched["kv"][layer, h, self.grid.position] += 1
        u = np.arange(k.BATCH)[:, None, None]
        for t0 in range(plan.first_cached, plan.end_cached, k.KV_POSITIONS):
            n = min(k.KV_POSITIONS, plan.end_cached - t0)
            (keys, values), _, touched = self.wait_full()
            t = warp * k.WARP_POSITIONS + sub + u * k.STRIDE                # [BATCH, WARPS, WARP_POSITIONS]
            valid, t = t < n, np.minimum(t, n - 1)
            np.add.at(touched, t[valid], 1)
            score = np.where(valid, keys[t] @ self.q, -1e30)
            higher = np.maximum(peak, score.max(0))
            shrink, p = np.exp2(peak - higher), np.where(valid, np.exp2(score - higher), 0)
            peak, denom = higher, denom * shrink + p.sum(0)
            o = o * shrink[..., None] + (p[..., None] * values[t]).sum(0)
        of_warps = [merge(*of_lanes) for of_lanes in zip(peak, denom, o, strict=True)]
        self.push_attention(*merge(*map(np.array, zip(*of_warps, strict=True))))  # (e)

    def push_attention(self, peak, denom, o):
        """ClusterReduce, first half: o [HS] in slices to the ranks that own them, peak and denom to all."""
        for r in range(self.k.RANKS):
            self.in_rank(r).rank_o[self.plan.rank] = o[r * self.k.OUT_ROWS:(r + 1) * self.k.OUT_ROWS]
            self.in_rank(r).rank_peak_denom[self.plan.rank] = peak, denom

    def out_rows(self):
        """S6, S7"""
        _, denom, o = merge(*self.rank_peak_denom.T, self.rank_o)
        for i in range(0, self.k.OUT_ROWS, self.k.TILE_ROWS):
            n = min(self.k.TILE_ROWS, self.k.OUT_ROWS - i)
            self.axpy_tile(o[i:i + n] / denom, n)
        self.rank_o[:], self.rank_peak_denom[:] = np.nan, np.nan

    def hidden_units(self, end):
        """S8: continues with the block's hidden units, up to number `end`."""
        end = min(end, self.plan.units.size)
        for i in range(self.done, end, self.k.TILE_ROWS):
            n = min(self.k.TILE_ROWS, end - i)
            a = self.dot_tile(self.xn2, n, self.plan.units.at(i) % 8, True)
            bend = np.array([math.erf(value * 0.5**0.5) for value in a])
            self.axpy_tile(0.5 * a * (1 + bend), n)
        self.done = end

    def cluster_reduce(self):
        """S9: every team's y to the ranks that own the columns."""
        k, y = self.k, np.full(self.k.C, np.nan)
        for team in range(k.TEAMS):
            y[k.column] = self.y[team]
            for r in range(k.RANKS):
                self.in_rank(r).sums[self.plan.rank * k.TEAMS + team] = y[r * k.OWN:(r + 1) * k.OWN]

    def add_to_residual(self, x_next):
        """S9: the sum of this rank's columns over the cluster, as integers."""
        own = slice(self.plan.rank * self.k.OWN, (self.plan.rank + 1) * self.k.OWN)
        x_next[own] += self.grid.addend(self.sums.sum(0))
        self.sums[:] = np.nan

    def lm_head(self, x):
        """S10: writes this block's logits, returns the best of them, packed with its token."""
        k, best = self.k, 0
        lm_rows = deal(k, 0, k.V, self.block, self.grid.blocks)
        for i in range(0, lm_rows.size, k.TILE_ROWS):
            first, n = lm_rows.at(i), min(k.TILE_ROWS, lm_rows.size - i)
            self.grid.logits[first:first + n] = logits = self.dot_tile(x, n, 0, False)
            best = max(best, *(pack(logit, first + i) for i, logit in enumerate(logits)))
        return best


def merge(peak, denom, o):
    """Merges results of sets of positions (axis 0): o = sum 2^(s_t - peak) v_t, denom without v_t."""
    shrink = np.exp2(peak - peak.max())
    return peak.max(), shrink @ denom, shrink @ o


def pack(logit, token):
    """An integer that is ordered by logit (fp32, NaN above all), then by smaller token."""
    bits = int(np.float32(logit).view(np.uint32))
    order = 0xFFFFFFFF if np.isnan(logit) else bits ^ 0xFFFFFFFF if bits >> 31 else bits | 1 << 31
    return order << 32 | token ^ 0xFFFFFFFF


# ---- the kernel --------------------------------------------------------------------------------------------

class Emulator:
    """The grid and its global memory. `launch` leaves x() [C], logits [V], token (likeliest, or -1), a row
    in cache [L, 2, 1, NH, context, HS], touched {matrix: counts}: how often each one was used."""

    def __init__(self, model, clusters, cache=None, fixed_one=None, **tuning):
        """`model`: a Pythia of any dtype; `cache`: from its new_cache, is copied; `fixed_one`: the
        integer that means 1 in fixed point (default: the kernel's); `tuning`: arguments of
        build.constants."""
        self.model, self.k = model, kernel_constants(constants(model.config, **tuning))
        self.blocks, self.fixed_one = clusters * self.k.RANKS, fixed_one or self.k.FIXED_ONE
        self.cache = model.new_cache() if cache is None else cache.clone()
        self.residual, self.swaps = np.zeros((2, self.k.C), np.int64), 0

    def weight(self, layer, name, rows=slice(None)):
        owner = self.model if layer < 0 else self.model.blocks[layer]
        return getattr(owner, name).detach()[rows].double().numpy()

    def addend(self, v):
        """One addition of v to a word of x: fixed point, and a count in the lowest COUNT_BITS."""
        fits = np.abs(v) < self.k.FIXED_LIMIT
        fixed = np.where(fits, np.rint(v * self.fixed_one), self.k.FIXED_NAN).astype(np.int64)
        return (fixed << self.k.COUNT_BITS) + 1

    def value_of(self, word):
        q = word >> self.k.COUNT_BITS
        return np.where(np.abs(q) < self.k.FIXED_EDGE, q / self.fixed_one, np.nan)

    def first_count(self, swaps):
        """What the counts of x after `swaps` layers start from."""
        return swaps // 2 % 2 * self.k.LAP

    def lacking(self, x_now):
        """0 for a word of x that is complete; else the number of additions that it lacks."""
        wanted = self.blocks // self.k.RANKS + 1 + self.first_count(self.swaps)
        return (wanted - x_now) % (1 << self.k.COUNT_BITS)

    def carry_x(self, x, layer, x_next):
        """S9: what x_next needs beside the clusters' sums, for all C columns at once.

        Here this addition comes first and replaces the old word. In the kernel sums may come earlier, so the
        carrier subtracts the old word instead.
        """
        sums = x + self.weight(layer, "b_out") + self.weight(layer, "b_down")
        x_next[:] = self.addend(sums) + self.first_count(self.swaps + 1)

    def x(self):
        return self.value_of(self.residual[self.swaps % 2])

    def launch(self, token, position, first_layer=0, end_layer=None, lm_head=True):
        """Layers first_layer..end_layer - 1 for `token` at `position`; if first_layer is not 0, with the x
        of the last launch."""
        k, model, end_layer = self.k, self.model, self.k.L if end_layer is None else end_layer
        self.position, self.range = position, (first_layer, end_layer, lm_head)
        self.cos, self.sin = model.rope[:, position].double().numpy()
        self.logits, self.touched = np.full(k.V, np.nan), {"kv": np.zeros((k.L, k.NH, k.CTX), np.uint8)}
        self.touched["embed_out"] = {-1: np.zeros((k.V, k.C), np.uint8)}
        for name in ("w_qkv", "w_out", "w_up", "w_down"):
            self.touched[name] = [np.zeros(getattr(block, name).shape, np.uint8) for block in model.blocks]

        embedding = self.weight(-1, "embed_in", min(max(token, 0), k.V - 1))
        self.workers = [Worker(self, block) for block in range(self.blocks)]  # (0)
        for w in self.workers:
            if first_layer == 0:
                w.x = embedding[k.column]
            else:
                w.read_residual(self.residual[self.swaps % 2])
        for layer in range(first_layer, end_layer):
            x_next = self.residual[(self.swaps + 1) % 2]
            self.carry_x(self.x() if layer else embedding, layer, x_next)
            for first in range(0, self.blocks, k.RANKS):
                self.run_cluster(self.workers[first:first + k.RANKS], layer, x_next)
            self.swaps += 1
            for w in self.workers:
                w.read_residual(x_next)
        if lm_head:
            best = 0
            for w in self.workers:
                w.normalize()
                best = max(best, w.lm_head(w.affine(-1, "lnf_w", "lnf_b")))  # S10
            finite = 1 << 23 <= best >> 32 < 0xFF800000                     # -FLT_MAX to FLT_MAX
            self.token = best & 0xFFFFFFFF ^ 0xFFFFFFFF if finite else -1
        left = [slot for w in self.workers for slot in w.ring]
        assert not left, f"{len(left)} slots were filled and not used, the first is {left[0]}"

    def run_cluster(self, ranks, layer, x_next):
        """One layer in the blocks of one cluster."""
        plan, k = ranks[0].plan, self.k
        for w in ranks:
            w.y, w.done = np.zeros((k.TEAMS, k.TEAM, k.COLS)), 0
            w.normalize()                                                   # S1
            w.xn1, w.xn2 = w.affine(layer, "ln1_w", "ln1_b"), w.affine(layer, "ln2_w", "ln2_b")
        for h in range(plan.cluster, k.NH, plan.clusters):
            for w in ranks:
                w.qkv_rows(h)                                               # S2
                w.hidden_units(w.done + w.plan.filler)                             # S8, while q, k, v travel
            for w in ranks:                                                 # (1)
                w.rotate_and_append(layer, h)                               # S3, S4
                w.attend(layer, h)                                          # S5
                w.hidden_units(w.done + w.plan.filler)                             # S8, while results travel
            for w in ranks:                                                 # (2)
                w.out_rows()                                                # S6, S7
        for w in ranks:
            w.hidden_units(w.plan.units.size)                                     # S8
            w.cluster_reduce()                                              # S9
        for w in ranks:                                                     # (3)
            w.add_to_residual(x_next)


# ---- the command line --------------------------------------------------------------------------------------

def fitting_clusters(cluster, sms):
    """About how many clusters a GPU holds at once, as build.default_cluster has it; only the driver knows."""
    return sms // cluster if cluster <= 2 else sms * 10 // 11 // cluster


def layer_bytes(config, position):
    """Bytes that a layer has to read, and those of a token without its layers."""
    from bench import token_bytes  # slow to import, and needed only here
    token, ends = (token_bytes(c, position) for c in (config, replace(config, n_layer=0)))
    return (token - ends) / config.n_layer, ends


def explain(name, cluster=None, arch="sm_90a", position=128, sms=132):
    """Prints how the work on a token is laid out, for a model (one of SIZES, or a Config) and a GPU.

    `cluster`: blocks in a cluster (default: by shape); `position`: tokens in the cache; `sms`:
    multiprocessors. Needs neither GPU nor compiler. Raises Refused for what the kernel has no code for.
    """
    config = name if isinstance(name, Config) else Config.from_name(name)
    k = kernel_constants(constants(config, arch, cluster, sms=sms))
    if not 0 <= position < k.CTX:
        raise Refused(f"position {position} is not in 0..{k.CTX - 1}: take one that is")
    from bench import measured_us, read_rate  # slow to import, and needed only here
    clusters, rate = fitting_clusters(k.RANKS, sms), read_rate("h200")
    times = measured_us("h200", config, position)
    blocks, us = clusters * k.RANKS, 1e6 / rate
    work = []  # of each block: heads, hidden units, KB of heads, of K/V, of units, of all
    for block in range(blocks):
        plan, kb = make_plan(k, block, blocks, position), Counter()
        for slot in producer(k, block, blocks, position, 0, 1, False):
            kb[slot.matrix] += slot.bytes / 1e3
        heads, units = range(plan.cluster, k.NH, clusters), plan.units.size
        of_heads, of_units = kb["w_qkv"] + kb["w_out"], kb["w_up"] + kb["w_down"]
        work.append((len(heads), units, of_heads, kb["kv"], of_units, kb.total()))
    work = np.array(work)
    (layer, ends), ring = layer_bytes(config, position), k.SLOTS * k.SLOT_BYTES
    token = layer * k.L + ends
    gather, slices = 4 * k.NH * k.RANKS * 3 * k.HS, 4 * k.NH * k.RANKS * (k.HS + 2 * k.RANKS)
    print(f"""\
model     C {k.C}, NH {k.NH}, HS {k.HS}, MLP {k.MLP}, V {k.V}, L {k.L}; {position} tokens in the cache
grid      {blocks} blocks on {sms} multiprocessors ({arch}), {k.WORKERS} threads that compute, one that copies
clusters  {clusters} of {k.RANKS} blocks each; head h belongs to cluster h mod {clusters}
rank      of a head: {k.QKV_ROWS} of {3 * k.HS} rows of q, k, v
                     {ceil_div(position, k.RANKS)} of {position} cached tokens
                     {k.OUT_ROWS} of {k.HS} output rows
          of the cluster's sum: {k.OWN} of {k.C} columns
team      {k.TEAM} threads ({k.TEAM / 32:g} warps) with {k.COLS} columns of a row each; {k.TEAMS} in a block
tile      {k.TILE_ROWS} rows, {k.ROWS} for each team, in {k.HALF_TILES} slots
slot      {k.HALF_TILE_ROWS} rows, {k.SLOT_BYTES} bytes; or k and v of {k.KV_POSITIONS} tokens
ring      {k.SLOTS} slots, {ring / 1024:.0f} of {k.SHARED_BYTES / 1024:.0f} KiB shared memory
          together the rings hold {ring * blocks / 1e6:.1f} MB, {ring * blocks * us:.2f} us of reading

floor     a layer {layer / 1e6:.2f} MB, {layer * us:.2f} us; K/V {4 * k.C * position / 1e6:.2f} MB of it
          a token {token / 1e6:.1f} MB, {token * us:.1f} us; LM head {2 * k.V * k.C / 1e6:.1f} MB of it
          at the {rate / 1e12:.3f} TB/s that the fastest reader gets from the H200 in results/
measured  {f'{times:.1f} us a token' if times else 'not in results/, for this shape and so many tokens'}

a layer:
blocks  heads  hidden units   KB of heads   KB of K/V   KB of units   KB of all""")
    for heads in sorted(set(work[:, 0]), reverse=True):
        group = work[work[:, 0] == heads]
        units, kb = group[:, 1], group[:, 2:].mean(0)
        print(f"{len(group):>6} {heads:>6.0f} {units.min():>8.0f}..{units.max():<5.0f}"
              f"{kb[0]:>11.1f}{kb[1]:>12.1f}{kb[2]:>14.1f}{kb[3]:>12.1f}")
    print(f"""\
the fullest block reads {work[:, 5].max() / work[:, 5].mean() - 1:.1%} more than the mean; in the division, \
a head's small steps
count as {k.ATTENTION_BYTES // 1024} KiB more, and K/V as {k.KV_COST / 2:g} times its size

exchanged in a layer, KB:
(1) q, k, v     {gather / 1e3:9.1f}   between shared memories, 1/{k.RANKS} of it within a block
(2) results     {slices / 1e3:9.1f}   likewise
(3) y           {4 * blocks * k.TEAMS * k.C / 1e3:9.1f}   likewise
sums of y       {8 * clusters * k.C / 1e3:9.1f}   added to x in L2 by {clusters} clusters
(4) x           {8 * blocks * k.C / 1e3:9.1f}   read from L2 by {blocks} blocks""")


def check(tokens, cluster):
    """Prints the step of tiny-pythia after `tokens` here, and in model.py in float64."""
    model = Pythia.from_pretrained(HERE / "tiny-pythia").double()
    cache, position = model.new_cache(), len(tokens) - 1
    truth = model(torch.tensor([tokens]), cache)[0, -1].numpy()
    grid = Emulator(model, 3, cache, cluster=cluster)
    grid.launch(tokens[-1], position)
    print(f"3 clusters of {cluster}: token {grid.token}, in float64 {truth.argmax()}; logits up to "
          f"{np.abs(truth).max():.3g}, at most {np.abs(grid.logits - truth).max():.2g} apart")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--explain", metavar="MODEL", help="print how the work on a token is laid out")
    parser.add_argument("--cluster", type=int, help="thread blocks in a cluster: 1, 2, 4 or 8")
    parser.add_argument("--arch", choices=SHARED_BYTES, default="sm_90a", help="GPU architecture")
    parser.add_argument("--position", type=int, default=128, help="tokens in the cache (default: 128)")
    args = parser.parse_args()
    try:
        if args.explain:
            explain(args.explain, args.cluster, args.arch, position=args.position)
        else:
            check([5, 6, 7, 8], 2 if args.cluster is None else args.cluster)
    except Refused as refusal:
        print(f"emulator.py: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
