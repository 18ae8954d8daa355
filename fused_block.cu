// fused_block.cu: decode steps of Pythia, several of them in one kernel launch.
//
// 0. What it does, what it costs, how to read it ==========================================================
// A launch makes one token, or several in a row. In PyTorch, with the stages (chapter 7) of each line:
//
//     x = embed_in[token]                                                              #      [C]
//     for block in blocks:
//         xn1, xn2 = layer_norm(x, ln1_w, ln1_b), layer_norm(x, ln2_w, ln2_b)          # S1   [C]
//         q, k, v = (w_qkv @ xn1 + b_qkv).view(NH, 3, HS).unbind(1)                    # S2   [NH, HS]
//         q, k = rope(q, position), rope(k, position)                                  # S3   [NH, HS]
//         cache_k[:, position], cache_v[:, position] = k, v                            # S4   [NH, HS]
//         p = softmax(einsum("hd,htd->ht", q, cache_k[:, :position + 1]) / sqrt(HS))   # S5   [NH, T+1]
//         o = einsum("ht,htd->hd", p, cache_v[:, :position + 1])                       # S5-6 [NH, HS]
//         h = gelu(w_up @ xn2 + b_up)                                                  # S8   [F]
//         x = x + o.flatten() @ w_out + b_out + h @ w_down + b_down                    # S7-9 [C]
//     logits = embed_out @ layer_norm(x, lnf_w, lnf_b)                                 # S10  [V]
//     token = logits.argmax()                                                          # S10
//
// Symbols, with their sizes for pythia-2.8b: C hidden size 2560, NH heads 32, HS head size 80, F MLP width
// 10240, V vocabulary 50304, L layers 32, T tokens cached before this one; K thread blocks in a cluster, 2.
// From here on a transformer block is a layer, and a block is CUDA's: a group of threads.
//
// The budget. At batch 1 every weight is used once a token, so a layer takes as long as its bytes at least:
//     (4*C*C + 2*C*F) weights * 2 bytes           157.3 MB / 4.65 TB/s =   33.8 us a layer
//     keys and values of T tokens: 4*C*T bytes     1.31 MB / 4.65 TB/s =    0.3 us a layer at T = 128
//     L layers, and V*C*2 bytes of the LM head    5.333 GB / 4.65 TB/s = 1147   us a token
// 4.65 TB/s is what a kernel that only reads got out of the H200 in results/ (of another: 4.55): 35.2 KB a us
// for each of its 132 multiprocessors. The aim of all that follows: memory does not wait for arithmetic.
//
// How to read. Chapter 1 is the picture, 2 the syncs, 3 and 4 sizes and places. Then 8, the kernel, with
// stages (7) and inner loops (6) as you meet them. Take 5, PTX, on trust; 9 and 10 launch it all. emulator.py
// is the same dataflow in Python; simulator.cpp runs this file on a CPU; README.md has times.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// 1. The picture ==========================================================================================
// Every matrix is stored as rows of C, so all but attention is two inner loops: dot(row, x) and y += a * row.
//
//         .-> LN1 -> S2 q,k,v rows -(1)-> S3 rope -> S5 attend -(2)-> S6 merge -> S7 out rows -.
//         |                                  '----> S4 append k, v                              |
//  x -> S0,S1                                                                                   S9 (3)(4)-> x
//         |                                                                                     |
//         '-> LN2 -> S8 hidden unit j: h_j = gelu(up row j . xn2 + b_j), y += h_j * down row j -'
//
// y is what the layer adds to x. (1) (2) (3) are syncs of a cluster; (4) is the grid's, the only one in a
// layer. The MLP needs none of its own: a hidden unit is one row in, one row out, and whoever computes h_j
// adds all that it gives to y.
//
// CUDA's levels, and who owns what, in numbers of 2.8b at T = 128:
//   grid         all threads of a launch: 66 clusters, with one block on every multiprocessor of the GPU
//                cluster               0         1     ...    31       32..65
//                head                  0         1     ...    31       none
//                hidden units       34 + 35   35 + 35  ... 35 + 35     117 to 119 a block
//   cluster      K blocks that can write into one another's memory and share the work of a head; head h is
//                done by cluster h mod (number of clusters). default_cluster in build.py chooses K
//   rank         a block's number in its cluster. Each has 120 of a head's 3*HS rows of q, k, v; 64 of its
//                cached tokens; 40 of its HS output rows; hidden units; 1280 columns of the cluster's y
//   team         320 threads, C/8 (C/16 where C >= 4096), that hold one row between them; where C is small, a
//                block has several, each with other rows: in 70m 4 of 64 threads, and tiles of 32 rows
//   warp         32 threads that run mostly in step, and can read one another's registers (a shuffle): here
//                a tenth of a row. It adds up its threads' products, and frees what it has read, (E)
//   thread       a lane of a warp, with the same 8 columns, 16 bytes, of every row, x and y, in every layer
//                (some small steps are shared out otherwise: S0, S3, S5, and the additions of S9):
//                row of C   | 0..7     | 8..15    | 16..23   | ...                      | 2552..2559 |
//                           | thread 0 | thread 1 | thread 2 | ...                      | thread 319 |
//                dot        each multiplies its 8 columns by its 8 of x; the team adds up
//                axpy       each adds a times its 8 columns to its 8 of y, in registers: nobody need meet
//   producer     one lane of one more warp; the threads of the others are workers. It only starts copies of
//                weights and cached tokens into the ring: STAGES slots of shared memory, filled and emptied
//                in turn. It runs ahead, past syncs, layers and tokens, while a slot is empty, paced (claim)
//
// CUDA's words. Registers are a thread's own, shared memory (227 KiB) a block's; global memory, behind the L2
// cache, is everybody's, and has weights, x, and cached keys and values. A multiprocessor is one of the GPU's
// cores. A launch runs a `__global__` function once in every thread, which calls `__device__` ones.
// threadIdx.x is a thread's number in its block, blockIdx.x the block's in the grid, gridDim.x how many there
// are. __shfl_xor_sync(~0u, v, w) returns the v of the lane whose number is this lane's xor w, if all 32
// lanes call it; __shfl_sync that of a given lane; at __syncwarp() the lanes meet. half is fp16, uint4 any 16
// bytes, fmaf(a, b, c) a * b + c. PTX is the GPU's assembly language.
//
// Tile and stage. A stage without a number is a slot of the ring; S0 to S10 are the steps of chapter 7. A
// tile is what one dot_tile finishes, 8 rows of 2.8b, for which the latency of shuffles and of (c) is paid
// once. It comes in PARTS = 2 stages, so that the first is refilled while the second is read.

// 2. The syncs: points that some threads pass only when others have reached theirs ========================
// m, l, o belong to a set of tokens: its largest score, which is q . k / sqrt(HS) in units of log(2); the sum
// of 2^(score - m); that of 2^(score - m) * v.
// A push is a store into another block's shared memory that counts its bytes on an mbarrier (below) there. An
// inbox is an array that pushes go to. Peers are the other blocks of a cluster. The code repeats the ids.
//  id   scope    publishes                         to                         without it
//  (0)  cluster  barriers, plan, RoPE's angles     peers and all threads      a push into a block not there
//  (1)  cluster  q, k, v of a head                 every rank                 attention with stale q, k or v
//  (2)  cluster  m, l, o of a rank's tokens        the owners of parts of o   a rank's tokens are forgotten
//  (3)  cluster  partial sums of y                 the owners of columns      x lacks a peer's contribution
//  (4)  grid     x of the next layer               everybody                  LayerNorm of an unfinished x
//  (5)  grid     the best logit; k, v; zero in     everybody                  a token from part of the logits
//                the other `best`
//  (F)  block    a stage of the ring is full       workers                    arithmetic on bytes not here
//  (E)  block    a stage of the ring is empty      producer                   bytes overwritten while in use
//  (a)  block    x, read once                      all teams                  columns of the layer before
//  (b)  team     LayerNorm's parts, of warps       its threads                a mean from stale parts
//  (c)  team     dot products' parts, of warps     its threads                dot products from stale parts
//  (d)  block    q, and k and v in fp16; that      all warps; pushes of the   attention with half-rotated q
//                S3 has read (1)'s inbox           next head
//  (e)  block    m, l, o of a warp's tokens        one thread a dimension     a merge with the head before
//  (f)  block    all that is for (5); the next     the thread that arrives    (5) counts a block not yet done
//                plan and angles
//  (g)  block    that (4), or (5), is passed       all threads                (4): right, but slow: all poll;
//                                                                             (5): they run ahead of it
//  (h)  block    that (5) is passed                producer                   copies of k, v not yet there
//
// (0) is the cluster's barrier instruction, (4) x itself, (5) a counter in global memory, (a) to (g) barriers
// of threads. (1) (2) (3) (F) (E) (h) are mbarriers: words in shared memory that count arrivals and, but for
// (E) and (h), bytes, so that the data itself releases whoever waits. A phase is one round: it completes when
// all that it counts has come. The end of a launch is a sync too, for x, the cache's new rows and State.
//
// No block arrives at (4). A word of x counts, in its lowest bits, the additions to it (chapter 6): it is
// whole when every cluster and its carrier (chapter 4) have added. A counter beside x, as at (5), would have
// to come after the sums, by a release, which waits until they have arrived: about 1 us while memory is busy.
//
// Nobody says that an inbox of (1), (2) or (3) is free again, as (E) does for the ring: before a peer pushes
// into it again, it waits at a sync for the inbox's owner, who sends there only after reading.
//     inbox of       read in  what its owner then sends                       a peer waits for it at
//     (1) q, k, v    S3       m, l, o of this head, after (d)                 (2)
//     (2) m, l, o    S6       each team rows of the next head's q, k, v, or y (1), or (3)
//     (3) parts of y S9       each thread the sums of columns that it read    (4), where all are read
// (A team that has output rows also has rows of q, k, v. Other teams read (2)'s inbox, but use none of it.)
// Likewise nobody adds to a buffer of x, or clears `best`, before all have read it: he has passed a (4), for
// which all had to add what they made of it. One bit, the parity, tells the phase of an mbarrier, as none
// completes before all have seen the one before: (2) needs this block's own m, l, o, from after (d); at (h)
// only the producer waits, and without its copies no worker reaches the next.
//
// No block leaves while pushes fly, its own or a peer's: it leaves after a (4) or (5), before which every
// block has waited for all of its bytes of (1), (2) and (3). Leave out any one sync but (g) after (4), and
// the result changes, or the launch does not end: test_block.py -k simulated_syncs shows it.
//
// The same bits in every run: block, grid and position alone divide the work (Plan), sums in a cluster are
// taken in the order of threads, warps, ranks and teams, and what comes in any order is integers (chapter 6).

// 3. Configuration ========================================================================================
// build.py gives -D constants: the shape, and CLUSTER, THREADS, ROWS, SHARED_BYTES, and of chapter 7 PACE
// (claim) and ATTENTION_BYTES (make_plan). The rest follows. Values for 2.8b are in brackets.

constexpr int C = HIDDEN, NH = HEADS, HS = HEAD_SIZE, ROT = ROTARY;
constexpr int F = MLP, V = VOCAB, L = LAYERS, CTX = CONTEXT;
constexpr int K = CLUSTER, R = ROWS;
constexpr float LN_EPS = 1e-5f;
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Threads. A row is dealt out in pieces of 16 bytes, the most that one load from shared memory brings.
constexpr int PIECES = C < 4096 ? 1 : 2;        // pieces of a row that one thread owns [1]
constexpr int COLS = 8 * PIECES;                // columns that one thread owns [8]
constexpr int TEAM = C / COLS;                  // threads that hold one row [320]
constexpr int TEAMS = ceil_div(THREADS, TEAM);  // teams in a block [1]: enough for THREADS [256] or more
constexpr int WORKERS = TEAM * TEAMS;           // threads that compute [320]; the producer's warp is extra
constexpr int WARPS = WORKERS / 32;             // of workers [10]
constexpr int LANES = TEAM < 32 ? TEAM : 32;    // lanes of a warp that belong to the same team [32]
constexpr int TEAM_WARPS = TEAM / LANES;        // warps of a team [10]; 1 where it is one, or half of one

constexpr int TILE_ROWS = R * TEAMS;            // rows in a tile, R for each team [8]
constexpr int PARTS = 2;                        // stages that a tile comes in
constexpr int STAGE_ROWS = TILE_ROWS / PARTS;   // [4]
constexpr int STAGE_BYTES = STAGE_ROWS * C * 2; // [20480]
constexpr int BIAS_HALFS = ceil_div(TILE_ROWS, 8) * 8 + 8;  // biases of a tile, see Producer::rows [16]

constexpr int QKV_ROWS = 3 * HS / K;            // of the rows of one head's q, k, v [120]
constexpr int OUT_ROWS = HS / K;                // of its output rows, and as many dimensions of o [40]
constexpr int OWN = C / K;                      // columns that a rank sums for its cluster [1280]
constexpr int PAIRS = ceil_div(C / 2, WORKERS); // pairs of columns of x that a thread reads, at most [4]

constexpr int KV_TOKENS = STAGE_BYTES / (4 * HS);  // cached tokens in a stage: half of it k, half v [64]
constexpr int TOKEN_LANES = HS <= 32 ? 4 : HS <= 64 ? 8 : HS <= 128 ? 16 : 32;  // lanes for a token [16]
constexpr int WARP_TOKENS = 32 / TOKEN_LANES;      // [2]

// The ring gets what shared memory has left. Beside it are x, sums and part_o; 25 * HS bytes of qkv, slice_o,
// q, k_new, v_new and angles; dots, stats, part_m, part_l and vote; 416 for the rest.
constexpr int FIXED_BYTES = 4 * (C + TEAMS * C + WARPS * HS + 25 * HS / 4 + (2 * R + 14) * WARPS) + 416;
constexpr int STAGES = (SHARED_BYTES - FIXED_BYTES) / (STAGE_BYTES + 2 * BIAS_HALFS + 16);  // [10]: 205 KB

static_assert(C % 128 == 0, "a row is dealt out to half-warps, 16 bytes a lane: C must be a multiple of 128");
static_assert(NH * HS == C, "the heads together are as wide as the residual stream");
static_assert(WORKERS % 32 == 0 && WORKERS + 32 <= 1024, "whole warps, and at most 1024 threads in a block");
static_assert(TEAM % 32 == 0 || 32 % TEAM == 0,
              "a team is whole warps, or a warp whole teams: C / 8 (C / 16 from 4096 on) must divide so");
static_assert(TEAM_WARPS == 1 || TEAMS <= 14, "a team of several warps has a named barrier; a block has 16");
static_assert((R & (R - 1)) == 0 && R <= LANES && R % PARTS == 0,
        "reduce_rows folds a power of two of rows over a team's lanes, and a tile comes in equal parts");
static_assert(HS % (2 * K) == 0 && HS % 8 == 0, "ranks share a head's rows evenly; lanes take 8 dimensions");
static_assert(OWN % 8 == 0, "a rank owns whole pieces of a row");
static_assert(HS <= WORKERS, "one thread for each dimension of a head merges the warps' attention");
static_assert(STAGES >= 2 * PARTS, "two tiles: one being read, one on its way; take fewer ROWS");

// 4. Memory map ===========================================================================================

typedef float Columns[COLS];  // registers: a thread's columns of x, y or LN(x), fp32
struct Layer {  // weights, fp16, read only; the matrices are rows of C (see model.py)
  const half *ln1_w, *ln1_b, *ln2_w, *ln2_b;  // [C]
  const half *w_qkv, *b_qkv;                  // [NH][3][HS] rows, and as many biases
  const half *w_out, *b_out;                  // [NH][HS] rows, [C]
  const half *w_up, *b_up;                    // [F] rows, [F]
  const half *w_down, *b_down;                // [F] rows, [C]
};

// What all blocks agree on at (5). Maxima and sums of integers do not depend on who comes first.
struct Vote {
  unsigned long long best;    // the largest rank of a token (rank_of)
  unsigned long long drawn;   // the largest key, ranked alike, of the tokens that are ranked before the candidate
  unsigned long long mass;    // the sum of exp((logit - largest) / temperature) over all tokens, in 2^-40
  unsigned long long before;  // the same over tokens ranked before the candidate
  unsigned long long count;   // how many these are
};

constexpr int KEPT = 4, GROUPS = TEAM / R;  // logits that a thread keeps, at most; threads that keep the same row

struct State {  // global memory, kept between launches; the first four read before (0), written at the end
  int token;         // the next to be read: the last one chosen, or -1 if the logits are not finite
  int position;      // tokens in the cache
  unsigned steps;    // layers so far; if odd, x is in the second residual buffer
  unsigned votes;    // votes so far; all grids of a State have one size, for (5)
  unsigned counter;  // (5): grows by one a block and vote; never reset
  Vote vote[3];      // vote n uses element n % 3, and n clears the next
};

struct Settings {  // of the sampler, written by the host
  unsigned long long seed;
  double top_p;       // 1 keeps all tokens
  float temperature;  // 0: greedy
  unsigned top_k;     // V keeps all tokens
};

// Host memory: report of a launch that gives up; seen: additions lacking at (4), blocks at (5), else parity.
struct Failure { int sync, block, layer, seen; };

struct Model {  // the kernel's one parameter: pointers only, the same for every launch
  Layer layers[L];
  const half *embed_in, *lnf_w, *lnf_b, *embed_out;  // [V] rows, [C], [C], [V] rows
  const float *rope_cos, *rope_sin;                  // [CTX][ROT/2]
  half* cache;                   // [L][2][NH][CTX][HS] keys and values; a token writes a row of k and of v
  long long* residual;           // [2][C] words of x (chapter 6); who holds x is below
  float* logits;                 // [V]
  int* history;                  // [CTX] the token chosen at each position; host memory
  State* state;
  const Settings* settings;
  Failure* failure;
  float* taps;                   // -DTAPS
  unsigned long long* timeline;  // -DTIMELINE
};

// The residual buffers take turns; only a launch's end clears one, for the next launch to begin with:
//     layer l       0: x, read                            1: x of layer l - 1, to which all add
//     layer l + 1   0: x of layer l, to which all add     1: x, read
// Each word has a carrier, one thread of the grid. Before the sums of y or after, it adds the x that it has
// read, less the word that it read in this buffer a layer ago (carry). The LM head adds nothing to x, so
// layer 0 finds the buffers as any layer does; it carries the embedding. `best` takes turns too: found before
// (5), read after it, cleared at the next LM head, used at the one after.

// Some of n rows, dealt out to blocks of equal shares: whole tiles in turn, the rest in one run each.
struct Share {
  int count, dealt, first_dealt, blocks, first_rest;
  __device__ int at(int i) const { return i < dealt ? first_dealt + i * blocks : first_rest + i - dealt; }
};

// Who does what for a token. Depends on block, grid and position alone: every run divides work alike.
struct Plan {
  int rank, cluster, clusters;
  Share units;                  // hidden units of this block, in every layer
  int filler;                   // of these, how many to do while (1), and again while (2), is on its way
  int first_token, last_token;  // cached tokens of this rank, for every head
};

// One block's shared memory: 231936 bytes of 2.8b. What is copied, or read as 16 bytes, is aligned to 16.
struct alignas(128) Shared {                        // bytes      what; writer -> reader; until
  half ring[STAGES][STAGE_ROWS * C];                // 10 x 20480 rows, or k and v; producer -> workers; (E)
  alignas(16) half bias[STAGES][BIAS_HALFS];        // 10 x 32    of a tile, in the place of its first stage
  alignas(16) float sums[K * TEAMS][OWN];           // 10240      (3) inbox, from all teams; S9 -> S9; (4)
  alignas(16) float x[C];                           // 10240      (a) S0 -> S0; next layer
  float qkv[3 * HS];                                // 960        (1) inbox; S2 -> S3; (d)
  float slice_o[K][OUT_ROWS], slice_ml[K][2];       // 336        (2) inbox, by rank; S5 -> S6; next (1)
  alignas(16) float q[HS];                          // 320        (d) times the softmax scale; S3 -> S5; (e)
  alignas(16) half k_new[HS], v_new[HS];            // 320        (d) as the cache has them; S3 -> S5; (e)
  float part_o[WARPS][HS], part_m[WARPS],
      part_l[WARPS];                                // 3280       (e) of a warp's tokens; S5 -> S5; next (d)
  float dots[2][TEAMS][R][TEAM_WARPS];              // 640        (c) two in turn, see dot_tile
  float stats[TEAMS][TEAM_WARPS][2];                // 80         (b) mean, squares; S1 -> S1; (g)
  float rope_cos[ROT / 2], rope_sin[ROT / 2];       // 80         (0) (f) of this position; until S10
  Plan plan;                                        // 44         (0) (f) this block's; until S10
  Share rows;                                       // 20         (0) this block's rows of the LM head
  Vote vote[WARPS];                                 // 400        (f) of a warp; S10 -> S10; next (g)
  int layer;                                        // 4          for the report of a failure
  uint64_t full[STAGES], empty[STAGES];             // 160        (F), (E)
  uint64_t qkv_ready, slice_ready, sums_ready;      // 24         (1), (2), (3)
  uint64_t token_ready, workers_done;               // 16         (h); keeps the producer, see PATIENCE
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the ring leaves too little memory: FIXED_BYTES is wrong");

enum SyncId {  // in Failure::sync
  SYNC_QKV = 1, SYNC_SLICE, SYNC_SUMS, SYNC_X, SYNC_GRID, SYNC_FULL, SYNC_EMPTY, SYNC_TOKEN
};

// For tests and measurements, all at compile time, so that the shipped kernel pays nothing:
//   -DTAPS       stages write what they compute to Model::taps; y keeps its bits
//   -DTIMELINE   thread 0 of every block writes the time, in ns, at each MARK of a layer
#ifdef TAPS  // offsets into Model::taps; a new one needs room in model.py, a name in test_block.py's STAGES
enum { TAP_XN1 = 0, TAP_XN2 = C, TAP_Q = 2 * C, TAP_K = 3 * C, TAP_V = 4 * C, TAP_O = 5 * C, TAP_H = 6 * C };
#define TAP(where, value) (m.taps[where] = (value))
#else
#define TAP(where, value) ((void)0)
#endif

enum Mark { MARK_START, MARK_NORM, MARK_QKV, MARK_1, MARK_ATTEND, MARK_2, MARK_OUT, MARK_UNITS, MARK_3,
            MARK_ADDED, MARKS };
#ifdef TIMELINE  // [blocks][L + 1][MARKS]
#define MARK(event) do { if (threadIdx.x == 0) \
    m.timeline[((size_t)blockIdx.x * (L + 1) + layer) * MARKS + (event)] = global_ns(); } while (0)
#else
#define MARK(event) ((void)0)
#endif

// 5. Toolbox: a function for each PTX instruction that CUDA C++ has no word for ===========================
// "memory" forbids the compiler to move reads and writes across the instruction: data could be read too soon.

// Shared-memory addresses as the instructions below want them: 32 bits, in this block's window, not 64.
__device__ uint32_t smem(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// The same place in the shared memory of a rank of the cluster; a plain pointer always means our own.
__device__ uint32_t peer(const void* place, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem(place)), "r"(rank));
  return address;
}
// Push (chapter 2). A load would cost a round trip; after a plain store, both blocks would have to meet.
__device__ void push(uint32_t to, float v, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               :: "r"(to), "r"(__float_as_uint(v)), "r"(barrier) : "memory");
}
__device__ void push4(uint32_t to, const float* v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
      :: "r"(to), "r"(__float_as_uint(v[0])), "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])),
         "r"(__float_as_uint(v[3])), "r"(barrier) : "memory");
}

// An mbarrier. Bytes may land before they are expected: the phase stays open until then.
__device__ void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(smem(b)), "r"(arrivals) : "memory");
}
__device__ void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(smem(b)) : "memory");
}
// Arrives, and expects bytes on top. An arrival alone would complete the phase before the bytes are here.
__device__ void barrier_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(smem(b)), "r"(bytes) : "memory");
}
// Whether the phase is still open; sleeps a while if so. Acquires for the thread that asks, and for no other:
// every reader asks for itself. Peers' pushes take cluster scope, which empties the L1 cache every time.
#define TRY_WAIT(scope) "{\n.reg .pred p;\n" \
    "mbarrier.try_wait.parity.acquire." scope ".shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 0, 1, p;\n}"
__device__ bool barrier_open(uint64_t* b, uint32_t parity, bool by_peers = false) {
  uint32_t open;
  if (by_peers) asm volatile(TRY_WAIT("cluster") : "=r"(open) : "r"(smem(b)), "r"(parity) : "memory");
  else asm volatile(TRY_WAIT("cta") : "=r"(open) : "r"(smem(b)), "r"(parity) : "memory");
  return open;
}
// Peers and bulk copies see the barriers initialised so far; without it they may count on garbage.
__device__ void barriers_exist() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void cluster_sync() {  // all threads of all blocks of the cluster meet
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Bulk copy (TMA), global to shared: `full` counts its bytes. Addresses and size are multiples of 16. Loads
// by the workers would need registers for a whole ring. The policy lets L2 evict these bytes first: nobody
// reads them again before the next token, unlike x, which everybody reads.
__device__ uint64_t read_once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* full, uint64_t policy) {
  asm volatile(
  "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      :: "r"(smem(to)), "l"(from), "r"(bytes), "r"(smem(full)), "l"(policy) : "memory");
}
// Bulk copies reach memory by another path (a proxy). After this they see all that this thread has acquired.
__device__ void order_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Global memory that other blocks write. Relaxed: not ordered, but read in L2, where additions are made:
// each word's count and sum are of one moment. A plain load may find an earlier layer's x in L1.
__device__ longlong2 load_relaxed(const long long* p) {
  longlong2 v;
  asm volatile("ld.relaxed.gpu.global.v2.s64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p));
  return v;
}
__device__ float load_relaxed(const float* p) {
  float v;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}
// An addition of which no result comes back: nobody waits for it, as an atomicAdd's caller may have to.
__device__ void add_relaxed(long long* p, long long v) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" :: "l"(p), "l"(v));
}
// Counts one; whoever acquires the count sees all that this block wrote before. Relaxed, it could come first.
__device__ void arrive_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(counter) : "memory");
}
__device__ unsigned load_acquire(const unsigned* counter) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
  return v;
}

// 16 bytes that no launch writes (.nc), loaded here. A plain load the compiler would move to its first use.
__device__ uint4 load16(const half* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// A barrier of `threads` threads that name one id. __syncthreads would wait for the producer's warp too.
__device__ void named_barrier(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
__device__ void workers_sync() { named_barrier(1, WORKERS); }
__device__ void team_sync(int team) { named_barrier(TEAMS == 1 ? 1 : 2 + team, TEAM); }

// One clock for all blocks, ns, in steps of CLOCK_NS; clock64's cycles are longer when power runs short.
constexpr int CLOCK_NS = 32;
__device__ unsigned long long global_ns() {
  unsigned long long t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t;
}

// Every launch ends: the first to wait longer than PATIENCE reports for what, in host memory that outlives
// it; its trap ends all blocks and the CUDA context. At (F) the producer gives up for the workers, at (g) the
// thread that polls does.
constexpr long long PATIENCE = 6'000'000'000;  // clock cycles: 3.0 s at 1.98 GHz
__device__ __noinline__ void give_up(Failure* failure, int sync, int layer, int seen) {
  if (atomicCAS_system(&failure->sync, 0, sync) != 0)
    while (true) __nanosleep(1000);  // another thread is writing its report, and its trap ends us too
  failure->block = blockIdx.x;
  failure->layer = layer;
  failure->seen = seen;
  __threadfence_system();
  __trap();
}

__device__ void wait(const Model& m, Shared& s, uint64_t* barrier, uint32_t parity, SyncId sync) {
  const bool by_peers = sync <= SYNC_SUMS;
  if (!barrier_open(barrier, parity, by_peers)) return;
  // Twice as long for the producer: workers, but for those at (F), know the cause and get to report it.
  const long long patience = by_peers ? PATIENCE : 2 * PATIENCE, start = clock64();
  while (barrier_open(barrier, parity, by_peers))
    if (clock64() - start > patience) give_up(m.failure, sync, s.layer, parity);
}

// 6. Arithmetic: the two inner loops, and sums that do not depend on order ================================
// Loops of fixed length are unrolled, by `#pragma` if need be, so that their arrays stay in registers.

__device__ const uint4& as16(const half* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ float2 widen2(const half* h) { return __half22float2(*reinterpret_cast<const half2*>(h)); }
// To 8 fp32. Products and sums are fp32 throughout; only weights, k and v are fp16.
__device__ void widen(const uint4& w, float* f) {
  const half* h = reinterpret_cast<const half*>(&w);
  for (int i = 0; i < 4; i++) {
    const float2 pair = widen2(h + 2 * i);
    f[2 * i] = pair.x; f[2 * i + 1] = pair.y;
  }
}

__device__ float dot8(const uint4& w, const float* x, float sum) {
  float f[8]; widen(w, f);
  for (int i = 0; i < 8; i++) sum = fmaf(f[i], x[i], sum);
  return sum;
}
__device__ void axpy8(float a, const uint4& w, float* y) {
  float f[8]; widen(w, f);
  for (int i = 0; i < 8; i++) y[i] = fmaf(a, f[i], y[i]);
}

// Adds up R values over the lanes of a team in a warp, all at once: in each of the first log2(R) steps a lane
// gives half of its values away, so 8 take 4 + 2 + 1 + 2 = 9 shuffles, not 8 * 5. Lane l returns row l % R.
__device__ float reduce_rows(float (&v)[R], int lane) {
  for (int w = R / 2; w >= 1; w /= 2) {
    const bool upper = lane & w;
#pragma unroll
    for (int i = 0; i < w; i++)
      v[i] = (upper ? v[i + w] : v[i]) + __shfl_xor_sync(~0u, upper ? v[i] : v[i + w], w);
  }
  for (int w = R; w < LANES; w *= 2) v[0] += __shfl_xor_sync(~0u, v[0], w);
  return v[0];
}

// Clusters add to x in any order. A floating-point sum rounds at every step: its last bits would depend on
// the order, those of an integer sum do not. So words of x are 64 bits. The upper 55 are fixed point, in
// units of 2^-22 = 2.4e-7: for values above 2 no coarser than fp32. A part that does not fit (65536 and up;
// infinities; NaN) adds 2^47 units, and the sum reads back as NaN: 254 others, of less than 2^38 each, cannot
// hide it, and 255 marks, which wrap round 55 bits, end at -2^47. The lower 9 bits count additions: from 0 in
// one layer that uses the buffer, from LAP in the next, so that no word of two layers ago is taken for new.
constexpr float FIXED_ONE = 1 << 22, FIXED_LIMIT = 1 << 16;
constexpr long long FIXED_NAN = 1ll << 47, FIXED_EDGE = 1ll << 46;
constexpr int COUNT_BITS = 9, LAP = 256, MOST_CLUSTERS = 254;  // and a carrier: 255 additions

__device__ int lap(unsigned steps) { return steps / 2 % 2 * LAP; }  // each buffer is used every second layer

__device__ long long to_word(float v) {  // one addition of v
  return (fabsf(v) < FIXED_LIMIT ? __float2ll_rn(v * FIXED_ONE) : FIXED_NAN) * (1 << COUNT_BITS) + 1;
}
__device__ float from_word(long long word) {
  const long long q = word >> COUNT_BITS;
  return q > -FIXED_EDGE && q < FIXED_EDGE ? __ll2float_rn(q) * (1 / FIXED_ONE) : __int_as_float(0x7fffffff);
}
// 0 if two words are whole; else, if the carrier has been there and both lack as many, how many additions.
__device__ unsigned lacking(const longlong2& words, unsigned count) {
  return ((count - (unsigned)words.x) | (count - (unsigned)words.y)) % (1 << COUNT_BITS);
}

// Of two tokens the one with the larger logit is ranked before, of equal logits the smaller token; NaN is above all,
// as in torch. A rank is 64 bits: the logit's bits in an order in which integers compare as the floats do, then ~token.
__device__ unsigned long long rank_of(float logit, int token) {
  const uint32_t bits = __float_as_uint(logit + 0.f);  // -0 becomes 0, its equal
  const uint32_t order = logit != logit ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
  return (unsigned long long)order << 32 | ~(uint32_t)token;
}
__device__ int token_of(unsigned long long rank) { return (int)~(uint32_t)rank; }
__device__ float logit_of(unsigned long long rank) {
  const uint32_t order = rank >> 32;
  return __int_as_float(order >> 31 ? order & ~(1u << 31) : ~order);
}

// Philox4x64-10 (Salmon et al., SC11), as numpy has it: four 64-bit words for each count of four tokens.
__device__ float uniform(unsigned long long seed, int position, int token) {
  unsigned long long c[4] = {token / 4 + 1ull, (unsigned long long)position, 0, 0}, key[2] = {seed, 0};
  for (int i = 0; i < 10; i++) {
    const unsigned long long a = 0xD2E7470EE14C6C93 * c[0], a_high = __umul64hi(0xD2E7470EE14C6C93, c[0]),
                             b = 0xCA5A826395121157 * c[2], b_high = __umul64hi(0xCA5A826395121157, c[2]);
    c[0] = b_high ^ c[1] ^ key[0], c[1] = b, c[2] = a_high ^ c[3] ^ key[1], c[3] = a;
    key[0] += 0x9E3779B97F4A7C15, key[1] += 0xBB67AE8584CAA73B;
  }
  const unsigned long long word = token & 2 ? (token & 1 ? c[3] : c[2]) : (token & 1 ? c[1] : c[0]);
  return __ull2float_rn(word) * 5.421010862427522e-20f;  // 2^-64
}

// 7. The stages ===========================================================================================
// A card: math; owner, who computes which part; bytes that a block moves; syncs; why it is done like this.

// ---- The division of work --------------------------------------------------------------------------------
// Balance by bytes: a head costs each block of its cluster 1/K of its rows and cached tokens, and hidden
// units fill up what the heads leave. Two costs are more than bytes. ATTENTION_BYTES charges a head for its
// chain of small steps, which move few: 24 KiB in 160m, 0 in 2.8b, where the ring fills up meanwhile. A
// cached token counts KV_WEIGHT / 2 times: softmax makes it slower to use than to read.
constexpr int KV_WEIGHT = 3;
static_assert(64ll * (8ll * HS * C + 2ll * KV_WEIGHT * HS * CTX + ATTENTION_BYTES) < 1ll << 31,
              "make_plan counts in 32 bits");

// The share that block `index` of `blocks` has of rows first..first + n - 1: as many whole tiles as all can have,
// dealt out in turn, so that blocks read near one another; then a run of what is left.
__device__ Share deal(int first, int n, int index, int blocks) {
  const int begin = n * index / blocks, end = n * (index + 1) / blocks;
  const int dealt = n / blocks / TILE_ROWS * TILE_ROWS;
  return {end - begin, dealt, first + index * TILE_ROWS, blocks, first + begin + dealt * (blocks - index)};
}

__device__ Plan make_plan(int block, int blocks, int position) {
  Plan p;
  p.rank = block % K; p.cluster = block / K; p.clusters = blocks / K;
  const int heads = NH / p.clusters, busy = NH % p.clusters * K;  // the first `busy` blocks have one more
  // Units are shared out in grains of C / 64 bytes, 256 a unit; in ints, as 64-bit divisions take a GPU long.
  const int head_bytes = (8 * HS * C + 2 * KV_WEIGHT * HS * position) / K + ATTENTION_BYTES;
  const int head_grains = 64 * head_bytes / C, fair_grains = (256 * F + head_grains * NH * K) / blocks;
  const int busy_grains = max(fair_grains - (heads + 1) * head_grains, 0);  // units of a busy block
  const int busy_units = busy_grains * busy / 256;
  const bool is_busy = block < busy;
  p.units = is_busy ? deal(0, busy_units, block, busy)
                    : deal(busy_units, F - busy_units, block - busy, blocks - busy);
  // Shares of whole tiles, rounded up: two a head, at (1) and (2). What is left comes last.
  const int shares = 2 * (heads + is_busy) + 1;
  p.filler = ceil_div(ceil_div(p.units.count, shares), TILE_ROWS) * TILE_ROWS;
  const int tokens = ceil_div(position, K);
  p.first_token = min(tokens * p.rank, position);
  p.last_token = min(tokens * (p.rank + 1), position);
  return p;
}

__device__ void load_rope(const Model& m, Shared& s, int position, int threads) {
  for (int i = threadIdx.x; i < ROT / 2; i += threads) {
    s.rope_cos[i] = m.rope_cos[position * (ROT / 2) + i];
    s.rope_sin[i] = m.rope_sin[position * (ROT / 2) + i];
  }
}

struct Ring {  // a place in the ring: the next stage, and the parity of the phase it is in
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  }
};

__device__ half* cache_row(const Model& m, int layer, int kv, int head, int token) {
  return m.cache + (((size_t)(layer * 2 + kv) * NH + head) * CTX + token) * HS;
}

// ---- The producer ----------------------------------------------------------------------------------------
// The same tiles in the same order as the workers' (chapter 8): a stage carries no name, order alone says
// what is in it. A copy brings the rows that exist; the rest of its stage keeps old bytes.
struct Producer {
  const Model& m;
  Shared& s;
  const uint64_t policy = read_once_policy();
  Ring ring;
  uint32_t token_parity = 0;
  unsigned long long next = 0;  // ns; no copy starts before

  // Waits for (E), and for the pace. Memory serves some blocks faster than others, and all wait for the last
  // one at (4); so all blocks together ask for PACE bytes a ns at most, an equal share each. In 2.8b that is
  // what memory delivers on paper. Time that is lost, but for the clock's grain, is not made up for.
  __device__ void claim(uint32_t bytes) {
    // (E) A new barrier answers as if a phase of parity 1 were complete, so the first lap does not wait.
    wait(m, s, &s.empty[ring.stage], ring.parity ^ 1, SYNC_EMPTY);
    unsigned long long now;
    while ((now = global_ns()) < next && next - now < 1'000'000) {}  // more: the clock was set back
    next = max(next, now - CLOCK_NS) + bytes * gridDim.x / PACE;
    barrier_expect(&s.full[ring.stage], bytes);  // (F)
  }
  __device__ void copy(void* to, const void* from, uint32_t bytes) {
    bulk_copy(to, from, bytes, &s.full[ring.stage], policy);
  }
  // Biases come with a tile's first stage, from a multiple of 8 on: copies start at multiples of 16 bytes.
  __device__ void rows(const half* w, const half* bias, int first, int last) {
    for (int row = first; row < last; row += TILE_ROWS) {
      const int n = min(TILE_ROWS, last - row), skip = row % 8;
      for (int done = 0; done < n; done += STAGE_ROWS) {
        const int bytes = min(STAGE_ROWS, n - done) * C * 2;
        const int bias_bytes = bias && done == 0 ? ceil_div(skip + n, 8) * 16 : 0;
        claim(bytes + bias_bytes);
        copy(s.ring[ring.stage], w + (size_t)(row + done) * C, bytes);
        if (bias_bytes) copy(s.bias[ring.stage], bias + row - skip, bias_bytes);
        ring.next();
      }
    }
  }
  __device__ void units(const Layer& w, const Share& share, int& done, int end) {
    for (; done < end; done += TILE_ROWS) {
      const int unit = share.at(done), n = min(TILE_ROWS, end - done);
      rows(w.w_up, w.b_up, unit, unit + n);
      rows(w.w_down, nullptr, unit, unit + n);
    }
  }
  // Not the newest token, which is still on its way to the cache: S5 has it in k_new and v_new.
  __device__ void tokens(const half* k, const half* v, int first, int last) {
    for (int t = first; t < last; t += KV_TOKENS) {
      const int bytes = min(KV_TOKENS, last - t) * HS * 2;
      claim(2 * bytes);
      copy(s.ring[ring.stage], k + (size_t)t * HS, bytes);
      copy(s.ring[ring.stage] + KV_TOKENS * HS, v + (size_t)t * HS, bytes);
      ring.next();
    }
  }
  __device__ void token(int first_layer, int last_layer, int position, bool is_first, bool lm_head) {
    const Plan plan = make_plan(blockIdx.x, gridDim.x, position);  // s.plan is of the workers' token
    for (int layer = first_layer; layer < last_layer; layer++) {
      const Layer& w = m.layers[layer];
      int done = 0;  // units
      for (int h = plan.cluster; h < NH; h += plan.clusters) {
        const int qkv = h * 3 * HS + plan.rank * QKV_ROWS, out = h * HS + plan.rank * OUT_ROWS;
        rows(w.w_qkv, w.b_qkv, qkv, qkv + QKV_ROWS);
        units(w, plan.units, done, min(done + plan.filler, plan.units.count));
        if (!is_first && layer == 0 && h == plan.cluster) {  // the token before, made here, is cached
          wait(m, s, &s.token_ready, token_parity, SYNC_TOKEN);  // (h)
          token_parity ^= 1;
          order_copies();
        }
        tokens(cache_row(m, layer, 0, h, 0), cache_row(m, layer, 1, h, 0), plan.first_token, plan.last_token);
        units(w, plan.units, done, min(done + plan.filler, plan.units.count));
        rows(w.w_out, nullptr, out, out + OUT_ROWS);
      }
      units(w, plan.units, done, plan.units.count);
    }
    if (lm_head)
      for (int i = 0; i < s.rows.count; i += TILE_ROWS)
        rows(m.embed_out, nullptr, s.rows.at(i), s.rows.at(i) + min(TILE_ROWS, s.rows.count - i));
  }
  __device__ void run(int first_layer, int last_layer, int first, int end, bool lm_head) {
    for (int position = first; position < end; position++)
      token(first_layer, last_layer, position, position == first, lm_head);
    wait(m, s, &s.workers_done, 0, SYNC_FULL);  // stays for workers that may hang at (F): see PATIENCE
  }
};

// ---- The workers -----------------------------------------------------------------------------------------
struct Norms { uint4 w1[PIECES], b1[PIECES], w2[PIECES], b2[PIECES]; };  // LayerNorms' gains and biases, fp16

struct Worker {  // one thread's view
  const Model& m;
  Shared& s;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int team = TEAMS == 1 ? 0 : tid / TEAM, piece = TEAMS == 1 ? tid : tid % TEAM, team_warp = piece / 32;
  const int row = lane % R * TEAMS + team;  // which row of a tile this lane finishes, of the R of its team
  Ring ring;
  int flip = 0;                             // which half of `dots` is next, see dot_tile
  uint32_t head_parity = 0, sums_parity = 0;
  Columns y;
  const int carried = (gridDim.x - 1 - blockIdx.x) * WORKERS + tid;  // pair of columns; past C / 2: none
  longlong2 own_now, own_next;              // of that pair, the words of x, and those that x_next began with

  // Column of a thread's element i: consecutive threads read consecutive 16 bytes, none waiting for another.
  __device__ int column(int i) const { return (i / 8 * TEAM + piece) * 8 + i % 8; }
  __device__ uint4 weights(int stage_row, int p) const {
    return as16(&s.ring[ring.stage][stage_row * C + column(8 * p)]);
  }
  __device__ void wait_full() const { while (barrier_open(&s.full[ring.stage], ring.parity)) {} }  // (F)
  __device__ void release() {
    __syncwarp();                                           // (E) all lanes have read: one arrival a warp
    if (lane == 0) barrier_arrive(&s.empty[ring.stage]);    // (E)
    ring.next();
  }

  // DOT TILE. The next tile's n rows times x, plus bias; biases start `skip` places into what was copied.
  // Team t has rows t, t + TEAMS, ...; each of its lanes returns row `row`. From n on that is a sum of old
  // bytes, NaN perhaps, or 0, for nobody to use: a branch a row would cost more than the row, as loads could
  // not start together. One (c) a tile is enough, with two buffers in turn: a warp that writes one for tile i
  // + 2 has passed (c) of tile i + 1, at which every warp arrived after it had read tile i.
  __device__ float dot_tile(const Columns& x, int n, int skip, bool has_bias) {
    float sums[R] = {}, bias = 0;
    for (int part = 0; part < PARTS; part++) {
      if (part * STAGE_ROWS >= n) break;
      wait_full();  // (F)
      for (int i = 0; i < R / PARTS; i++) {
        const int r = part * R / PARTS + i;
        for (int p = 0; p < PIECES; p++) sums[r] = dot8(weights(i * TEAMS + team, p), x + 8 * p, sums[r]);
      }
      if (part == 0 && has_bias && row < n) bias = __half2float(s.bias[ring.stage][skip + row]);
      release();  // (E)
    }
    float sum = reduce_rows(sums, lane);
    if (TEAM_WARPS > 1) {
      float(&part)[R][TEAM_WARPS] = s.dots[flip][team];
      if (lane < R) part[lane][team_warp] = sum;
      team_sync(team);  // (c)
      sum = 0;
      for (int w = 0; w < TEAM_WARPS; w++) sum += part[lane % R][w];
      flip ^= 1;
    }
    return sum + bias;
  }

  // AXPY TILE. y += a * row for the next tile's rows; lane l holds a of row `row`, as dot_tile leaves it. For
  // rows from n on it adds 0 times one that exists, as 0 times old bytes may be NaN.
  __device__ void axpy_tile(float a, int n) {
    if (row >= n) a = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      if (part * STAGE_ROWS >= n) break;
      wait_full();  // (F)
      for (int i = 0; i < R / PARTS; i++) {
        const int r = part * R / PARTS + i, stage_row = i * TEAMS + team;
        const float of_row = __shfl_sync(~0u, a, r, LANES);
        const int exists = part * STAGE_ROWS + stage_row < n ? stage_row : 0;
        for (int p = 0; p < PIECES; p++) axpy8(of_row, weights(exists, p), y + 8 * p);
      }
      release();  // (E)
    }
  }

  // S0 READ X: from its words, once they are whole; before layer 0, a row of embed_in
  //   owner   each thread reads a share of the columns, 2 at a time, and gets its own from shared memory
  //   bytes   8 * C, 20 KB from L2, the same for all blocks     syncs   contains (4), (g); ends with (a)
  //   why     teams that each read all of x would ask L2 for the same few lines that many times over; threads
  //           that all wait for the last addition would ask for them all the time, and slow it down
  // One thread polls a word among the last that are added to, of this rank's columns, so that whichever block
  // does not come, some rank notices; read_residual checks all.
  __device__ void wait_for_x(const long long* x_now, unsigned count) const {
    if (tid == 0) {
      const long long start = clock64();
      for (unsigned lack; (lack = lacking(load_relaxed(x_now + (s.plan.rank + 1) * OWN - 2), count));)  // (4)
        if (clock64() - start > PATIENCE) give_up(m.failure, SYNC_X, s.layer, lack);
    }
    workers_sync();  // (g)
  }
  __device__ void read_residual(const long long* x_now, unsigned count, Columns& x) {
    longlong2 q[PAIRS];
    for (unsigned lack = 1; lack;) {
      lack = 0;
      for (int i = 0; i < PAIRS; i++)  // all loads start before the first is used: one trip to L2, not PAIRS
        if (tid + i * WORKERS < C / 2) q[i] = load_relaxed(x_now + 2 * (tid + i * WORKERS));
      for (int i = 0; i < PAIRS; i++)
        if (tid + i * WORKERS < C / 2) lack |= lacking(q[i], count);  // (4)
    }
    for (int i = 0; i < PAIRS; i++) {
      const int pair = tid + i * WORKERS;
      if (pair == carried) own_now = q[i];
      if (pair < C / 2)
        *reinterpret_cast<float2*>(&s.x[2 * pair]) = make_float2(from_word(q[i].x), from_word(q[i].y));
    }
    workers_sync();  // (a)
    for (int i = 0; i < COLS; i++) x[i] = s.x[column(i)];
  }

  // -1, too, is a row that exists: the launch makes its other tokens, and the host stops at the -1.
  __device__ const half* embedding(int token) const {
    return m.embed_in + (size_t)min(max(token, 0), V - 1) * C;
  }
  __device__ void read_embedding(int token, Columns& x) const {
    for (int p = 0; p < PIECES; p++) widen(load16(embedding(token) + column(8 * p)), x + 8 * p);
  }

  // Called before (4) or (5), so that they have arrived when x has. Layer L is the final LayerNorm.
  __device__ Norms load_norms(int layer) const {
    const Layer& w = m.layers[min(layer, L - 1)];
    Norms n;
    for (int p = 0; p < PIECES; p++) {
      const int c = column(8 * p);
      n.w1[p] = load16((layer < L ? w.ln1_w : m.lnf_w) + c);
      n.b1[p] = load16((layer < L ? w.ln1_b : m.lnf_b) + c);
      n.w2[p] = load16(w.ln2_w + c);
      n.b2[p] = load16(w.ln2_b + c);
    }
    return n;
  }

  // S1 LAYERNORM: x <- (x - mean) / sqrt(var + eps), then xn1 = x * w1 + b1 and xn2 = x * w2 + b2
  //   owner   every team, for itself: to share what one block computes would take a second sync of the grid
  //   bytes   8 * C, 20 KB, on their way since before (4)       syncs   contains (b)
  //   why     E[x^2] - E[x]^2 cancels where the mean is large. So a thread takes its mean first, then sums
  //           the squared distances to it, and groups of n values merge exactly (Chan, Golub, LeVeque 1979):
  //               mean = (mean_a + mean_b) / 2, squares = squares_a + squares_b + (mean_a - mean_b)^2 * n / 2
  __device__ void normalize(Columns& x) {
    float mean = 0, squares = 0, n = COLS;
    for (int i = 0; i < COLS; i++) mean += x[i];
    mean /= n;
    for (int i = 0; i < COLS; i++) squares += (x[i] - mean) * (x[i] - mean);
    for (int w = 1; w < LANES; w *= 2) {
      const float other = __shfl_xor_sync(~0u, mean, w);
      squares += __shfl_xor_sync(~0u, squares, w) + (other - mean) * (other - mean) * (0.5f * n);
      mean = 0.5f * (mean + other);
      n *= 2;
    }
    if (TEAM_WARPS > 1) {
      float(&part)[TEAM_WARPS][2] = s.stats[team];
      if (lane == 0) part[team_warp][0] = mean, part[team_warp][1] = squares;
      team_sync(team);  // (b)
      mean = squares = 0;
      for (int w = 0; w < TEAM_WARPS; w++) mean += part[w][0];
      mean /= TEAM_WARPS;
      for (int w = 0; w < TEAM_WARPS; w++)
        squares += part[w][1] + n * (part[w][0] - mean) * (part[w][0] - mean);
    }
    const float scale = rsqrtf(squares / C + LN_EPS);
    for (int i = 0; i < COLS; i++) x[i] = (x[i] - mean) * scale;
  }

  __device__ void affine(const Columns& x, const uint4* gain, const uint4* bias, Columns& out) const {
    for (int p = 0; p < PIECES; p++) {
      float g[8], b[8]; widen(gain[p], g); widen(bias[p], b);
      for (int i = 0; i < 8; i++) out[8 * p + i] = fmaf(x[8 * p + i], g[i], b[i]);
    }
  }

  // ClusterGather: a finished row goes to the same place in all K inboxes, our own included. Lanes l, l + R,
  // ... hold the same row: each takes another rank. After (c) all warps of a team do, so the first pushes.
  __device__ void cluster_gather(float* place, float value, bool valid, uint64_t* ready) const {
    if (!valid || team_warp > 0) return;
    for (int r = lane % LANES / R; r < K; r += LANES / R) push(peer(place, r), value, peer(ready, r));  // (1)
  }

  // S2 QKV: q, k, v of head h = rows @ xn1 + b
  //   owner   rank r has rows r*QKV_ROWS.. of the head's 3*HS
  //   bytes   3 * HS * C * 2 / K     syncs   (F) (E) a stage; (c) a tile; (1) after some hidden units
  //   why     each tile is pushed as soon as it is finished, so only the last one's journey is left for (1)
  __device__ void qkv_rows(const Columns& xn1, int h) {
    if (tid == 0) barrier_expect(&s.qkv_ready, sizeof(s.qkv));  // (1)
    const int first = s.plan.rank * QKV_ROWS;
    for (int i = 0; i < QKV_ROWS; i += TILE_ROWS) {
      const int n = min(TILE_ROWS, QKV_ROWS - i);
      const float value = dot_tile(xn1, n, (h * 3 * HS + first + i) % 8, true);
      cluster_gather(&s.qkv[first + i + row], value, row < n, &s.qkv_ready);
    }
  }

  // S3 ROPE, S4 APPEND: (a, b) <- (a cos - b sin, b cos + a sin) for dimensions i, i + ROT/2 of q and k
  //   owner   a thread for each of 3*HS values, the same in every rank; the last rank writes the cache
  //   bytes   4 * HS to the cache    syncs   after (1); ends with (d)
  //   why     k and v are rounded to fp16 before use, so that this token is seen now as it will be later;
  //           every rank rotates for itself, as waiting for another would need a sync more
  __device__ void rotate_and_append(int layer, int h, int position) {
    for (int i = tid; i < 3 * HS; i += WORKERS) {
      const int which = i / HS, d = i % HS;  // 0 q, 1 k, 2 v
      const float* v = s.qkv + which * HS;
      float value = v[d];
      if (which < 2 && d < ROT) {
        const int pair = d % (ROT / 2);
        const float other = d < ROT / 2 ? -v[(d + ROT / 2) % ROT] : v[(d + ROT / 2) % ROT];
        value = fmaf(value, s.rope_cos[pair], other * s.rope_sin[pair]);
      }
      if (which == 0) {
        s.q[d] = value * (rsqrtf((float)HS) * 1.44269504f);  // log2(e): S5's softmax is in powers of 2
        TAP(TAP_Q + h * HS + d, value);
      } else {
        (which == 1 ? s.k_new : s.v_new)[d] = __float2half_rn(value);
        if (s.plan.rank == K - 1) cache_row(m, layer, which - 1, h, position)[d] = __float2half_rn(value);
        TAP((which == 1 ? TAP_K : TAP_V) + h * HS + d, value);
      }
    }
    workers_sync();  // (d)
  }

  // S5 ATTEND: s_t = q . k_t, m = max_t s_t, l = sum_t 2^(s_t - m), o = sum_t 2^(s_t - m) v_t
  //   owner   rank r has tokens first_token.., dealt out to TOKEN_LANES lanes a token, 8 dimensions a lane;
  //           the last warp of the last rank, which has the fewest tokens, adds the new one
  //   bytes   4 * HS * T / K, 328 KB, 9.3 us at T = 2048     syncs   (d); (F) (E) a stage; (e); later (2)
  //   why     online softmax: a running maximum needs no second pass; when it grows, l and o shrink by
  //           2^(old - new). Parts with maxima of their own merge alike: lanes, warps (e), ranks (S6)
  __device__ void attend() {
    if (tid == 0) barrier_expect(&s.slice_ready, sizeof(s.slice_o) + sizeof(s.slice_ml));  // (2)
    const int d = lane % TOKEN_LANES * 8, sub = lane / TOKEN_LANES;
    const bool has_d = d < HS;  // a head of 80 uses 10 lanes of 16
    float q[8], o[8] = {}, mx = -1e30f, l = 0;
    for (int i = 0; i < 8; i++) q[i] = has_d ? s.q[d + i] : 0.f;

    if (s.plan.rank == K - 1 && warp == WARPS - 1) {  // the new token
      float score = has_d ? dot8(as16(s.k_new + d), q, 0) : 0.f;
      for (int w = 1; w < TOKEN_LANES; w *= 2) score += __shfl_xor_sync(~0u, score, w);
      if (sub == 0) {
        mx = score; l = 1;
        if (has_d) widen(as16(s.v_new + d), o);
      }
    }

    // Each lane takes its tokens of a stage at once, with one rescaling.
    constexpr int STRIDE = WARPS * WARP_TOKENS, BATCH = ceil_div(KV_TOKENS, STRIDE);
      for (int t0 = s.plan.first_token; t0 < s.plan.last_token; t0 += KV_TOKENS) {
      const int n = min(KV_TOKENS, s.plan.last_token - t0);
      wait_full();  // (F)
      const half *k = s.ring[ring.stage] + d, *v = k + KV_TOKENS * HS;
      const int base = warp * WARP_TOKENS + sub;
      float score[BATCH], top = mx;
      for (int u = 0; u < BATCH; u++) {
        const int t = base + u * STRIDE;
        score[u] = t < n && has_d ? dot8(as16(k + t * HS), q, 0) : 0.f;
      }
      for (int u = 0; u < BATCH; u++) {  // a loop of its own: the loads of the first start together
        for (int w = 1; w < TOKEN_LANES; w *= 2) score[u] += __shfl_xor_sync(~0u, score[u], w);
        if (base + u * STRIDE < n) top = fmaxf(top, score[u]);
      }
      const float shrink = exp2f(mx - top);
      mx = top; l *= shrink;
      for (int i = 0; i < 8; i++) o[i] *= shrink;
      for (int u = 0; u < BATCH; u++) {
        const int t = base + u * STRIDE;
        if (t < n) {  // else old bytes, NaN perhaps, and 0 * NaN is NaN
          const float e = exp2f(score[u] - top);
          l += e;
          if (has_d) axpy8(e, as16(v + t * HS), o);
        }
      }
      release();  // (E)
    }

    for (int w = TOKEN_LANES; w < 32; w *= 2) {  // lanes that hold the same dimensions of other tokens
      const float top = fmaxf(mx, __shfl_xor_sync(~0u, mx, w)), shrink = exp2f(mx - top);
      mx = top;
      l *= shrink; l += __shfl_xor_sync(~0u, l, w);
      for (int i = 0; i < 8; i++) { o[i] *= shrink; o[i] += __shfl_xor_sync(~0u, o[i], w); }
    }
    if (sub == 0 && has_d)
      for (int i = 0; i < 8; i++) s.part_o[warp][d + i] = o[i];
    if (lane == 0) s.part_m[warp] = mx, s.part_l[warp] = l;
    workers_sync();  // (e)
    if (tid < HS) push_slice();
  }

  // ClusterReduce of o: thread d merges the warps' o[d] and pushes it to d's owner; m and l go to every rank.
  __device__ void push_slice() const {
    float top = s.part_m[0], l = 0, o = 0;
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, s.part_m[w]);
    for (int w = 0; w < WARPS; w++) {
      const float shrink = exp2f(s.part_m[w] - top);
      l = fmaf(shrink, s.part_l[w], l);
      o = fmaf(shrink, s.part_o[w][tid], o);
    }
    const int owner = tid / OUT_ROWS;
    push(peer(&s.slice_o[s.plan.rank][tid % OUT_ROWS], owner), o, peer(&s.slice_ready, owner));  // (2)
    if (tid < K) {
      push(peer(&s.slice_ml[s.plan.rank][0], tid), top, peer(&s.slice_ready, tid));              // (2)
      push(peer(&s.slice_ml[s.plan.rank][1], tid), l, peer(&s.slice_ready, tid));                // (2)
    }
  }

  // S6 MERGE, S7 OUT ROWS: o = sum_r 2^(m_r - m) o_r / sum_r 2^(m_r - m) l_r, then y += o[d] * output row d
  //   owner   rank r has dimensions r*OUT_ROWS.. of the head; every warp merges for itself what it needs
  //   bytes   HS * C * 2 / K         syncs   after (2); (F) (E) a stage
  //   why     parts are added in the order of ranks, not of arrival, so that the bits are the same every time
  __device__ void out_rows(int h) {
    float top = s.slice_ml[0][0], weight[K], l = 0;
    for (int r = 1; r < K; r++) top = fmaxf(top, s.slice_ml[r][0]);
    for (int r = 0; r < K; r++) {
      weight[r] = exp2f(s.slice_ml[r][0] - top);
      l = fmaf(weight[r], s.slice_ml[r][1], l);
    }
    for (int i = 0; i < OUT_ROWS; i += TILE_ROWS) {
      const int n = min(TILE_ROWS, OUT_ROWS - i);
      float o = 0;
      if (row < n) {
        for (int r = 0; r < K; r++) o = fmaf(weight[r], s.slice_o[r][i + row], o);
        o /= l;
        TAP(TAP_O + h * HS + s.plan.rank * OUT_ROWS + i + row, o);
      }
      axpy_tile(o, n);
    }
  }

  // S8 HIDDEN UNITS: h_j = gelu(up row j . xn2 + b_j), y += h_j * down row j
  //   owner   a block has units first_unit..last_unit - 1, and nobody else needs to know h_j
  //   bytes   4 * C a unit           syncs   (F) (E) a stage; (c) a tile
  //   why     it needs nothing but x, so it fills the time in which something else is on its way; Pythia is
  //           trained with gelu(a) = a/2 (1 + erf(a / sqrt 2)), from which that by tanh is off by up to 5e-4
  __device__ void units(const Columns& xn2, int& done, int end) {
    for (; done < end; done += TILE_ROWS) {
      const int unit = s.plan.units.at(done), n = min(TILE_ROWS, end - done);
      const float a = dot_tile(xn2, n, unit % 8, true);
      const float hidden = 0.5f * a * (1 + erff(a * 0.70710678f));
      if (row < n) TAP(TAP_H + unit + row, hidden);
      axpy_tile(hidden, n);
    }
  }

  // S9 SUM: x_next = x + output biases, by carry, + sum over all teams of y
  //   owner   every team pushes its y to the ranks that own its columns; rank r adds r*OWN.. to x_next
  //   bytes   4 * C a team, 10 KB to shared memories; 8 * C a cluster, 20 KB to L2     syncs   contains (3)
  //   why     the cluster adds up first (ClusterReduce), as additions to one address queue up in L2; in the
  //           order of ranks and teams, as these sums are fp32
  __device__ void cluster_reduce() {
    if (tid == 0) barrier_expect(&s.sums_ready, sizeof(s.sums));  // (3)
    for (int p = 0; p < PIECES; p++) {
      const int c = column(8 * p), owner = c / OWN;
      const uint32_t place = peer(&s.sums[s.plan.rank * TEAMS + team][c % OWN], owner),
                     ready = peer(&s.sums_ready, owner);
      for (int i = 0; i < 8; i += 4) push4(place + 4 * i, y + 8 * p + i, ready);  // (3)
    }
    wait(m, s, &s.sums_ready, sums_parity, SYNC_SUMS);  // (3)
    sums_parity ^= 1;
  }

  // Thread i adds column i: a warp's 32 additions are 256 bytes side by side, two requests to L2.
  __device__ void add_to_residual(long long* x_next) const {
    for (int c = tid; c < OWN; c += WORKERS) {
      float sum = 0;
#pragma unroll 8
      for (int part = 0; part < K * TEAMS; part++)
        sum += s.sums[part][c];
      add_relaxed(x_next + s.plan.rank * OWN + c, to_word(sum));
    }
  }

  // One thread for each pair of columns, of the last blocks: where heads are few, they have none. It takes
  // away the old word, count and all; `lap` is what the new count starts from. Unsigned, as that may wrap.
  __device__ void carry(int layer, int token, long long* x_next, int lap) const {
    const int c = 2 * carried;
    if (c >= C) return;
    const Layer& w = m.layers[layer];
    const float2 out = widen2(w.b_out + c), down = widen2(w.b_down + c),
                 x = layer == 0 ? widen2(embedding(token) + c)
                                : make_float2(from_word(own_now.x), from_word(own_now.y));
    add_relaxed(x_next + c, to_word(x.x + out.x + down.x) + lap - (unsigned long long)own_next.x);
    add_relaxed(x_next + c + 1, to_word(x.y + out.y + down.y) + lap - (unsigned long long)own_next.y);
  }

  // (5) A vote of all blocks. Each brings what its threads have found, and gets what all have found together.
  // The counter only grows: nothing to reset, no phase to mix up; the difference is right where it wraps.
  __device__ Vote vote(Vote mine, unsigned& votes) const {
    Vote* const votes_of_all = m.state->vote;
    Vote& all = votes_of_all[votes % 3];
    if (blockIdx.x == 0 && tid == 0) votes_of_all[(votes + 1) % 3] = {};  // last read before the vote before
    merge_lanes(mine);
    if (lane == 0) s.vote[warp] = mine;
    workers_sync();  // (f)
    if (warp == 0) {
      mine = lane < WARPS ? s.vote[lane] : Vote{};
      merge_lanes(mine);
    }
    votes++;
    if (tid == 0) {
      atomicMax(&all.best, mine.best), atomicMax(&all.drawn, mine.drawn);
      if (mine.mass) atomicAdd(&all.mass, mine.mass);
      if (mine.count) atomicAdd(&all.before, mine.before), atomicAdd(&all.count, mine.count);
      unsigned* counter = &m.state->counter;
      const unsigned target = votes * gridDim.x;
      arrive_release(counter);  // (5)
      const long long start = clock64();
      for (unsigned seen; (int)((seen = load_acquire(counter)) - target) < 0;)  // (5)
        if (clock64() - start > PATIENCE) give_up(m.failure, SYNC_GRID, s.layer, target - seen);
    }
    workers_sync();  // (g)
    return all;  // (5) acquired it, and (g) passes that on to all threads of the block: plain loads will do
  }
  __device__ static void merge_lanes(Vote& v) {
    for (int w = 16; w >= 1; w /= 2) {
      v.best = max(v.best, __shfl_xor_sync(~0u, v.best, w));
      v.drawn = max(v.drawn, __shfl_xor_sync(~0u, v.drawn, w));
      v.mass += __shfl_xor_sync(~0u, v.mass, w);
      v.before += __shfl_xor_sync(~0u, v.before, w);
      v.count += __shfl_xor_sync(~0u, v.count, w);
    }
  }

  // S10 LM HEAD: logits = rows @ LNf(x)
  //   owner   a block has s.rows; a thread keeps the logit of row `row` of every GROUPS-th tile, KEPT at most
  //   bytes   V * C * 2 / 132, 1.95 MB, 55 us     syncs   after (4); (F) (E) a stage; (c) a tile; then (5)
  __device__ int kept_token(int k) const {  // whose logit it is; V: none
    const int i = (k * GROUPS + piece / R) * TILE_ROWS;
    return i + row < s.rows.count ? s.rows.at(i) + row : V;
  }
  __device__ void lm_head(const Columns& x, float (&logits)[KEPT]) {
    for (int i = 0; i < s.rows.count; i += TILE_ROWS) {
      const float logit = dot_tile(x, min(TILE_ROWS, s.rows.count - i), 0, false);
#pragma unroll
      for (int k = 0; k < KEPT; k++)
        if (i == (k * GROUPS + piece / R) * TILE_ROWS) logits[k] = logit;
    }
#pragma unroll
    for (int k = 0; k < KEPT; k++)
      if (kept_token(k) < V) m.logits[kept_token(k)] = logits[k];
  }

  // Noise for the token at `position`: -T * log(E), E ~ Exp(1). It depends on nothing that is computed here, so
  // it is made before (4), while x is on its way.
  __device__ void draw_noise(int position, float (&noise)[KEPT]) const {
    const float temperature = m.settings->temperature;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
      noise[k] = 0;
      if (temperature > 0 && kept_token(k) < V)
        noise[k] = -temperature * logf(-log1pf(-uniform(m.settings->seed, position, kept_token(k))));
    }
  }

  // What this block has to say: of all its tokens, and of those ranked before the candidate.
  __device__ Vote tally(const float (&logits)[KEPT], const float (&noise)[KEPT], float largest,
                        unsigned long long candidate) const {
    Vote v = {};
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
      const int token = kept_token(k);
      if (token == V) continue;
      const unsigned long long rank = rank_of(logits[k], token);
      const float part = expf((logits[k] - largest) / m.settings->temperature);
      const unsigned long long mass = __float2ull_rz(part * (1ull << 40));
      v.mass += mass;
      if (rank <= candidate) continue;
      v.before += mass, v.count++;
      v.drawn = max(v.drawn, rank_of(logits[k] + noise[k], token));
    }
    return v;
  }

  // The token: argmax of logit + noise over the tokens that top-k and top-p keep; -1 if logits are not finite.
  __device__ int choose(const float (&logits)[KEPT], const float (&noise)[KEPT], unsigned& votes) const {
    Vote mine = {};
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
      const int token = kept_token(k);
      if (token == V) continue;
      mine.best = max(mine.best, rank_of(logits[k], token));
      mine.drawn = max(mine.drawn, rank_of(logits[k] + noise[k], token));
    }
    Vote all = vote(mine, votes);
    const float largest = logit_of(all.best);
    if (!(fabsf(largest) <= 3.4028235e38f)) return -1;
    const Settings& settings = *m.settings;
    const bool cut_k = settings.top_k < V, cut_p = settings.top_p < 1;
    if (settings.temperature == 0 || !(cut_k || cut_p)) return token_of(all.drawn);

    unsigned long long mass = 0;
    if (cut_k && cut_p) {  // bisect for a rank that top_k tokens are ranked before
      unsigned long long low = 0, high = all.best;
      Vote found;
      do {
        const unsigned long long middle = low + (high - low) / 2;
        found = vote(tally(logits, noise, largest, middle), votes);
        (found.count > settings.top_k ? low : high) = middle;
      } while (found.count != settings.top_k);
      mass = found.before;
    }
    while (true) {
      const int token = token_of(all.drawn);
      all = vote(tally(logits, noise, largest, rank_of(load_relaxed(m.logits + token), token)), votes);
      if (mass == 0) mass = all.mass;
      if (all.count < settings.top_k && all.before < settings.top_p * mass) return token;
    }
  }
};

// 8. The kernel ===========================================================================================
// Layer L is the LM head, which shares S0 and S1's code with the layers. Below, a layer of 2.8b at T = 128,
// in steps that end at the marks of -DTIMELINE: what thread 0 of rank 1 of cluster 5 (block 11) does; the KB
// that its block reads, and their us at 35.2 KB a us; the us it took, means of the layers in results/.
//
//  mark        thread 0 of block 11; the others of its block                  KB  share  took  waits for
//  NORM        S0: reads columns 2i, 2i + 1 of x for i = 0, 320, 640, 960                 1.5  L2, (a)
//              S1: has columns 0..7 from here on                                               (b)
//  QKV         S2: rows 1320..1439: head 5, k from dimension 40 on, and v    615   17.5  13.4  memory
//  1           S8: units 382..397; (1)                                       164    4.7   4.4  memory
//  ATTEND      S3: rotates q[0] with q[10]; S4: 160 threads append k and v                1.7  (d)
//              S5: dimensions 0..7 of tokens 64, 84, 104, 124; warp 9         20    0.6        (e)
//              adds the new one; merges o[0] of 10 warps, pushes it to rank 0
//  2           S8: units 398..413; (2)                                       164    4.7   3.5  memory
//  OUT, UNITS  S6, S7: output rows 440..479; S8: units 414..416              236    6.7   7.0  memory
//  3           S9: pushes y[0..7] to rank 0; (3)                                          0.6  peer's sums
//  ADDED       S9: adds columns 1280, 1600, 1920, 2240 of the sum to x                    0.4  L2
//  START       (4): being thread 0, polls columns 2558 and 2559 of x                      3.7  other blocks
//  a layer                                                                  1198   34.0  36.0
//
// Of the 3.7 us at (4), 1.0 pass until the last block has added, 1.8 until the first knows that x is whole,
// 0.8 until this one does. From the last unit to the end of S2 it is 19.5 us, of which bytes need 17.5. In
// the first 6.1 no stage is freed: copies go on for the 5.8 that the ring holds. Later steps lose no more.

// tokens: how many to make, fewer where the cache ends; 0: first_layer..last_layer - 1 alone, no LM head.
// Every thread keeps token, position, steps and made for itself; all have the same.
__global__ void __launch_bounds__(WORKERS + 32, 1)
fused_block(const __grid_constant__ Model m, const int first_layer, const int last_layer, const int tokens) {
  extern __shared__ __align__(128) uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  State& state = *m.state;
  int token = state.token, position = state.position;
  unsigned steps = state.steps, votes = state.votes;
  const int end = min(position + max(tokens, 1), CTX);
  if (position >= end) return;  // no row left in the cache: all blocks leave, and nothing changes

  if (threadIdx.x == 0) {
    s.plan = make_plan(blockIdx.x, gridDim.x, position);
    s.rows = deal(0, V, blockIdx.x, gridDim.x);
    for (int i = 0; i < STAGES; i++) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], WARPS);
    barrier_init(&s.qkv_ready, 1), barrier_init(&s.slice_ready, 1), barrier_init(&s.sums_ready, 1);
    barrier_init(&s.token_ready, 1), barrier_init(&s.workers_done, WARPS);
    barriers_exist();
  }
  load_rope(m, s, position, WORKERS + 32);
  Worker w{m, s};
  long long *x_now = m.residual + steps % 2 * C, *x_next = m.residual + (steps + 1) % 2 * C;
  const bool carries = threadIdx.x < WORKERS && 2 * w.carried < C;
  if (carries) w.own_now = load_relaxed(x_now + 2 * w.carried);  // before (0), so before any block adds to it
  w.own_next = {0, 0};  // as the launch before has left it: by now others may have added to it
  cluster_sync();  // (0)

  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS) Producer{m, s}.run(first_layer, last_layer, position, end, tokens > 0);
    return;
  }

  const Plan& plan = s.plan;
  const bool is_thread_0 = blockIdx.x == 0 && w.tid == 0;  // of the grid
  Columns x, xn1, xn2;
  float logits[KEPT] = {}, noise[KEPT] = {};
  Norms norms = w.load_norms(first_layer);

  for (int layer = first_layer; position < end;) {
    if (w.tid == 0) s.layer = layer;
    if (layer == 0) w.read_embedding(token, x);
    else {
      const unsigned count = plan.clusters + 1 + lap(steps);
      if (layer == L) w.draw_noise(position + 1, noise);                // S10
      w.wait_for_x(x_now, count); MARK(MARK_START);                     // (4)
      w.read_residual(x_now, count, x);                                 // S0, (4)
    }
    if (layer == last_layer && tokens == 0) break;
    w.normalize(x);                                                     // S1
    w.affine(x, norms.w1, norms.b1, xn1);

    if (layer == L) {
      if (position + 1 < end) {                        // plan, angles: all have used them before (a)
        if (w.tid == 0) s.plan = make_plan(blockIdx.x, gridDim.x, position + 1);
        load_rope(m, s, position + 1, WORKERS);
      }
      w.lm_head(xn1, logits);                                           // S10
      norms = w.load_norms(0);
      token = w.choose(logits, noise, votes);                           // S10, (5)
      if (w.tid == 0) barrier_arrive(&s.token_ready);                   // (h)
      if (is_thread_0) m.history[position] = token;
      position++, layer = 0;
      continue;
    }

    w.carry(layer, token, x_next, lap(steps + 1));                      // S9
    w.affine(x, norms.w2, norms.b2, xn2);
    for (int i = 0; i < COLS; i++) {
      w.y[i] = 0;
      TAP(TAP_XN1 + w.column(i), xn1[i]);
      TAP(TAP_XN2 + w.column(i), xn2[i]);
    }
    MARK(MARK_NORM);

    int done = 0;  // units
    for (int h = plan.cluster; h < NH; h += plan.clusters) {
      w.qkv_rows(xn1, h); MARK(MARK_QKV);                               // S2
      w.units(xn2, done, min(done + plan.filler, plan.units.count));       // S8, while q, k, v travel
      wait(m, s, &s.qkv_ready, w.head_parity, SYNC_QKV);                // (1)
      MARK(MARK_1);
      w.rotate_and_append(layer, h, position);                          // S3, S4
      w.attend(); MARK(MARK_ATTEND);                                    // S5
      w.units(xn2, done, min(done + plan.filler, plan.units.count));       // S8, while m, l, o travel
      wait(m, s, &s.slice_ready, w.head_parity, SYNC_SLICE);            // (2)
      w.head_parity ^= 1;
      MARK(MARK_2);
      w.out_rows(h); MARK(MARK_OUT);                                    // S6, S7
    }
    w.units(xn2, done, plan.units.count); MARK(MARK_UNITS);                // S8
    w.cluster_reduce(); MARK(MARK_3);                                   // S9, (3)
    w.add_to_residual(x_next);
    norms = w.load_norms(layer + 1); MARK(MARK_ADDED);
    long long* const x_last = x_now;
    x_now = x_next, x_next = x_last, w.own_next = w.own_now, steps++, layer++;
  }
  if (w.lane == 0) barrier_arrive(&s.workers_done);
  if (carries) x_next[2 * w.carried] = x_next[2 * w.carried + 1] = 0;  // all have read it
  if (is_thread_0) {  // all have added to the x of the last (4), so have read these
    state.token = token, state.position = position, state.steps = steps, state.votes = votes;
  }
}

// 9. Host side ============================================================================================
// Why cooperative: at (4) and (5) a block waits for all, so two launches that each got half of the
// multiprocessors would hang. With the attribute the driver starts all blocks at once, or refuses.

static cudaLaunchConfig_t configure(cudaLaunchAttribute (&attributes)[2], int clusters, void* stream) {
  attributes[0].id = cudaLaunchAttributeClusterDimension; attributes[0].val.clusterDim = {K, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative; attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * K); config.blockDim = dim3(WORKERS + 32);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = (cudaStream_t)stream;
  config.attrs = attributes; config.numAttrs = 2;
  return config;
}

// 10. Binding: plain C, called through ctypes. Functions return NULL, or what went wrong. =================
// CUDA keeps an error until it is asked for; cudaGetLastError takes it back, so that no later call finds it.
#define CHECK(call) do { const cudaError_t e = (call); if (e) return cudaGetLastError(), cudaGetErrorString(e); } while (0)

// How many clusters the device holds at once; the occupancy query takes the cluster attribute only.
extern "C" const char* fused_prepare(int* clusters) {
  int device, multiprocessors;
  cudaLaunchAttribute attributes[2];
  CHECK(cudaGetDevice(&device));
  CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  CHECK(cudaFuncSetAttribute(fused_block, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)));
  cudaLaunchConfig_t config = configure(attributes, multiprocessors / K, nullptr);
  config.numAttrs = 1;
  CHECK(cudaOccupancyMaxActiveClusters(clusters, fused_block, &config));
  if (*clusters > multiprocessors / K) *clusters = multiprocessors / K;
  if (*clusters > MOST_CLUSTERS) *clusters = MOST_CLUSTERS;
  return nullptr;
}

extern "C" const char* fused_launch(const void* const* pointers, int clusters, int first_layer,
                                    int last_layer, int tokens, void* stream) {
  if (first_layer < 0 || first_layer >= last_layer || last_layer > L || tokens < 0 ||
      (tokens > 0 && last_layer < L) || (tokens > 1 && first_layer > 0))
    return "no such range of layers: take 0 <= first < last <= L; several tokens need all layers";
  if (tokens > CTX) tokens = CTX;
  if (clusters * K * WORKERS < C / 2 || clusters * K * WORKERS * KEPT < V)
    return "too few blocks to carry x, or to keep the logits: launch more clusters";
  if ((long long)V * clusters * K >= 1ll << 31) return "too many blocks for this vocabulary: launch fewer clusters";
  const Model& m = *reinterpret_cast<const Model*>(pointers);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configure(attributes, clusters, stream);
  CHECK(cudaLaunchKernelEx(&config, fused_block, m, first_layer, last_layer, tokens));
  return nullptr;
}

// 11. Exercises: edits worth trying, with what to expect of a token of 2.8b at T = 128 on an H200 =========
// 1. K: cluster=1 and cluster=4 (python bench.py --ablate). Expect 1 to take 28 % longer, as a head's rows
// all fall to one block, and 4 as long as 2, though fewer blocks fit. Which of (1), (2), (3) takes longer?
// 2. build.py: ROWS 4 and 16 instead of 8. With 4, reductions come twice as often; with 16, the ring is two
// tiles, 4 stages of 40 KB, and the producer one tile ahead at most. Expect 4 to cost 3 %, 16 far more.
// 3. make_plan: filler = 0. The bits of y change, as every thread adds in another order. The block of a head
// takes longer by what (1) and (2) take to travel; how much is that of a token?
// 4. build.py: attention_kib = 96. By the bytes that move, expect blocks with a head to add to x 1.4 us
// earlier, the others 1.4 us later, and a token to take as long; with 2000 tokens cached, 2 % longer. pace =
// 2**20, which is none: expect 1 % in 2.8b, 9 % in 1b.
// 5. wait_for_x: leave it out. The bits stay, as all check what they read; expect a token to take 5 % longer,
// as all poll. Or leave out the check: how often do the bits change, why do some launches not end (carry)?
// 6. dot_tile: leave out `flip ^= 1`, so that all tiles share one half of `dots`. Find the interleaving of
// two warps that goes wrong; count how often: on a GPU, or in the orders of simulator.cpp (-k
// simulated_block).
