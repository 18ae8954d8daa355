// fused_block.cu: one CUDA kernel for all of Pythia's decode step, from the embedding to the next token.
//

// 0. One token, and what it costs =========================================================================
// To write one more token, a language model reads all of its weights once. This file does that whole step in
// one *kernel*, a function that all threads of a GPU run together. One call of the kernel is a *launch*, and
// makes up to 8 tokens in a row. Before the first launch, PyTorch has read the prompt (model.py) and left its
// keys and values in the cache.
//
// In PyTorch the step is these lines. The kernel computes the same in *stages*, S0 to S10. The noise is 0
// unless tokens are drawn at random (chapter 9).
//
//     x = embed_in[token]                                                          # S0     [C]
//     for each layer:
//         xn1, xn2 = layer_norm(x, ln1_w, ln1_b), layer_norm(x, ln2_w, ln2_b)      # S1     [C]
//         q, k, v = (w_qkv @ xn1 + b_qkv).view(NH, 3, HS).unbind(1)                # S2     [NH, HS]
//         q, k = rope(q, T), rope(k, T)                                            # S3     [NH, HS]
//         cache_k[:, T], cache_v[:, T] = k, v                                      # S4     [NH, HS]
//         p = softmax(einsum("hd,htd->ht", q, cache_k[:, :T + 1]) / sqrt(HS))      # S5     [NH, T + 1]
//         o = einsum("ht,htd->hd", p, cache_v[:, :T + 1])                          # S5, S6 [NH, HS]
//         h = gelu(w_up @ xn2 + b_up)                                              # S8     [MLP]
//         y = o.flatten() @ w_out + h @ w_down                                     # S7, S8 [C]
//         x = x + y + b_out + b_down                                               # S9     [C]
//     logits = embed_out @ layer_norm(x, lnf_w, lnf_b)                             # S10    [V]
//     token = argmax(logits + noise)                                               # S10    []
//
//     symbol   meaning                                                       in pythia-2.8b
//     C        width of x, the hidden size                                   2560
//     NH, HS   attention heads of a layer; dimensions of a head              32, 80
//     MLP      hidden units of a layer                                       10240
//     V        tokens in the vocabulary                                      50304
//     L        layers                                                        32
//     T        tokens in the cache before this step. The step reads token    128 in all examples
//              number T, counted from 0, so T is also its position
//
// A *layer* is what papers call a transformer block. In this file a *block* is CUDA's: a group of threads
// (chapter 2). The text explains pythia-2.8b on an H200. Chapter 14 says what is different in the other nine
// sizes.
//
// The budget. Each weight is used once for each token, so a layer takes at least the time in which memory
// delivers its bytes:
//     (4*C*C + 2*C*MLP) weights of 2 bytes         157.3 MB / 4.62 TB/s =   34.0 us a layer
//     keys and values of T tokens: 4*C*T bytes      1.31 MB / 4.62 TB/s =    0.3 us a layer
//     L layers, 2*V*C bytes of the LM head, biases 5.335 GB / 4.62 TB/s = 1154   us a token: the floor
// The 4.62 TB/s are measured: no kernel of several that only read was faster on this H200. The kernel below
// takes 1230 us for a token, 7 % above the floor. Arithmetic is not the limit: even without GELU and without
// the sums across threads, a token takes the same time within 0.3 %. One goal explains nearly everything in
// this file: memory must never sit idle.
//
// How to read. Chapters 1 to 3 are the algorithm. Chapters 4 to 9 each solve one problem that the layer loop
// of chapter 3 leaves open. Chapter 10 divides the work among the blocks, and chapter 11 follows one layer,
// and one number, through time. Stop there: the appendix, from chapter 12 on, is for looking things up.
//
// A *sync* is a point where a thread waits until other threads have done something. Syncs between blocks are
// (0) to (6). Syncs inside a block have letters. Chapter 13 lists all of them. Each stage has a card above
// it: its *math*; *who* computes what; the *bytes* that a block moves; its *syncs*.
//
// Times are microseconds (us) for one token of 2.8b, unless a sentence says otherwise. GPUs and versions of
// the kernel differ, so compare times only within a sentence. Many per cents, and the times in chapters 8 and
// 18, are of changes to older versions (docs/what-did-not-help.md).
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// 1. Two loops ============================================================================================
// All matrices of a layer can be stored as rows of C numbers. Rows of w_qkv and w_up have this length anyway.
// w_out and w_down are stored transposed: one row for each element of o, and one for each hidden unit. Then a
// layer needs only two inner loops besides attention. In plain C++, where half is a number in fp16:
//
//     float dot(const half* row, const float* x) {           // a row and x make one number
//       float sum = 0;
//       for (int c = 0; c < C; c++) sum += row[c] * x[c];
//       return sum;
//     }
//     void axpy(float factor, const half* row, float* y) {   // a number times a row is added to y
//       for (int c = 0; c < C; c++) y[c] += factor * row[c];
//     }
//     void hidden_unit(int j) {                              // unit j of the MLP: uses two rows
//       const float h = gelu(dot(w_up + j * C, xn2) + b_up[j]);
//       axpy(h, w_down + j * C, y);
//     }
//
// A hidden unit needs only x, and its only result is an addition to y. So the MLP is 10240 jobs that can run
// anywhere, in any order. A head also needs only x and ends in additions to y, but it is a chain of steps:
//
//         .-> LN1 -> S2 dot rows of q, k, v -> S3 rotate -> S5 attend -> S6 merge -> S7 axpy output rows -.
//         |                                       '-> S4 append k, v to the cache                         |
//     x --+                                                                                               y
//         |                                                                                               |
//         '-> LN2 -> S8 hidden unit j: dot up row j, gelu, axpy down row j -------------------------------'
//                                                                                  S9: x = x + y + biases
//
// The next x needs every part of y. So once in a layer all blocks wait for one another: sync (4). At least
// once in a token they also wait at (5), to choose the next token together.

// 2. Who owns what ========================================================================================
// An H200 has 132 processors (NVIDIA calls them multiprocessors). Each has 227 KiB of fast *shared memory*
// for its own threads. All processors read and write one large *global memory*. It holds the weights, the
// cache of keys and values, and x. CUDA groups threads like this:
//
//     thread    has its own variables, in registers
//     warp      32 threads that run mostly in step
//     block     352 threads in this kernel, 11 warps. Each processor holds one block, because a block uses
//               nearly all of the shared memory. All 132 blocks run at once, so they can wait for one another
//     cluster   2 neighbouring blocks, which can also write into each other's shared memory. The number of a
//               block in its cluster is its *rank*, 0 or 1
//     grid      all threads of a launch: 66 clusters, 132 blocks
//
// In each block, 320 threads are *workers*, which compute. One more thread is the *producer*. It only starts
// copies from global into shared memory, ahead of the workers (chapter 5). The other 31 threads of its warp
// end at once.
//
//     what                                    is divided among        how much each gets
//     columns of every row, of x and of y     the workers of a block  8 columns, the same in all layers
//     heads of a layer                        clusters                clusters 0..31 one each, 32..65 none
//       rows of the head's q, k, v            ranks of its cluster    120 of 240
//       cached tokens of the head             ranks                   64 of 128
//       output rows of the head               ranks                   40 of 80
//     hidden units of a layer                 blocks                  34 or 35 for blocks with a head, else
//                                                                     117 or 118: equal bytes, chapter 10
//     adding up the y of a cluster's blocks   ranks                   1280 of 2560 columns
//     rows of the LM head                     blocks                  381 or 382 of 50304
//
//     a row      |  columns 0..7  |  columns 8..15  |  columns 16..23  |  ...  |  columns 2552..2559  |
//                |    thread 0    |    thread 1     |     thread 2     |  ...  |      thread 319      |
//     dot        each thread multiplies its 8 columns of the row by its 8 of x; then 320 sums are added up
//     axpy       each thread adds its 8 columns of the row, times the factor, to its 8 of y; no thread needs
//                anything from another thread
//
// Eight columns of fp16 are 16 bytes, the widest load from shared memory. For the whole layer, each thread
// keeps its 8 columns of xn1, xn2 and y in registers.
//
// Why does a head need two blocks? A layer has 4*C + 2*MLP = 30720 rows, so a fair share is 233 rows for each
// of the 132 blocks. A head has 4*HS = 320 rows: q, k, v and output. A block with a whole head would be late,
// and all others would wait for it at (4): a token takes 1546 us instead of 1225. In a cluster of 2, each
// block has 160 rows of the head, and hidden units fill the rest of its share. Larger clusters gain nothing
// more: 1232 us with 4 blocks, 1223 with 8.

// 3. The layer loop =======================================================================================
// The loop below is what one worker does. A few sizes come first, with their values for 2.8b in brackets. The
// names in capitals that this file does not define, such as HIDDEN, are set by build.py. `__device__` marks a
// function that runs on the GPU. threadIdx.x is the number of a thread in its block, blockIdx.x the number of
// a block, and gridDim.x the number of blocks. In 2.8b, PIECES and TEAMS are 1: ignore both until chapter 14.

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int C = HIDDEN, NH = HEADS, HS = HEAD_SIZE, ROT = ROTARY, V = VOCAB, L = LAYERS, CTX = CONTEXT;
constexpr int RANKS = CLUSTER;                  // blocks in a cluster, its ranks [2]
constexpr int PIECES = C < 4096 ? 1 : 2;        // pieces of 8 columns that a worker owns [1]
constexpr int COLS = 8 * PIECES;                // columns that a worker owns [8]
constexpr int TEAM = C / COLS;                  // workers that hold one row together: a team [320]
constexpr int TEAMS = ceil_div(THREADS, TEAM);  // teams in a block, for THREADS workers or more [1]
constexpr int WORKERS = TEAM * TEAMS;           // threads of a block that compute [320]

// Nearly all that follows is one struct, because in a struct a function may be used above the place where it
// stands. So the text can go from the loop to its details. What is in the struct is not indented.
struct Worker {
typedef float Columns[COLS];                // one worker's columns of x, y, xn1 or xn2, in registers
struct Model; struct Layer; struct Shared;  // global memory, a layer's weights, shared memory: chapter 12
struct Plan;                                // what a block does for one token: chapter 10

// Runs layers first_layer .. end_layer - 1 of `token` at `position`, chooses the next token, and goes on with
// it until `position` is `end`. In short: for each token { for each layer {...} choose }. Both are one loop
// here, because the choice begins like a layer: the pass with layer == L chooses the next token.
//
// x is in global memory, in two buffers. A layer reads x_now, and all clusters add to x_next. Then the two
// swap roles. No buffer is cleared between layers: x_next still holds an older x, which one of the additions
// subtracts (chapter 8). `swaps` counts the swaps of all launches, and its last bit says which buffer is
// x_now. `plan` says what this block does for the token. mark() is a stopwatch and tap() a probe for tests:
// both compile to nothing.
__device__ void run(int first_layer, int end_layer, int new_tokens,
                    int token, int position, int end, unsigned swaps) {
  Columns x, xn1, xn2;  // this thread's columns, in registers
  long long *x_now = buffer(swaps), *x_next = buffer(swaps + 1);

  for (int layer = first_layer; position < end;) {
    // S0. In layer 0, x is the token's row of embed_in. In later layers, wait at (4) until every cluster of
    // the grid has added to x. Then read x.
    read_x(layer, token, x_now, swaps, x);
    if (layer == end_layer && new_tokens == 0) break;  // a launch that makes no token ends here

    // S1. Normalize x, once for both LayerNorms. Apply the gain and bias of LayerNorm 1, for the heads. In
    // the pass that chooses a token, `norms` holds those of the final LayerNorm.
    normalize(x);
    affine(x, norms.w1, norms.b1, xn1);

    // S10. After the last layer, compute the logits and choose the next token: (5). This pass adds nothing to
    // x_next, so the buffers do not swap.
    if (layer == L) {
      token = next_token(xn1, position, end);
      position++, layer = 0;
      continue;
    }

    // S9, first part. Each column of x has a *carrier*, one thread of the grid. The carrier adds x and the
    // output biases to x_next. It need not wait for y.
    carry(layer, token, x_next, swaps);

    // S1. Apply the gain and bias of LayerNorm 2, for the hidden units.
    affine(x, norms.w2, norms.b2, xn2);

    // Clear y. It sums up what this block adds to this thread's columns of x.
    for (int i = 0; i < COLS; i++) y[i] = 0;
    tap_norms(xn1, xn2); mark(MARK_NORM, layer);

    int done = 0;  // hidden units of this layer that are done; hidden_units() advances it
    for (int head = plan.cluster; head < NH; head += plan.clusters) {  // this cluster's heads: one or none
      // S2. Compute this rank's rows of q, k, v. Send them to all ranks of the cluster.
      qkv_rows(xn1, head); mark(MARK_QKV, layer);

      // S8. Do some hidden units while q, k and v are on their way. Then wait for q, k and v: (1).
      hidden_units(xn2, done, min(done + plan.filler, plan.units.size));
      wait_for_qkv(); mark(MARK_1, layer);

      // S3, S4. Rotate q and k by the position. Append k and v to the cache.
      rotate_and_append(layer, head, position);

      // S5. Attend to this rank's share of the tokens. Send the result to the other ranks.
      attend(); mark(MARK_ATTEND, layer);

      // S8. Do some more hidden units while the results are on their way. Then wait for all results: (2).
      hidden_units(xn2, done, min(done + plan.filler, plan.units.size));
      wait_for_attention(); mark(MARK_2, layer);

      // S6. Merge the results of all ranks into o. S7. For each of this rank's dimensions d of the head, add
      // o[d] times output row d to y.
      out_rows(head); mark(MARK_OUT, layer);
    }

    // S8. Do the hidden units that are left.
    hidden_units(xn2, done, plan.units.size); mark(MARK_UNITS, layer);

    // S9, second part. Send each column of y to the rank that owns it. Wait for the other ranks' y: (3). Add
    // up the columns that this rank owns, and add the sums to x_next.
    cluster_reduce(); mark(MARK_3, layer);
    add_to_residual(x_next);

    // Start to load the gains and biases of the next layer, which do not depend on x.
    norms = load_norms(layer + 1); mark(MARK_ADDED, layer);

    // Swap the buffers. own_now and own_next are what a carrier has read from the two buffers (chapter 8).
    long long* const x_last = x_now;
    x_now = x_next, x_next = x_last, own_next = own_now, swaps++, layer++;
  }
  finish(x_next, token, position, swaps);
}

const Model& m;     // what is in global memory: the weights, the cache, x. Chapter 12 lists it
Shared& s;          // what is in the block's shared memory: chapter 12, too
const Plan& plan;   // the block's plan
const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;  // of this worker; lanes: chapter 4

// To add a stage, change the loop above and the same stage in emulator.py. If the stage reads rows, the
// producer has to copy them at the same point in its order (chapter 5). If some blocks do more of it than
// others, make_plan has to count its bytes (chapter 10). New shared memory needs a larger FIXED_BYTES. New
// weights go into Layer (chapter 12) and into Block in model.py, in the same order.

// 4. dot tile and axpy tile ===============================================================================
// The problem. Each of the 320 threads has a part of a dot product, and the parts have to be added up. The
// number of a thread in its warp is its *lane*, and a lane can read a register of another lane by a
// *shuffle*. In five shuffles, each lane adds what the lane at distance 1, 2, 4, 8 and 16 has, and then has
// the sum of all 32. After that, the 10 warps exchange their sums through shared memory, which takes a sync.
// This is a *reduction*, and one of them takes longer than memory needs to deliver a row.
//
// The answer. 8 rows share one reduction: they are a *tile*. Each worker multiplies its columns of all 8 rows
// before the sums are reduced together. With tiles of 2 rows a token takes 2018 us, with 4 rows 1232, with 8
// rows 1228. With 16 rows it takes 68 % longer than with 8, because only two such tiles fit into shared
// memory.
//
// A tile arrives in two halves, in two *slots* of shared memory. The next chapter explains how. Here, the
// next tile is already there.
static constexpr int WARPS = WORKERS / 32;             // warps of workers [10]
static constexpr int LANES = TEAM < 32 ? TEAM : 32;    // threads of a warp that belong to one team [32]
static constexpr int TEAM_WARPS = TEAM / LANES;        // warps of a team [10]

static constexpr int TILE_ROWS = ROWS * TEAMS;         // rows of a tile, ROWS for each team [8]
static constexpr int HALF_TILES = 2;                   // slots that a tile takes
static constexpr int HALF_TILE_ROWS = TILE_ROWS / HALF_TILES;      // [4]
static constexpr int SLOT_BYTES = HALF_TILE_ROWS * C * 2;          // [20480]
// A copy of biases is rounded out to multiples of 8 (copy_rows, chapter 5), so it may need 8 more places.
static constexpr int TILE_BIASES = ceil_div(TILE_ROWS, 8) * 8 + 8;  // room for a tile's biases [16]

// CUDA's types: half is a number in fp16, half2 is two of them, and uint4 is 16 bytes, 8 numbers in fp16.
static __device__ const uint4& as16(const half* p) { return *reinterpret_cast<const uint4*>(p); }
static __device__ float2 widen2(const half* p) { return __half22float2(*reinterpret_cast<const half2*>(p)); }
// 8 numbers from fp16 to fp32. Weights, k and v are fp16, but all products and sums are fp32.
static __device__ void widen(const uint4& w, float* f) {
  const half* halfs = reinterpret_cast<const half*>(&w);
  for (int i = 0; i < 4; i++) {
    const float2 pair = widen2(halfs + 2 * i);
    f[2 * i] = pair.x; f[2 * i + 1] = pair.y;
  }
}

// The two loops of chapter 1, on 8 columns. fmaf(a, b, c) is a * b + c, rounded once.
static __device__ float dot8(const uint4& w, const float* x, float sum) {
  float f[8]; widen(w, f);
  for (int i = 0; i < 8; i++) sum = fmaf(f[i], x[i], sum);
  return sum;
}
static __device__ void axpy8(float a, const uint4& w, float* y) {
  float f[8]; widen(w, f);
  for (int i = 0; i < 8; i++) y[i] = fmaf(a, f[i], y[i]);
}

// Adds up 8 sums over the 32 lanes of a warp: lane l ends with the sum of row l % 8. This takes 9 shuffles
// and not 8 * 5, because two lanes swap half of their sums in each step. In the step at distance 1, two rows
// a and b are left, with the sums a0 and b0 in lane 0, a1 and b1 in lane 1:
//     lane 0 gives b0, gets a1, and keeps a0 + a1
//     lane 1 gives a0, gets b1, and keeps b0 + b1
// The steps at distance 4, 2 and 1 halve the number of sums: 8, 4, 2, 1. The steps at distance 8 and 16 add
// what other lanes have of the same row.
//
// __shfl_xor_sync(~0u, v, n) returns the v of the lane at distance n. ~0u says that all 32 lanes take part.
// `#pragma unroll` unrolls the loop, so that v[] can stay in registers.
static __device__ float reduce_rows(float (&v)[ROWS], int lane) {
  for (int apart = ROWS / 2; apart >= 1; apart /= 2) {
    const bool upper = lane & apart;  // the lane with the higher number keeps the upper half of the rows
#pragma unroll
    for (int i = 0; i < apart; i++)
      v[i] = (upper ? v[i + apart] : v[i]) + __shfl_xor_sync(~0u, upper ? v[i] : v[i + apart], apart);
  }
  for (int apart = ROWS; apart < LANES; apart *= 2) v[0] += __shfl_xor_sync(~0u, v[0], apart);
  return v[0];
}

// Waits until all workers of the block, or of a team, are here. CUDA's __syncthreads would also wait for the
// producer, which must not stop.
static __device__ void workers_sync() { named_barrier(1, WORKERS); }
static __device__ void team_sync(int team) { named_barrier(TEAMS == 1 ? 1 : 2 + team, TEAM); }

const int team = TEAMS == 1 ? 0 : tid / TEAM, team_thread = TEAMS == 1 ? tid : tid % TEAM;  // [0, tid]
const int team_warp = team_thread / 32;                                                    // [warp]

// Element i of a worker's Columns is column(i) of x. In 2.8b this is column 8 * tid + i.
__device__ int column(int i) const { return (i / 8 * TEAM + team_thread) * 8 + i % 8; }

// This worker's 8 columns of one row of the current slot (of piece p: chapter 14).
__device__ uint4 weights(int slot_row, int p) const {
  return as16(&s.slots[ring.slot][slot_row * C + column(8 * p)]);
}

const int my_row = lane % ROWS * TEAMS + team;  // the row of a tile whose result this lane gets [lane % 8]
int flip = 0;                                   // which of two arrays, warp_dots[0] or [1], is next

// DOT TILE
//   math    dot(row r, in) + bias[r], for the n rows of the tile; n < 8 only in the last tile
//   who     every worker multiplies its 8 columns; then lane l of every warp gets the result of row l % 8
//   bytes   n * C * 2 from shared memory, 41 KB for 8 rows
//   syncs   (F) the rows are here, (E) the rows were read: chapter 5; (c) once
// A half tile is 4 rows. The producer can fill the first slot again while workers read the second. In the
// biases of a tile, `skip` more come first, which the workers do not use (copy_rows, chapter 5).
//
// At (c) every warp waits until all 10 warps have written their sums to warp_dots. No second sync is needed,
// because tiles use two arrays in turn, warp_dots[0] and warp_dots[1]. Before a warp writes array 0 again, it
// passes the (c) of the tile in between, where every warp arrives only after it has read array 0.
//
// If a row is missing, the loop multiplies old bytes in its place, and the result is not used. Without a test
// for each row, the GPU can start the loads of all 4 rows before it multiplies.
__device__ float dot_tile(const Columns& in, int n, int skip, bool has_bias) {
  float dots[ROWS] = {}, bias = 0;
  for (int half_tile = 0; half_tile < HALF_TILES; half_tile++) {
    if (half_tile * HALF_TILE_ROWS >= n) break;

    // Wait until the half tile is here. Then multiply this thread's columns of its rows.
    wait_full();  // (F)
    for (int i = 0; i < ROWS / HALF_TILES; i++) {
      const int r = half_tile * ROWS / HALF_TILES + i;
      for (int p = 0; p < PIECES; p++) dots[r] = dot8(weights(i * TEAMS + team, p), in + 8 * p, dots[r]);
    }
    if (half_tile == 0 && has_bias && my_row < n)
      bias = __half2float(s.bias[ring.slot][skip + my_row]);
    free_slot();  // (E)
  }

  // Add up over the lanes of the warp, then over the warps.
  float sum = reduce_rows(dots, lane);
  if (TEAM_WARPS > 1) {
    float(&of_warps)[ROWS][TEAM_WARPS] = s.warp_dots[flip][team];
    if (lane < ROWS) of_warps[lane][team_warp] = sum;
    team_sync(team);  // (c)
    sum = 0;
    for (int from = 0; from < TEAM_WARPS; from++) sum += of_warps[lane % ROWS][from];
    flip ^= 1;
  }
  return sum + bias;
}

Columns y;  // what the block adds to this worker's columns of x

// AXPY TILE
//   math    y += factor[r] * row r, for the n rows of the tile
//   who     every worker, for its own columns of y
//   bytes   n * C * 2 from shared memory, 41 KB for 8 rows
//   syncs   (F) (E) for each half tile
// In lane l, `a` is the factor of row l % 8, as dot_tile returns it. __shfl_sync(~0u, a, r) returns lane r's
// factor. A missing row gets the factor 0. Its old bytes may be NaN, and 0 * NaN is NaN, so the thread reads
// row 0 of the half tile in its place.
__device__ void axpy_tile(float a, int n) {
  if (my_row >= n) a = 0;
#pragma unroll
  for (int half_tile = 0; half_tile < HALF_TILES; half_tile++) {
    if (half_tile * HALF_TILE_ROWS >= n) break;
    wait_full();  // (F)
    for (int i = 0; i < ROWS / HALF_TILES; i++) {
      const int r = half_tile * ROWS / HALF_TILES + i, slot_row = i * TEAMS + team;
      const float of_row = __shfl_sync(~0u, a, r, LANES);
      const int safe_row = half_tile * HALF_TILE_ROWS + slot_row < n ? slot_row : 0;
      for (int p = 0; p < PIECES; p++) axpy8(of_row, weights(safe_row, p), y + 8 * p);
    }
    free_slot();  // (E)
  }
}

// 5. The ring =============================================================================================
// The problem. Memory answers a request only after some time. If that is 1 us, then requests for 1 us of its
// bytes must be under way at every moment: 35.0 KB for each processor, its share of 4.62 TB/s. If workers
// loaded rows into registers, these bytes would take 28 registers of each worker. And no loads would start
// while workers wait at (4).
//
// The answer. The producer starts *bulk copies*: one instruction copies up to 20 KB from global into shared
// memory, and hardware does the rest. The copies go into a *ring* of 10 slots of 20 KB, which the workers
// empty in the same order. Weights do not depend on x, so the producer runs ahead as long as a slot is empty.
// While workers wait at (4), it copies rows of the next layer, and while they wait at (5), rows for the next
// token. The full ring holds 5.9 us of reading, so shorter waits of the workers do not stop the memory. With
// 7 slots instead of 10, a token takes 2.7 % longer.
//
// Each slot has two syncs: (F), the slot is full, and (E), the slot is empty. Both are *mbarriers*, variables
// in shared memory on which threads can wait:
//   1. An mbarrier goes through phases 0, 1, 2, ... A phase ends when a number of arrivals has come, which
//      barrier_init sets, and all bytes that were announced have landed. barrier_arrive is an arrival.
//      barrier_expect is an arrival that also announces the bytes of a copy.
//   2. The *parity* of a phase is its number modulo 2. phase_running(b, parity) is true while the current
//      phase has this parity. So a thread waits until it is false, and flips the parity for its next wait.
//   3. A thread that has seen a phase end can read all that was written before the phase's arrivals, and all
//      bytes that were announced.
// In most places wait() waits for a phase. It is this loop with a limit, after which the launch ends with an
// error (chapter 17).
//
// full[slot] needs 1 arrival, the producer's, and the bytes of its copies. empty[slot] needs 10 arrivals, one
// from each warp of workers. Two trips around the ring, for one slot:
//     who        waits for                   then                                      which ends
//     producer   (nothing)                   announces and copies rows A               phase 0 of full
//     workers    full, parity 0 (phase 0)    read rows A; each warp arrives at empty   phase 0 of empty
//     producer   empty, parity 0 (phase 0)   announces and copies rows B               phase 1 of full
//     workers    full, parity 1 (phase 1)    read rows B; each warp arrives at empty   phase 1 of empty
//
// Why is one bit enough? A thread that waits for the end of phase 0 must look before phase 1 ends, or it
// would take phase 2 for phase 0 and wait for ever. It does: phase 1 of full ends only when rows B have
// landed. The producer copies rows B only after phase 0 of empty. That phase needs an arrival of every warp,
// and a warp arrives only after it has seen phase 0 of full end. The same holds for empty.
struct Ring {  // the slot of the ring that a thread uses next
  int slot = 0;
  uint32_t parity = 0;  // 0 in the first trip around the ring, 1 in the second, 0 again
  __device__ void advance() {
    if (++slot == SLOTS) { slot = 0; parity ^= 1; }
  }
};

Ring ring;  // where this worker reads

__device__ void wait_full() const {
  while (phase_running(&s.full[ring.slot], ring.parity)) {}  // (F)
}

__device__ void free_slot() {
  __syncwarp();  // (E) waits until all lanes of the warp have read
  if (lane == 0) barrier_arrive(&s.empty[ring.slot]);     // (E)
  ring.advance();
}

// RULE. A slot has no label. The producer has to copy exactly the tiles that the workers use, in the same
// order, so copy_layers() below has the same loops as Worker::run. With a wrong order, workers multiply wrong
// rows, and the tests, which compare every stage with float64, turn red. With a wrong number of tiles, the
// launch ends with an error about (F) or (E) after some seconds.
static constexpr int KV_TOKENS = SLOT_BYTES / (4 * HS);  // cached tokens in a slot: half k, half v [64]

struct Producer {  // one thread of each block
  const Model& m;
  Shared& s;
  const uint64_t policy = read_once_policy();
  Ring ring;
  uint32_t token_parity = 0;             // parity of (h)
  unsigned long long earliest_ns = 0;    // no copy may start before this time

  // Waits until the next slot is empty and until it is time for the copy (keep_pace, chapter 16). Then
  // announces the copy's bytes. In the first trip nothing waits at (E): it waits for a phase of parity 1, and
  // the current phase is phase 0.
  __device__ void claim(uint32_t bytes) {
    wait(m, s, &s.empty[ring.slot], ring.parity ^ 1, SYNC_EMPTY);  // (E)
    keep_pace(earliest_ns, bytes);
    barrier_expect(&s.full[ring.slot], bytes);  // (F)
  }
  __device__ void copy(void* to, const void* from, uint32_t bytes) {
    bulk_copy(to, from, bytes, &s.full[ring.slot], policy);
  }

  // Copies rows first .. end - 1 of a matrix, 4 rows a slot, and their biases, if there are any. The biases
  // of a tile come with its first slot. Copies start at multiples of 16 bytes, which are 8 biases. So a copy
  // of biases begins up to 7 biases early, and the workers `skip` these.
  __device__ void copy_rows(const half* matrix, const half* bias, int first, int end) {
    for (int row = first; row < end; row += TILE_ROWS) {
      const int n = min(TILE_ROWS, end - row), skip = row % 8;
      for (int i = 0; i < n; i += HALF_TILE_ROWS) {
        const int bytes = min(HALF_TILE_ROWS, n - i) * C * 2;
        const int bias_bytes = bias && i == 0 ? ceil_div(skip + n, 8) * 16 : 0;
        claim(bytes + bias_bytes);
        copy(s.slots[ring.slot], matrix + (size_t)(row + i) * C, bytes);
        if (bias_bytes) copy(s.bias[ring.slot], bias + row - skip, bias_bytes);
        ring.advance();
      }
    }
  }

  // Copies hidden units: a tile of up rows, then the down rows of the same units, and so on.
  __device__ void copy_units(const Layer& w, const Plan& plan, int& done, int end) {
    for (; done < end; done += TILE_ROWS) {
      const int unit = plan.units.at(done), n = min(TILE_ROWS, end - done);
      copy_rows(w.w_up, w.b_up, unit, unit + n);
      copy_rows(w.w_down, nullptr, unit, unit + n);
    }
  }

  // Copies keys and values of cached tokens, 64 tokens a slot. This step's own k and v are not in the cache
  // yet. S5 takes them from shared memory.
  __device__ void copy_tokens(const half* k, const half* v, int first, int end) {
    for (int t = first; t < end; t += KV_TOKENS) {
      const int bytes = min(KV_TOKENS, end - t) * HS * 2;
      claim(2 * bytes);
      copy(s.slots[ring.slot], k + (size_t)t * HS, bytes);
      copy(s.slots[ring.slot] + KV_TOKENS * HS, v + (size_t)t * HS, bytes);
      ring.advance();
    }
  }

  // Copies what the layers of one token need. The producer may be a token ahead of the workers, so it has a
  // plan of its own.
  __device__ void copy_layers(const Plan& plan, int first_layer, int end_layer, bool is_first_token) {
    for (int layer = first_layer; layer < end_layer; layer++) {
      const Layer& w = m.layers[layer];
      int done = 0;
      for (int head = plan.cluster; head < NH; head += plan.clusters) {
        const int qkv = head * 3 * HS + plan.rank * QKV_ROWS, out = head * HS + plan.rank * OUT_ROWS;
        copy_rows(w.w_qkv, w.b_qkv, qkv, qkv + QKV_ROWS);                      // S2
        copy_units(w, plan, done, min(done + plan.filler, plan.units.size));  // S8

        // Only copies of keys and values depend on earlier tokens. Before the first of them, wait until the
        // workers have finished the previous token: (h). Blocks without a head copy no keys and need not
        // wait.
        if (!is_first_token && layer == 0 && head == plan.cluster) {
          wait(m, s, &s.token_ready, token_parity, SYNC_TOKEN);           // (h)
          token_parity ^= 1;
          order_copies();
        }
        copy_tokens(cache_row(m, layer, 0, head, 0), cache_row(m, layer, 1, head, 0),
                      plan.first_token, plan.end_token);                 // S5
        copy_units(w, plan, done, min(done + plan.filler, plan.units.size));  // S8
        copy_rows(w.w_out, nullptr, out, out + OUT_ROWS);                      // S7
      }
      copy_units(w, plan, done, plan.units.size);                       // S8
    }
  }

  __device__ void run(int first_layer, int end_layer, int first, int end, bool with_lm_head) {
    for (int position = first; position < end; position++) {
      const Plan plan = make_plan(blockIdx.x, gridDim.x, position);
      copy_layers(plan, first_layer, end_layer, position == first);
      if (with_lm_head)
        for (int i = 0; i < s.lm_rows.size; i += TILE_ROWS) {
          const int row = s.lm_rows.at(i);
          copy_rows(m.embed_out, nullptr, row, row + min(TILE_ROWS, s.lm_rows.size - i));
        }
    }
    wait(m, s, &s.workers_done, 0, SYNC_FULL);  // stays until all workers are done: chapter 17
  }
};

// 6. LayerNorm and hidden units: the MLP is complete ======================================================

// A worker's columns of the gains and biases of two LayerNorms.
struct Norms { uint4 w1[PIECES], b1[PIECES], w2[PIECES], b2[PIECES]; };
Norms norms;

// Starts to load this thread's columns of a layer's gains and biases. Layer L stands for the final LayerNorm.
// The compiler would delay a plain load until its first use, after the next sync; load16 (chapter 18) loads
// at once.
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

// S1 LAYERNORM
//   math    x <- (x - mean) / sqrt(variance + eps); then xn1 = x * w1 + b1 and xn2 = x * w2 + b2
//   who     every block, for itself. If one block did it for all, the others would have to wait for it
//   bytes   8 * C, 20 KB
//   syncs   (b) makes every warp wait for warp_stats of all warps. There is always another sync of the block
//           before they are written again
// The mean of squares minus the square of the mean would subtract two large numbers where the mean is large.
// So each thread takes the mean of its 8 values, and `squares`, the sum of squared distances from this mean.
// Then groups are merged exactly (Chan, Golub, LeVeque 1979). Two lanes a and b with n values each:
//     mean    = (mean_a + mean_b) / 2
//     squares = squares_a + squares_b + (mean_a - mean_b)^2 * n / 2
// The 10 warps, with n values each, are merged at once: mean is the mean of the 10 means, and each warp adds
// squares_w + n * (mean_w - mean)^2.
static constexpr float LN_EPS = 1e-5f;

__device__ void normalize(Columns& x) const {
  float mean = 0, squares = 0, n = COLS;
  for (int i = 0; i < COLS; i++) mean += x[i];
  mean /= n;
  for (int i = 0; i < COLS; i++) squares += (x[i] - mean) * (x[i] - mean);

  // Merge with the lane at distance 1, then 2, 4, 8 and 16.
  for (int apart = 1; apart < LANES; apart *= 2) {
    const float other = __shfl_xor_sync(~0u, mean, apart);
    squares += __shfl_xor_sync(~0u, squares, apart) + (other - mean) * (other - mean) * (0.5f * n);
    mean = 0.5f * (mean + other);
    n *= 2;
  }

  // Merge the warps.
  if (TEAM_WARPS > 1) {
    float(&of_warps)[TEAM_WARPS][2] = s.warp_stats[team];
    if (lane == 0) of_warps[team_warp][0] = mean, of_warps[team_warp][1] = squares;
    team_sync(team);  // (b)
    mean = squares = 0;
    for (int from = 0; from < TEAM_WARPS; from++) mean += of_warps[from][0];
    mean /= TEAM_WARPS;
    for (int from = 0; from < TEAM_WARPS; from++)
      squares += of_warps[from][1] + n * (of_warps[from][0] - mean) * (of_warps[from][0] - mean);
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

// S8 HIDDEN UNITS
//   math    h_j = gelu(dot(up row j, xn2) + b_j), y += h_j * down row j
//   who     each block, for its own units. No other block needs h_j
//   bytes   4 * C for a unit, 10 KB
//   syncs   (F) (E) for each half tile; (c) for each tile
// gelu(a) = a / 2 * (1 + erf(a / sqrt 2)). Pythia was trained with this exact form; many models use tanh
// instead, which differs by up to 5e-4.
__device__ void hidden_units(const Columns& xn2, int& done, int end) {
  for (; done < end; done += TILE_ROWS) {
    const int unit = plan.units.at(done), n = min(TILE_ROWS, end - done);
    const float a = dot_tile(xn2, n, unit % 8, true);
    const float hidden = 0.5f * a * (1 + erff(a * 0.70710678f));
    if (my_row < n) tap(TAP_H + unit + my_row, hidden);
    axpy_tile(hidden, n);
  }
}

// 7. A head on a cluster ==================================================================================
// The problem. The two blocks of a cluster share a head. Each computes 120 of the 240 rows of q, k and v, but
// both need all of q for attention. Each attends to half of the tokens, but o needs both halves. At the end
// each has a y, and x needs the sum. So the cluster exchanges data three times in a layer.
//
// The answer. Another block of the same cluster is a *peer*. A *push* is a store into a peer's shared memory.
// The sender goes on at once. When the data lands, the hardware counts its bytes on an mbarrier of the peer,
// and the peer waits on that. (A load from a peer would be a round trip. A plain store would need a barrier
// of both blocks.) The array that a push goes to is an *inbox*. A rank pushes to its own inboxes, too, so
// that all parts are handled alike.
//
//     sync  inbox            what each rank pushes                   to which rank
//     (1)   qkv              its 120 rows of q, k, v                 all ranks: a ClusterGather
//     (2)   peer_o           o of its 64 tokens, in parts            owner of the dimension: a ClusterReduce
//           peer_peak_denom  two numbers that are needed to merge o  all ranks
//     (3)   sums             its y, in parts                         owner of the column: a ClusterReduce
//
// In a ClusterGather every rank gets all parts. In a ClusterReduce each rank gets all parts of what it owns,
// and adds them up (ClusterFusion, arXiv 2508.18850).
//
// An inbox has no signal that it is free. Before a peer pushes into an inbox again, it waits for a later
// message from the inbox's owner, and the owner sends that message only after it has read the inbox. Chapter
// 13 has an example with times.
//
// peer(p, r) is the address of p in the shared memory of rank r. push stores one float there, push4 four.

static constexpr int QKV_ROWS = 3 * HS / RANKS;  // rows of a head's q, k, v that one rank computes [120]
static constexpr int OUT_ROWS = HS / RANKS;      // output rows, and dimensions of o, that one rank has [40]
static constexpr int OWN = C / RANKS;            // columns of the cluster's y that one rank adds up [1280]

// CLUSTERGATHER of the 8 results of a dot tile. Every warp has them all, so warp 0 alone pushes: its lanes 0
// to 7 push to rank 0, lanes 8 to 15 to rank 1.
__device__ void cluster_gather(float* place, float value, bool valid, uint64_t* ready) const {
  if (!valid || team_warp > 0) return;
  for (int r = lane % LANES / ROWS; r < RANKS; r += LANES / ROWS)
    push(peer(place, r), value, peer(ready, r));  // (1)
}

// S2 QKV
//   math    q, k, v of a head = its 3*HS rows times xn1, plus biases
//   who     rank r computes QKV_ROWS rows, from row r * QKV_ROWS on
//   bytes   3 * HS * C * 2 / RANKS, 614 KB
//   syncs   (F) (E) for each half tile; (c) for each tile; (1) later, after some hidden units
__device__ void qkv_rows(const Columns& xn1, int head) {
  // Expect q, k and v from all ranks: 960 bytes. Some may land before this call. The phase cannot end before
  // it, because it also needs this arrival.
  if (tid == 0) barrier_expect(&s.qkv_ready, sizeof(s.qkv));  // (1)

  // Compute 8 rows at a time, and push each to all ranks.
  const int first = plan.rank * QKV_ROWS;
  for (int i = 0; i < QKV_ROWS; i += TILE_ROWS) {
    const int n = min(TILE_ROWS, QKV_ROWS - i);
    const float value = dot_tile(xn1, n, (head * 3 * HS + first + i) % 8, true);
    cluster_gather(&s.qkv[first + i + my_row], value, my_row < n, &s.qkv_ready);
  }
}

uint32_t head_parity = 0;  // of (1) and (2): flips after each head
uint32_t sums_parity = 0;  // of (3): flips after each layer

__device__ void wait_for_qkv() const {
  wait(m, s, &s.qkv_ready, head_parity, SYNC_QKV);  // (1)
}

// S3 ROPE, S4 APPEND
//   math    (a, b) <- (a cos - b sin, b cos + a sin) for dimensions i and i + ROT/2 of q and k, i < ROT/2
//   who     one thread for each of the 3*HS values, in every rank; the last rank writes k and v to the cache
//   bytes   4 * HS to the cache
//   syncs   (d) makes all warps wait until q is rotated and k and v are stored. After (d), nothing reads qkv
// Every rank rotates for itself, because results from another rank would need one more sync. S5 uses k and v
// rounded to fp16, as they are in the cache, so this step sees the same k and v as all later steps.
__device__ void rotate_and_append(int layer, int head, int position) const {
  for (int i = tid; i < 3 * HS; i += WORKERS) {
    const int which = i / HS, d = i % HS;  // q, k or v; the dimension
    const float* v = s.qkv + which * HS;
    float value = v[d];

    // Rotate the first ROT dimensions of q and k.
    if (which < 2 && d < ROT) {
      const int angle = d % (ROT / 2);
      const float other = d < ROT / 2 ? -v[(d + ROT / 2) % ROT] : v[(d + ROT / 2) % ROT];
      value = fmaf(value, s.rope_cos[angle], other * s.rope_sin[angle]);
    }

    // Keep q in fp32, scaled for the softmax. Keep k and v in fp16, and append them to the cache.
    if (which == 0) {
      s.q[d] = value * (rsqrtf((float)HS) * 1.44269504f);  // log2(e), see S5
      tap(TAP_Q + head * HS + d, value);
    } else {
      (which == 1 ? s.k_now : s.v_now)[d] = __float2half_rn(value);
      if (plan.rank == RANKS - 1)
        cache_row(m, layer, which - 1, head, position)[d] = __float2half_rn(value);
      tap((which == 1 ? TAP_K : TAP_V) + head * HS + d, value);
    }
  }
  workers_sync();  // (d)
}

// S5 ATTEND. The softmax takes tokens a few at a time ("online softmax") and works with powers of 2:
//   1. A set of tokens with scores score_t has three results: peak = max score_t, denom = the sum of
//      2^(score_t - peak), and o = the sum of 2^(score_t - peak) * v_t. The attention of the set is o /
//      denom.
//   2. To merge two sets, take the larger peak. Multiply each set's denom and o by 2^(its peak - larger
//      peak), which shrinks them to this peak. Then add both denoms and both o. Sets of lanes are merged in
//      attend(), of warps in push_attention(), of ranks in S6.
//   3. The GPU computes 2^x in one instruction, but not e^x. So S3 has multiplied q by log2(e).
//
//   math    score_t = dot(q, k_t); then peak, denom and o of this rank's tokens
//   who     rank r: cached tokens first_token .. end_token - 1. The token of this step goes to the last rank,
//           which never has more cached tokens than the others. In a warp, 16 lanes share a token: 10 of them
//           have 8 of the 80 dimensions each, and 6 have none
//   bytes   4 * HS * T / RANKS, 20 KB; with T = 2048, 328 KB, which takes 9.4 us
//   syncs   (F) (E) for each slot; (e) makes push_attention wait for the results of all warps; (2) later
static constexpr int TOKEN_LANES = HS <= 32 ? 4 : HS <= 64 ? 8 : HS <= 128 ? 16 : 32;  // lanes a token [16]
static constexpr int WARP_TOKENS = 32 / TOKEN_LANES;  // tokens that a warp takes at once [2]

__device__ void attend() {
  // Expect results from all ranks.
  if (tid == 0) barrier_expect(&s.attention_ready, sizeof(s.peer_o) + sizeof(s.peer_peak_denom));  // (2)

  // This lane has dimensions d .. d + 7. In a slot it takes token 2 * warp + which, then every 20th token.
  const int d = lane % TOKEN_LANES * 8, which = lane / TOKEN_LANES;
  const bool has_d = d < HS;
  float q[8], o[8] = {}, peak = -1e30f, denom = 0;  // results of the empty set
  for (int i = 0; i < 8; i++) q[i] = has_d ? s.q[d + i] : 0.f;

  // The last warp of the last rank starts with the token of this step.
  if (plan.rank == RANKS - 1 && warp == WARPS - 1) {
    float score = has_d ? dot8(as16(s.k_now + d), q, 0) : 0.f;
    for (int apart = 1; apart < TOKEN_LANES; apart *= 2) score += __shfl_xor_sync(~0u, score, apart);
    if (which == 0) {
      peak = score; denom = 1;
      if (has_d) widen(as16(s.v_now + d), o);
    }
  }

  // For each slot of keys and values:
  constexpr int STRIDE = WARPS * WARP_TOKENS, BATCH = ceil_div(KV_TOKENS, STRIDE);  // a lane's tokens [4]
  for (int t0 = plan.first_token; t0 < plan.end_token; t0 += KV_TOKENS) {
    const int n = min(KV_TOKENS, plan.end_token - t0);
    wait_full();  // (F)
    const half *k = s.slots[ring.slot] + d, *v = k + KV_TOKENS * HS;
    const int base = warp * WARP_TOKENS + which;

    // Compute the scores of up to 4 tokens, and the largest of them, in two loops: the first has only loads
    // and products, the second the shuffles. In one loop, each load would wait for the shuffles of the token
    // before. At T = 2000 this would cost 2.1 %.
    float score[BATCH], higher = peak;
    for (int u = 0; u < BATCH; u++) {
      const int t = base + u * STRIDE;
      score[u] = t < n && has_d ? dot8(as16(k + t * HS), q, 0) : 0.f;
    }
    for (int u = 0; u < BATCH; u++) {
      for (int apart = 1; apart < TOKEN_LANES; apart *= 2)
        score[u] += __shfl_xor_sync(~0u, score[u], apart);
      if (base + u * STRIDE < n) higher = fmaxf(higher, score[u]);
    }

    // Merge: shrink the results so far to the new peak, and add these tokens.
    const float shrink = exp2f(peak - higher);
    peak = higher; denom *= shrink;
    for (int i = 0; i < 8; i++) o[i] *= shrink;
    for (int u = 0; u < BATCH; u++) {
      const int t = base + u * STRIDE;
      if (t < n) {  // later rows hold old bytes, perhaps NaN
        const float p = exp2f(score[u] - peak);
        denom += p;
        if (has_d) axpy8(p, as16(v + t * HS), o);
      }
    }
    free_slot();  // (E)
  }

  // Merge lanes that hold the same dimensions, but of different tokens.
  for (int apart = TOKEN_LANES; apart < 32; apart *= 2) {
    const float higher = fmaxf(peak, __shfl_xor_sync(~0u, peak, apart)), shrink = exp2f(peak - higher);
    peak = higher;
    denom *= shrink; denom += __shfl_xor_sync(~0u, denom, apart);
    for (int i = 0; i < 8; i++) { o[i] *= shrink; o[i] += __shfl_xor_sync(~0u, o[i], apart); }
  }

  // Leave the warp's results in shared memory. Then merge the warps, a thread for each dimension.
  if (which == 0 && has_d)
    for (int i = 0; i < 8; i++) s.warp_o[warp][d + i] = o[i];
  if (lane == 0) s.warp_peak[warp] = peak, s.warp_denom[warp] = denom;
  workers_sync();  // (e)
  if (tid < HS) push_attention();
}

// CLUSTERREDUCE of o, first half. Thread d merges o[d] of the 10 warps, and pushes it to the rank that owns
// dimension d. The block's peak and denom go to all ranks.
__device__ void push_attention() const {
  float peak = s.warp_peak[0], denom = 0, o = 0;
  for (int from = 1; from < WARPS; from++) peak = fmaxf(peak, s.warp_peak[from]);
  for (int from = 0; from < WARPS; from++) {
    const float shrink = exp2f(s.warp_peak[from] - peak);
    denom = fmaf(shrink, s.warp_denom[from], denom);
    o = fmaf(shrink, s.warp_o[from][tid], o);
  }
  const int owner = tid / OUT_ROWS;
  push(peer(&s.peer_o[plan.rank][tid % OUT_ROWS], owner), o, peer(&s.attention_ready, owner));  // (2)
  if (tid < RANKS) {
    push(peer(&s.peer_peak_denom[plan.rank][0], tid), peak, peer(&s.attention_ready, tid));   // (2)
    push(peer(&s.peer_peak_denom[plan.rank][1], tid), denom, peer(&s.attention_ready, tid));  // (2)
  }
}

__device__ void wait_for_attention() {
  wait(m, s, &s.attention_ready, head_parity, SYNC_ATTENTION);  // (2)
  head_parity ^= 1;
}

// S6 MERGE, S7 OUT ROWS. The second half of the CLUSTERREDUCE of o, and output rows
//   math    o = sum_r 2^(peak_r - peak) o_r / sum_r 2^(peak_r - peak) denom_r; then y += o[d] * output row d
//   who     rank r: OUT_ROWS dimensions, from r * OUT_ROWS on. Every warp merges all of them: in each tile,
//           lane l merges the dimension of row l % 8
//   bytes   HS * C * 2 / RANKS, 205 KB
//   syncs   (F) (E) for each half tile
__device__ void out_rows(int head) {
  // How much each rank's results shrink, and the common denominator.
  float peak = s.peer_peak_denom[0][0], shrink[RANKS], denom = 0;
  for (int r = 1; r < RANKS; r++) peak = fmaxf(peak, s.peer_peak_denom[r][0]);
  for (int r = 0; r < RANKS; r++) {
    shrink[r] = exp2f(s.peer_peak_denom[r][0] - peak);
    denom = fmaf(shrink[r], s.peer_peak_denom[r][1], denom);
  }

  // For each tile, merge o for this lane's row. Then add all rows of the tile, each times its o, to y.
  for (int i = 0; i < OUT_ROWS; i += TILE_ROWS) {
    const int n = min(TILE_ROWS, OUT_ROWS - i);
    float o = 0;
    if (my_row < n) {
      for (int r = 0; r < RANKS; r++) o = fmaf(shrink[r], s.peer_o[r][i + my_row], o);
      o /= denom;
      tap(TAP_O + head * HS + plan.rank * OUT_ROWS + i + my_row, o);
    }
    axpy_tile(o, n);
  }
}

// S9 SUM, first half: CLUSTERREDUCE of y
//   math    sums[r][c] = y of rank r, for the columns c that this rank owns
//   who     every thread pushes its 8 columns to the rank that owns them
//   bytes   4 * C, 10 KB to the shared memories of the cluster
//   syncs   (3)
// Why does the cluster add up first? Additions to the same number of x wait for each other, so fewer are
// better. Without this step a token takes 2.9 % longer.
__device__ void cluster_reduce() {
  if (tid == 0) barrier_expect(&s.sums_ready, sizeof(s.sums));  // (3)
  for (int p = 0; p < PIECES; p++) {
    const int c = column(8 * p), owner = c / OWN;
    const uint32_t place = peer(&s.sums[plan.rank * TEAMS + team][c % OWN], owner),
                   ready = peer(&s.sums_ready, owner);
    for (int i = 0; i < 8; i += 4) push4(place + 4 * i, y + 8 * p + i, ready);  // (3)
  }
  wait(m, s, &s.sums_ready, sums_parity, SYNC_SUMS);  // (3)
  sums_parity ^= 1;
}

// 8. x between layers =====================================================================================
// The problem. 66 clusters add their sums to x, and then all 132 blocks read x. The usual way is to clear a
// buffer, add floating-point numbers to it, and count finished blocks in a separate counter. This costs three
// things:
//   - The last bits of a floating-point sum depend on the order of additions, which changes from run to run.
//   - A block may increment the counter only after its additions have arrived, for which it waits about 1 us.
//   - The buffer has to be cleared, and all blocks have to wait for that.
//
// The answer to all three is a 64-bit *word* for each column of x, which holds a value and a count:
//
//     bits 63 .. 9    the value, an integer in units of 2^-22. Sums of integers do not depend on the order
//     bits 8 .. 0     the count of additions to this word
//
// All processors reach global memory through one cache, L2, and L2 can add: a thread sends it an address and
// a number, and goes on. The addition is *atomic*: it changes value and count in one step. When the count
// shows that every cluster has added, the word is *complete*. A reader that finds a smaller count reads
// again. No block waits for its own additions. With a separate counter, a token takes 1233 us instead of
// 1203.
//
// Three kinds of access are used between blocks:
//   relaxed   the access is atomic, in L2. It says nothing about other data
//   release   an addition that also publishes. It arrives only after all that its thread has written before,
//             and all that other threads of the block wrote before the last sync of the block
//   acquire   a load. If it finds the result of a release, its thread then sees all that the release
//             published
// At (4) relaxed is enough, because the data is its own flag. At (5) the flag is a counter, separate from the
// data, so (5) needs a release and an acquire.

// A number that is 65536 or more in magnitude, or not finite, makes the word NaN (chapter 15). Then the
// logits are NaN, the token is -1, and the host ends the text with an error. Does this happen with real
// checkpoints? In a checkpoint that works in PyTorch's fp16, which overflows at 65504, x stays below 65536.
// How close real checkpoints come was not measured.
static constexpr float FIXED_ONE = 1 << 22, FIXED_LIMIT = 1 << 16;
static constexpr long long FIXED_NAN = 1ll << 47, FIXED_EDGE = 1ll << 46;
static constexpr int COUNT_BITS = 9, LAP = 256, MOST_CLUSTERS = 254;  // chapter 15 explains 254

static __device__ long long to_word(float v) {  // what to add to a word, so that its value grows by v
  return (fabsf(v) < FIXED_LIMIT ? __float2ll_rn(v * FIXED_ONE) : FIXED_NAN) * (1 << COUNT_BITS) + 1;
}
static __device__ float from_word(long long word) {
  const long long value = word >> COUNT_BITS;
  const bool fits = value > -FIXED_EDGE && value < FIXED_EDGE;
  return fits ? __ll2float_rn(value) * (1 / FIXED_ONE) : __int_as_float(0x7fffffff);  // else NaN
}
// Returns 0 if both words have the wanted count. Otherwise the result is not 0, and if the same number of
// additions is missing in both, it is that number.
static __device__ unsigned lacking(const longlong2& words, unsigned wanted) {
  return ((wanted - (unsigned)words.x) | (wanted - (unsigned)words.y)) % (1 << COUNT_BITS);
}

// Within a launch, no buffer is cleared. There are two, which alternate:
//
//                    buffer 0                             buffer 1
//     layer l        holds x, which blocks read           holds an older x; blocks add to it
//     layer l + 1    holds an older x; blocks add to it   holds x, which blocks read
//
// The carrier of a column adds x - old, where old is the value that the buffer still holds. The old value
// cancels, in whatever order the additions arrive. For example, the buffer holds 5, x is 8, and two clusters
// add 1 and 2: 5 + (8 - 5) + 1 + 2 = 11.
//
// The count needs the same care, or the old word would look complete. In this example a word gets 3 additions
// each time, so its count goes from 0 to 3 one time, and from 256 (LAP) to 259 the next. The carrier, besides
// its own 1, adds the new start minus the old count, here 256 - 3:
//                           value   count
//     old word              5       3
//     a cluster adds 1      6       4       before the carrier, the count is 3, 4 or 5
//     the carrier adds      9       258     value + 8 - 5; count + 1 for this addition, + 256, - 3
//     a cluster adds 2      11      259     complete
//
// Can a fast block add to a buffer that a slow block still reads? No:
//   1. In layer l, the slow block reads buffer 0. Then it adds to buffer 1.
//   2. Buffer 1 is complete only after all blocks have added to it, including the slow block. This is (4).
//   3. In layer l + 1, the fast block passes this (4), and only then adds to buffer 0.

// The start of the count in the buffer that holds x after `swaps` swaps. A buffer is used in every second
// layer.
static __device__ int first_count(unsigned swaps) { return swaps / 2 % 2 * LAP; }

__device__ long long* buffer(unsigned swaps) const { return m.residual + swaps % 2 * C; }

// S9 SUM, the carrier's part
//   math    x_next += x + output biases - old
//   who     a thread for each pair of columns, in the last blocks of the grid, 128 to 131, which have no head
//   bytes   8 * C for the whole grid, 20 KB to L2
//   syncs   none
// own_now holds this thread's two words of x_now, as read in this layer. own_next holds those of x_next, as
// read one layer ago, when that buffer was x_now. Subtracting this whole old word cancels its value and its
// count. Differences are unsigned, because signed overflow is undefined in C++.
__device__ void carry(int layer, int token, long long* x_next, unsigned swaps) const {
  const int c = 2 * carried;
  if (c >= C) return;
  const Layer& w = m.layers[layer];
  const int count = first_count(swaps + 1);
  const float2 out = widen2(w.b_out + c), down = widen2(w.b_down + c),
               x = layer == 0 ? widen2(embedding(token) + c)
                              : make_float2(from_word(own_now.x), from_word(own_now.y));
  add_relaxed(x_next + c, to_word(x.x + out.x + down.x) + count - (unsigned long long)own_next.x);
  add_relaxed(x_next + c + 1, to_word(x.y + out.y + down.y) + count - (unsigned long long)own_next.y);
}

// The pair of columns that a thread carries, counted from the grid's last block on.
static __device__ int carried_pair() { return (gridDim.x - 1 - blockIdx.x) * WORKERS + threadIdx.x; }
const int carried = carried_pair();
longlong2 own_now, own_next;  // if it is a carrier

// Sets own_now and own_next for a launch's first layer. thread_main (chapter 10) has loaded the words of
// x_now. Those of x_next are 0, because the last launch cleared that buffer. They must not be loaded, because
// a faster block may already have added to them.
__device__ void begin(int first_layer, const longlong2& carried_words) {
  own_now = carried_words;
  own_next = {0, 0};  // cleared by the last launch
  norms = load_norms(first_layer);
}

// Clears x_next for the next launch, and writes State. This is safe: this block has passed the last (4), so
// every block has finished its last layer, and reads neither this buffer nor State again.
__device__ void finish(long long* x_next, int token, int position, unsigned swaps) const {
  if (lane == 0) barrier_arrive(&s.workers_done);
  if (2 * carried < C) x_next[2 * carried] = x_next[2 * carried + 1] = 0;
  if (blockIdx.x == 0 && tid == 0) {
    State& state = *m.state;
    state.token = token, state.position = position, state.swaps = swaps, state.vote_number = s.vote_number;
  }
}

// S9 SUM, second half
//   math    x_next += sum_r sums[r], in the order of ranks
//   who     rank r adds the OWN columns from r * OWN on; thread i takes every 320th of them, from the i-th on
//   bytes   8 * C for a cluster, 20 KB to L2
//   syncs   none; cluster_reduce has passed (3)
__device__ void add_to_residual(long long* x_next) const {
  for (int c = tid; c < OWN; c += WORKERS) {
    float sum = 0;
#pragma unroll 8
    for (int from = 0; from < RANKS * TEAMS; from++) sum += s.sums[from][c];
    add_relaxed(x_next + plan.rank * OWN + c, to_word(sum));
  }
}

// S0 READ X
//   math    x = the values of all words, once they are complete; in layer 0, a row of embed_in
//   who     each thread reads 4 pairs of columns and puts them into shared memory. Then it takes its own 8
//   bytes   8 * C, 20 KB from L2
//   syncs   (4) thread 0 polls one pair until it is complete, and (g) makes the block wait for thread 0. Then
//           each thread reads its 4 pairs until they are complete. (a) waits until all are in shared memory
// Why through shared memory? Because then neighbouring threads read neighbouring pairs: one load of a warp
// reads 512 contiguous bytes.
static constexpr int PAIRS = ceil_div(C / 2, WORKERS);  // [4]

__device__ void read_x(int layer, int token, const long long* x_now, unsigned swaps, Columns& x) {
  if (tid == 0) s.layer = layer;
  if (layer == 0) read_embedding(token, x);
  else {
    const unsigned wanted = plan.clusters + 1 + first_count(swaps);  // 66 clusters and the carrier
    wait_for_x(x_now, wanted);
    mark(MARK_START, layer);
    read_residual(x_now, wanted, x);
  }
}

// To *poll* is to read again and again. If all threads polled, they would slow down the additions that they
// wait for: a token would take 5 % longer. So thread 0 polls alone, and only the last pair of its rank's
// columns, which clusters add last.
__device__ void wait_for_x(const long long* x_now, unsigned wanted) const {
  if (tid == 0) {
    const long long start = clock64();
    for (unsigned lack; (lack = lacking(load_relaxed(x_now + (plan.rank + 1) * OWN - 2), wanted));)  // (4)
      if (clock64() - start > PATIENCE) give_up(m.failure, SYNC_X, s.layer, lack);
  }
  workers_sync();  // (g)
}

// Most other pairs are complete by now, too. Every thread still checks the 4 pairs that it reads.
__device__ void read_residual(const long long* x_now, unsigned wanted, Columns& x) {
  longlong2 words[PAIRS];
  for (unsigned lack = 1; lack;) {
    lack = 0;
    for (int i = 0; i < PAIRS; i++)  // issues all loads first, so that they overlap
      if (tid + i * WORKERS < C / 2) words[i] = load_relaxed(x_now + 2 * (tid + i * WORKERS));
    for (int i = 0; i < PAIRS; i++)
      if (tid + i * WORKERS < C / 2) lack |= lacking(words[i], wanted);  // (4)
  }

  // Keep the words that this thread carries. Put all values into shared memory. Take this thread's columns.
  for (int i = 0; i < PAIRS; i++) {
    const int pair = tid + i * WORKERS;
    if (pair == carried) own_now = words[i];
    if (pair < C / 2)
      *reinterpret_cast<float2*>(&s.x[2 * pair]) = make_float2(from_word(words[i].x), from_word(words[i].y));
  }
  workers_sync();  // (a)
  for (int i = 0; i < COLS; i++) x[i] = s.x[column(i)];
}

// A token of -1, for logits that were not finite, goes on as row 0. The host ends the text at the -1.
__device__ const half* embedding(int token) const {
  return m.embed_in + (size_t)min(max(token, 0), V - 1) * C;
}
__device__ void read_embedding(int token, Columns& x) const {
  for (int p = 0; p < PIECES; p++) widen(load16(embedding(token) + column(8 * p)), x + 8 * p);
}

// 9. The LM head, and the next token ======================================================================
// The problem. A block multiplies 381 or 382 of the 50304 rows of the LM head by x, and each row gives the
// *logit* of one token of the vocabulary. From them, all blocks have to choose the same next token. At
// temperature 0 this is the token with the largest logit. At other temperatures it is drawn at random, with
// the probabilities p = softmax(logits / temperature). *top-k* restricts the draw to the top_k likeliest
// tokens, and *top-p* to the fewest likeliest tokens that together have the probability top_p. Taken
// literally, this needs a sum over all logits, a sort, and sums along the sorted order, but the logits are
// spread over 132 blocks.
//
// A draw is an argmax. Give each token i an alarm clock, which rings after the time
//     delay_i * exp(-logit_i / temperature)
// where delay_i is a random number, exponentially distributed with mean 1, and independent of the others.
// Then clock i is the first to ring with exactly the probability p_i. So the draw is the clock with the
// smallest time, or the largest -log(time). Times the temperature, this is
//     noisy_i = logit_i - temperature * log(delay_i)
// So a draw is the argmax of these *noisy logits* (the Gumbel-max trick). At temperature 0 the noise is 0.
//
// delay_i comes from Philox, a function that scrambles (seed, position, token) into random bits and keeps no
// state (chapter 15). So the text depends neither on the size of the grid nor on the number of tokens that a
// launch makes, and Sampler in model.py computes the same noise.
//
// top-k and top-p need no sort. Call one token *likelier* than another if its logit is larger, or if the
// logits are equal and its id is smaller. Then each token can be tested by itself:
//     top-k keeps a token if fewer than top_k tokens are likelier
//     top-p keeps a token if the likelier tokens together have less than the probability top_p
// So the grid chooses in rounds. A round has two steps:
//     (5)  vote     find the token with the largest noisy logit: the *candidate*
//     (6)  tally    count the tokens that are likelier than the candidate, and add up their probability
// A candidate that is kept is the next token. Otherwise the next round is among the tokens that are likelier
// than the candidate.
//
// For example, tokens A to E have the probabilities 40, 25, 20, 10 and 5 %, and top_p is 0.7. Top-p keeps A,
// B and C: before C there are 65 %, before D 85 %. Say that the noisy logits have the order D, B, A, E, C.
// The first candidate is D. The tally finds 85 % and refuses it. The second round is among A, B and C, and
// its candidate is B. The tally finds 40 %, so B is the next token. This is right, because the kept tokens
// are the likeliest ones: a refused candidate takes only tokens out of the vote that are not kept either, and
// of the kept ones the largest noisy logit wins. With top_p = 0.95, the first candidate is kept with a
// probability of 0.95 or more.

// A token's logit and its id make one *packed* number of 64 bits, larger for a likelier token, so that a
// maximum of packed numbers is an argmax. The upper 32 bits are those of the logit, changed so that they
// compare like an unsigned integer: all are flipped for a negative number, only the sign for a positive one.
// NaN is above all, as in torch. The lower 32 bits are the id, flipped, because the smaller id is likelier.
// token_of and logit_of unpack. Noisy logits are packed, too.
static __device__ unsigned long long pack(float logit, int token) {
  const uint32_t bits = __float_as_uint(logit + 0.f);  // -0 becomes 0, its equal
  const uint32_t high = logit != logit ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
  return (unsigned long long)high << 32 | ~(uint32_t)token;
}
static __device__ int token_of(unsigned long long packed) { return (int)~(uint32_t)packed; }
static __device__ float logit_of(unsigned long long packed) {
  const uint32_t high = packed >> 32;
  return __int_as_float(high >> 31 ? high & ~(1u << 31) : ~high);
}

// The largest v, and the sum of v, of the 32 lanes of a warp. The GPU has both as one instruction for 32
// bits, so 64 bits take two. In warp_sum, v has to be below 2^47.
static __device__ unsigned long long warp_max(unsigned long long v) {
  const uint32_t high = __reduce_max_sync(~0u, (uint32_t)(v >> 32));
  return (unsigned long long)high << 32 | __reduce_max_sync(~0u, v >> 32 == high ? (uint32_t)v : 0);
}
static __device__ unsigned long long warp_sum(unsigned long long v) {
  const uint32_t low = __reduce_add_sync(~0u, (uint32_t)v % (1 << 20));
  return ((unsigned long long)__reduce_add_sync(~0u, (uint32_t)(v >> 20)) << 20) + low;
}

// Which logits does a thread keep, to vote and to tally? Every warp has all 8 results of a dot tile, but one
// thread is enough to keep a result. So the 320 threads form 40 GROUPS of 8 lanes, and group g keeps the
// results of the block's tiles g, g + 40, and in a smaller grid g + 80. kept_token(k) is the id of the token
// whose logit this thread keeps in logits[k], or V for none.
static constexpr int GROUPS = TEAM / ROWS;
static constexpr int KEPT = ceil_div(V, MIN_BLOCKS * WORKERS);  // MIN_BLOCKS: the smallest grid [3]
float logits[KEPT], noise[KEPT];

__device__ int kept_token(int k) const {
  const int i = (k * GROUPS + team_thread / ROWS) * TILE_ROWS;
  return i + my_row < s.lm_rows.size ? s.lm_rows.at(i) + my_row : V;
}

// S10 LM HEAD
//   math    logits = rows . LNf(x); noise = -temperature * log(delay)
//   who     each block, for the rows in s.lm_rows; one thread keeps the logit of a row
//   bytes   2 * V * C / 132, 1.95 MB, 55 us
//   syncs   (F) (E) for each half tile; (c) for each tile. read_x has passed (4)
// The noise is made half way through the loop, where the ring is nearly empty, because workers are faster
// than memory here. While they make noise, the ring fills, and no copy has to stop.
__device__ void lm_head(const Columns& in, int position) {
  const int size = s.lm_rows.size;
  for (int k = 0; k < KEPT; k++) noise[k] = 0;
  for (int i = 0; i < size; i += TILE_ROWS) {
    const float logit = dot_tile(in, min(TILE_ROWS, size - i), 0, false);
#pragma unroll
    for (int k = 0; k < KEPT; k++)
      if (i == (k * GROUPS + team_thread / ROWS) * TILE_ROWS) logits[k] = logit;
    if (i == size / 2 / TILE_ROWS * TILE_ROWS && s.settings.temperature > 0)
#pragma unroll
      for (int k = 0; k < KEPT; k++)
        if (kept_token(k) < V)
          noise[k] = -s.settings.temperature * log_delay(s.settings.seed, position, kept_token(k));
  }
#pragma unroll
  for (int k = 0; k < KEPT; k++)
    if (kept_token(k) < V) m.logits[kept_token(k)] = logits[k];
}

// (5) VOTE
//   math    s.grid_pair = {largest packed logit, largest packed noisy logit}, over the tokens whose packed
//           logit is above `bound`. With top-k or top-p, also s.candidate_logit, the candidate's logit
//   who     maxima are taken in each thread, in each warp, in the block by thread 0, and in the grid by L2
//   syncs   (f) thread 0 waits for all warps; (5); (g) all threads wait for thread 0
// A word of x counts additions, but a maximum cannot, so a separate counter counts the blocks. Thread 0 gives
// the block's maxima to the grid, then adds 1 to the counter with a release. A thread that finds this 1 by an
// acquire also sees the maxima, and what the block wrote before (f): its logits, and k and v of this step.
// Vote n is complete when the counter has reached n * blocks. The sign of the difference tells this, even
// after an overflow.
//
// The maxima have to be 0 before a vote. Three pairs of them take turns. Before block 0 arrives at a vote, it
// clears the pair for the next vote. No block still reads that pair: its last use was two votes ago, and
// every block has read it before arriving at the last vote.
__device__ void vote(unsigned long long bound) {
  if (blockIdx.x == 0 && tid == 0) m.state->maxima[(s.vote_number + 1) % 3] = {0, 0};

  // Take the maxima of this thread, of its warp, and of its block.
  unsigned long long best = 0, drawn = 0;
#pragma unroll
  for (int k = 0; k < KEPT; k++) {
    const int token = kept_token(k);
    const unsigned long long packed = token < V ? pack(logits[k], token) : 0;
    if (packed <= bound) continue;
    best = max(best, packed);
    drawn = max(drawn, pack(logits[k] + noise[k], token));
  }
  best = warp_max(best), drawn = warp_max(drawn);
  if (lane == 0) s.warp_pair[warp] = {best, drawn};
  workers_sync();  // (f)
  if (tid == 0) {
    for (int from = 1; from < WARPS; from++)
      best = max(best, s.warp_pair[from].x), drawn = max(drawn, s.warp_pair[from].y);

    // Give the block's maxima to the grid, and wait until all blocks have done so.
    State& state = *m.state;
    Maxima& maxima = state.maxima[s.vote_number % 3];
    atomicMax(&maxima.best, best), atomicMax(&maxima.drawn, drawn);
    const unsigned target = ++s.vote_number * gridDim.x;
    arrive_release(&state.voted);  // (5)
    const long long start = clock64();
    for (unsigned seen; (int)((seen = load_acquire(&state.voted)) - target) < 0;)  // (5)
      if (clock64() - start > PATIENCE) give_up(m.failure, SYNC_VOTE, s.layer, target - seen);

    // Give the grid's maxima to the block.
    const longlong2 pair = load_relaxed((const long long*)&maxima);
    s.grid_pair = {(unsigned long long)pair.x, (unsigned long long)pair.y};
    const bool cut = s.settings.top_k < V || s.settings.top_p < 1;
    if (cut) s.candidate_logit = load_relaxed(m.logits + token_of(pair.y));
  }
  workers_sync();  // (g)
}

// (6) TALLY
//   math    returns {probability, number} of the tokens whose packed logit is above `bound`. Without
//           `with_count`, the second result is the probability of all tokens instead
//   who     as for (5)
//   syncs   (f), (6), (g)
// A probability is an integer here, in units of 2^-30 times the probability of the likeliest token, so that
// sums do not depend on the order of blocks. The two sums are kept in words with a count, as in chapter 8, so
// no release is needed. They are never cleared: thread 0 subtracts what they held before, tally_old. Two
// pairs of words take turns, so that no block adds to a pair that another block still reads.
__device__ ulonglong2 tally(float largest, unsigned long long bound, bool with_count) {
  unsigned long long above = 0, other = 0;
#pragma unroll
  for (int k = 0; k < KEPT; k++) {
    const int token = kept_token(k);
    if (token == V) continue;
    const unsigned long long p =
        __float2ull_rz(expf((logits[k] - largest) / s.settings.temperature) * (1 << 30));
    const bool is_above = pack(logits[k], token) > bound;
    above += is_above ? p : 0;
    other += with_count ? is_above : p;
  }
  above = warp_sum(above), other = warp_sum(other);
  if (lane == 0) s.warp_pair[warp] = {above, other};
  workers_sync();  // (f)
  if (tid == 0) {
    for (int from = 1; from < WARPS; from++) above += s.warp_pair[from].x, other += s.warp_pair[from].y;

    // Add to both words, and wait until each has had an addition from every block.
    const int turn = s.tally_number++ % 2;
    long long* const words = &m.state->tally_words[turn].x;
    add_relaxed(words, above << COUNT_BITS | 1), add_relaxed(words + 1, other << COUNT_BITS | 1);
    longlong2& old = s.tally_old[turn];
    longlong2 now;
    const unsigned wanted = (unsigned)old.x + gridDim.x;  // both words have the same count
    const long long start = clock64();
    for (unsigned lack; (lack = lacking(now = load_relaxed(words), wanted));)  // (6)
      if (clock64() - start > PATIENCE) give_up(m.failure, SYNC_TALLY, s.layer, lack);
    s.grid_pair = {(unsigned long long)(now.x - old.x) >> COUNT_BITS,
                   (unsigned long long)(now.y - old.y) >> COUNT_BITS};
    old = now;
  }
  workers_sync();  // (g)
  return s.grid_pair;
}

// If top-k and top-p are both set, top_p is a share of the probability of the top_k likeliest tokens. This
// finds that probability by bisection: there are more than top_k tokens above the packed logit `low`, fewer
// above `high`, and each tally moves one of the two to the middle.
__device__ unsigned long long top_k_probability(float largest, unsigned long long high) {
  unsigned long long low = 0;
  while (true) {
    const unsigned long long middle = low + (high - low) / 2;
    const ulonglong2 above = tally(largest, middle, true);
    if (above.y == s.settings.top_k) return above.x;
    (above.y > s.settings.top_k ? low : high) = middle;
  }
}

// The next token: of all that top-k and top-p keep, the one with the largest noisy logit; -1 if the largest
// logit is not finite. `bound` is the packed logit of the last refused candidate, 0 in the first round.
__device__ int choose() {
  const bool cut_k = s.settings.top_k < V, cut_p = s.settings.top_p < 1;
  unsigned long long bound = 0, of_top_k = 0;
  float largest = 0;
  while (true) {
    // Vote for a candidate. The first vote also finds the largest of all logits.
    vote(bound);
    const int candidate = token_of(s.grid_pair.y);
    if (bound == 0) {
      largest = logit_of(s.grid_pair.x);
      if (!(fabsf(largest) <= 3.4028235e38f)) return -1;
      if (s.settings.temperature == 0 || !(cut_k || cut_p)) return candidate;
      if (cut_k && cut_p) of_top_k = top_k_probability(largest, s.grid_pair.x);
    }

    // Tally the tokens that are likelier than the candidate, and test it.
    bound = pack(s.candidate_logit, candidate);
    const ulonglong2 likelier = tally(largest, bound, cut_k);
    const bool keeps_k = !cut_k || likelier.y < s.settings.top_k;
    const bool keeps_p = !cut_p || likelier.x < s.settings.top_p * (cut_k ? of_top_k : likelier.y);
    if (keeps_k && keeps_p) return candidate;
  }
}

// Computes the logits, chooses the token, and prepares what the next token needs.
__device__ int next_token(const Columns& xn, int position, int end) {
  // Prepare plan and angles of the next token. No thread uses the old ones after (a) in read_x.
  if (position + 1 < end) prepare(position + 1);

  // Compute the logits. Start to load the next LayerNorms. Choose the token.
  lm_head(xn, position + 1);
  norms = load_norms(0);
  const int token = choose();                                             // (5), (6)

  // After (5), the cache holds k and v of this position. Let the producer copy cached tokens again.
  if (tid == 0) barrier_arrive(&s.token_ready);                           // (h)
  if (blockIdx.x == 0 && tid == 0) m.history[position] = token;
  return token;
}

// 10. The division of work, and the kernel ================================================================
// The problem. All blocks wait for the slowest one at (4), so all blocks should read the same number of
// bytes. Say that a head costs each block of its cluster as many bytes as `head` hidden units, of 4 * C bytes
// each. Of the 132 blocks, B have a head, and take u units. The others take r units:
//     head + u = r                                all blocks read the same number of bytes
//     B * u + (132 - B) * r = MLP                 all units are dealt out
// In 2.8b, `head` is 83 and B is 64. The solution is u = 34.8 and r = 117.8.
//
// Which units does a block get? Memory is faster when all blocks read near one another. So tiles of units are
// dealt out like cards, one tile to each block in turn, as long as there is a tile for every block. The units
// that remain are split into one short run for each block. So each of the 68 blocks without a head gets 14
// tiles of 8 units and a run of 5 or 6 units. Rows of the LM head are dealt out in the same way. This makes a
// token 0.6 % faster, and a token of pythia-1.4b 2 %.
//
// Two costs are not bytes, but make_plan counts them as bytes:
//   - Softmax makes a cached token slower to use than to read, so its bytes count 1.5 times (KV_WEIGHT / 2).
//   - In small models, the short steps of a head take time in which a block reads little. They count as
//     ATTENTION_BYTES: 24 KiB in pythia-160m, 0 in 2.8b, where the ring fills during these steps.
struct Portion {  // the rows of one matrix that one block gets
  int size, tiled, first_tiled, blocks, first_rest;
  __device__ int at(int i) const {  // the block's i-th row, where i is the first row of a tile
    return i < tiled ? first_tiled + i * blocks : first_rest + i - tiled;
  }
};

struct Plan {  // what one block does for one token
  int rank, cluster, clusters;
  Portion units;               // its hidden units, in every layer
  int filler;                  // how many of them before it waits at (1), and again before (2)
  int first_token, end_token;  // its cached tokens, for every head: first_token .. end_token - 1
};

static constexpr int KV_WEIGHT = 3;
static_assert(64ll * (8ll * HS * C + 2ll * KV_WEIGHT * HS * CTX + ATTENTION_BYTES) < 1ll << 31,
              "make_plan counts in 32 bits");

// Deals n rows, from `first` on, to `blocks` blocks, and returns what block `index` gets. For example, 132
// blocks get the 50304 rows of the LM head. Each gets 376 rows as 47 tiles: block 3 the tiles at rows 24, 24
// + 8 * 132, and so on. These are 49632 rows. The other 672 rows are dealt as runs of 5 or 6, in the order of
// the blocks. `begin` and `end` would be a block's rows if it got one run of all its rows. So the runs of the
// blocks before it have begin - tiled * index rows.
static __device__ Portion deal(int first, int n, int index, int blocks) {
  const int begin = n * index / blocks, end = n * (index + 1) / blocks;  // a run, if no tiles were dealt out
  const int tiled = n / blocks / TILE_ROWS * TILE_ROWS;
  return {end - begin, tiled, first + index * TILE_ROWS, blocks, first + begin + tiled * (blocks - index)};
}

static __device__ __noinline__ Plan make_plan(int block, int blocks, int position) {
  Plan p;
  p.rank = block % RANKS; p.cluster = block / RANKS; p.clusters = blocks / RANKS;
  const int heads = NH / p.clusters, busy = NH % p.clusters * RANKS;  // the first `busy` blocks have one more

  // Solve the equations: r = (MLP + B * head) / blocks, and u = r - head. Numbers are in *grains* of C / 64
  // bytes, 256 to a hidden unit, so that integers of 32 bits are enough. fair_grains is r, busy_grains is u.
  const int head_bytes = (8 * HS * C + 2 * KV_WEIGHT * HS * position) / RANKS + ATTENTION_BYTES;
  const int head_grains = 64 * head_bytes / C, fair_grains = (256 * MLP + head_grains * NH * RANKS) / blocks;
  const int busy_grains = max(fair_grains - (heads + 1) * head_grains, 0);  // u, in grains
  const int busy_units = busy_grains * busy / 256;
  const bool is_busy = block < busy;
  p.units = is_busy ? deal(0, busy_units, block, busy)
                    : deal(busy_units, MLP - busy_units, block - busy, blocks - busy);

  // Do `filler` units during (1) and (2) of every head, and the rest at the end. hidden_units() advances in
  // whole tiles, so `filler` is a number of whole tiles.
  const int slices = 2 * (heads + is_busy) + 1;
  p.filler = ceil_div(ceil_div(p.units.size, slices), TILE_ROWS) * TILE_ROWS;

  // Split the cached tokens among the ranks.
  const int tokens = ceil_div(position, RANKS);
  p.first_token = min(tokens * p.rank, position);
  p.end_token = min(tokens * (p.rank + 1), position);
  return p;
}

static __device__ void load_rope(const Model& m, Shared& s, int position, int threads) {
  for (int i = threadIdx.x; i < ROT / 2; i += threads) {
    s.rope_cos[i] = m.rope_cos[position * (ROT / 2) + i];
    s.rope_sin[i] = m.rope_sin[position * (ROT / 2) + i];
  }
}

__device__ void prepare(int position) const {  // for the token at `position`
  if (tid == 0) s.plan = make_plan(blockIdx.x, gridDim.x, position);
  load_rope(m, s, position, WORKERS);
}

// The kernel: what every thread of the grid runs. It makes up to new_tokens tokens, fewer if the cache
// becomes full. In tests, new_tokens may be 0. Then only the layers first_layer to end_layer - 1 run, without
// the LM head.
static __device__ void thread_main(const Model& m, Shared& s, int first_layer, int end_layer,
                                   int new_tokens) {
  const State& state = *m.state;
  const int token = state.token, position = state.position;
  const unsigned swaps = state.swaps;

  // If the cache is full, all blocks leave, and nothing changes.
  const int end = min(position + max(new_tokens, 1), CTX);
  if (position >= end) return;

  // Set up what the block shares.
  if (threadIdx.x == 0) {
    s.plan = make_plan(blockIdx.x, gridDim.x, position);
    s.lm_rows = deal(0, V, blockIdx.x, gridDim.x);
    s.settings = *m.settings;
    s.tally_old[0] = state.tally_words[0], s.tally_old[1] = state.tally_words[1];
    s.vote_number = state.vote_number, s.tally_number = 0;
    for (int i = 0; i < SLOTS; i++) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], WARPS);
    barrier_init(&s.qkv_ready, 1), barrier_init(&s.attention_ready, 1), barrier_init(&s.sums_ready, 1);
    barrier_init(&s.token_ready, 1), barrier_init(&s.workers_done, WARPS);
    barriers_exist();
  }
  load_rope(m, s, position, WORKERS + 32);

  // Load the old words of x_now that this thread carries. No block can have added to x_now yet: it would have
  // to pass a (4) first, which needs an addition that this block makes after this line.
  longlong2 carried_words = {0, 0};
  if (threadIdx.x < WORKERS && 2 * carried_pair() < C)
    carried_words = load_relaxed(m.residual + swaps % 2 * C + 2 * carried_pair());

  // A push must not go to a block that has not begun. So the blocks of a cluster wait for each other.
  cluster_sync();  // (0)

  // The first thread of the last warp is the producer. The other 31 threads of this warp have no work.
  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS) Producer{m, s}.run(first_layer, end_layer, position, end, new_tokens > 0);
    return;
  }

  Worker worker{m, s, s.plan};
  worker.begin(first_layer, carried_words);
  worker.run(first_layer, end_layer, new_tokens, token, position, end, swaps);
}

// 11. A layer in time =====================================================================================
// This table follows thread 0 of block 11, which is rank 1 of cluster 5, through one layer. A line ends at
// the mark in its first column (chapter 19). The columns of numbers are:
//     KB       what the block reads
//     needs    how many us these bytes take at 35.0 KB a us, a processor's share of the memory's rate
//     took     how many us the line took, as a mean over the layers of the record in results/
//
//  mark        thread 0 of block 11                                          KB  needs  took  waits for
//  NORM        S0: reads columns 2i, 2i + 1 of x for i = 0, 320, 640, 960                 1.9  L2, (a)
//              S1: normalizes columns 0..7, which it has from here on                          (b)
//  QKV         S2: rows 1320..1439: head 5, k from dimension 40 on, and v    615   17.6  13.5  memory
//  1           S8: units 88..95, 600..607; (1)                               164    4.7   4.3  memory
//  ATTEND      S3: rotates q[0] with q[10]; S4: threads 80..239 append k, v               1.7  (d)
//              S5: takes dimensions 0..7 of tokens 64, 84, 104, 124           20    0.6        (e)
//              S5: merges o[0] of 10 warps, and pushes it to rank 0
//  2           S8: units 1112..1119, 1624..1631; (2)                         164    4.7   3.6  memory
//  OUT, UNITS  S6, S7: output rows 440..479; S8: units 2078..2080            236    6.7   7.1  memory
//  3           S9: pushes y[0..7] to rank 0; (3)                                          0.7  peer's sums
//  ADDED       S9: adds columns 1280, 1600, 1920, 2240 of the sum to x                    0.4  L2
//  START       (4): polls columns 2558 and 2559 of x                                      3.5  other blocks
//  a layer                                                                  1198   34.2  36.8
//
// S2 takes less than its bytes need, because the ring is full when S2 begins. In all, a layer takes 2.6 us
// longer than its bytes need. Nearly all of this is lost between two layers, in S9, (4), S0 and S1. Only 0.6
// us of it are explained: the workers free no slot for 6.5 us, but the ring fills in 5.9 us, and then memory
// pauses.
//
// Follow one number: hidden unit 602 of block 11, in layer 0 of a launch's first token.
//  1. Its up row lies in global memory: w_up + 602 * C, 5120 bytes.
//  2. Unit 602 belongs to the block's second tile of units, 600..607. Before this tile, the producer of block
//     11 has copied 34 half tiles: 30 for S2, and 4 for the first tile of units. These are three trips around
//     the ring and 4 slots, so rows 600..603 go to slot 4. The producer waits until slot 4 is empty, (E),
//     announces 20480 bytes of rows and 16 of biases at full[4], and starts two copies: to slots[4] and to
//     bias[4].
//  3. When all bytes have landed, (F) lets the workers go on. Thread 0 reads columns 0..7 of row 602 from
//     slots[4], multiplies them with its xn2[0..7], and adds the products up in dots[2]. Threads 1 to 319 do
//     the same with their columns. Then each warp arrives at empty[4]: (E).
//  4. reduce_rows brings the sum of each warp to its lanes 2, 10, 18 and 26. Lane 2 writes the sum to
//     warp_dots. After (c), these lanes of every warp add up the 10 sums and the bias in bias[4][2]. The
//     result is the argument of gelu. Now 40 threads have h_602.
//  5. The down row arrives in slot 6, after the other half of the up tile in slot 5. After (F), lane 2 gives
//     h_602 to its warp by a shuffle, and thread 0 adds h_602 times columns 0..7 of the row to its y[0..7].
//  6. y stays in registers until the block has done its other 34 units and its 40 output rows. Then thread 0
//     pushes y[0..7] into an inbox of rank 0, which is block 10: sums[1][0..7].
//  7. Block 10 waits until all pushes have landed, (3). Its thread 0 adds sums[0][0] and sums[1][0], turns
//     the sum into an integer, and adds it to word 0 of x_next, in L2, together with 1 in the count.
//  8. Thread 0 of block 131 is the carrier of column 0. Earlier or later than step 7, it adds x[0] + biases -
//     old to the same word.
//  9. After 66 clusters and the carrier have added, word 0 is complete. In every block, thread 0 polls
//     another word until that one is complete, (4), and lets the block go on, (g). Then it reads word 0,
//     checks its count, and puts the value into s.x[0]. After (a), thread 0 of each block takes x[0..7] from
//     there. So h_602 has reached all 132 blocks.

// 12. Memory layout =======================================================================================
// Global memory: the weights in fp16, and what launches write. Every matrix is stored as rows of C numbers.

struct Layer {
  const half *ln1_w, *ln1_b, *ln2_w, *ln2_b;  // [C]
  const half *w_qkv, *b_qkv;                  // [NH][3][HS] rows, and as many biases
  const half *w_out, *b_out;                  // [NH][HS] rows, [C]
  const half *w_up, *b_up;                    // [MLP] rows, [MLP]
  const half *w_down, *b_down;                // [MLP] rows, [C]
};

struct alignas(16) Maxima { unsigned long long best, drawn; };  // two maxima over the grid: chapter 9
struct State {  // what one launch passes to the next one
  int token;                 // the token to be read next; -1 if the last logits were not finite
  int position;              // tokens in the cache
  unsigned swaps;            // layers computed so far; if odd, x is in the second buffer
  unsigned vote_number;      // votes of the grid so far: chapter 9
  unsigned voted;            // counts the blocks that have voted: chapter 9
  Maxima maxima[3];          // of this vote, the next vote and the vote before: chapter 9
  longlong2 tally_words[2];  // two sums over the grid, for top-k and top-p: chapter 9
};

struct Settings {  // how to draw tokens; the host writes it: chapter 9
  unsigned long long seed;
  double top_p;        // 1 keeps all tokens
  float temperature;   // 0 takes the likeliest token
  unsigned top_k;      // V keeps all tokens
};

struct Failure { int sync, block, layer, seen; };  // a report, in host memory: chapter 17

struct Model {  // the kernel's parameter: pointers only, the same in every launch
  Layer layers[L];
  const half *embed_in, *lnf_w, *lnf_b, *embed_out;  // [V] rows, [C], [C], [V] rows
  const float *rope_cos, *rope_sin;                  // [CTX][ROT / 2] of the RoPE angles of each position
  half* cache;                   // [L][2][NH][CTX][HS] keys and values
  long long* residual;           // [2][C] the two buffers of x (chapter 8)
  float* logits;                 // [V]
  int* history;                  // [CTX] the token chosen at each position, in host memory
  State* state;
  const Settings* settings;
  Failure* failure;
  float* taps;                   // chapter 19
  unsigned long long* timeline;  // chapter 19
};

// The place of a token's key (kv 0) or value (kv 1) in the cache.
static __device__ half* cache_row(const Model& m, int layer, int kv, int head, int token) {
  return m.cache + (((size_t)(layer * 2 + kv) * NH + head) * CTX + token) * HS;
}

// One block's shared memory, 232192 bytes. FIXED_BYTES is at least the size of all but the ring, which gets
// the rest: 10 slots, 205 KB. A slot needs room for its rows, its biases and two mbarriers of 8 bytes, full
// and empty.
static constexpr int WARP_BYTES = 24 * WARPS + 8 * (ROWS + 1) * TEAMS * TEAM_WARPS;  // [960]
static constexpr int FIXED_BYTES = 4 * (C + TEAMS * C + WARPS * HS) + 25 * HS + WARP_BYTES + 512;
static constexpr int SLOTS = (SHARED_BYTES - FIXED_BYTES) / (SLOT_BYTES + 2 * TILE_BIASES + 16);  // [10]

// Bulk copies, and loads of 16 bytes, need addresses that are multiples of 16: `alignas`.
struct alignas(128) Shared {                               // chapter, and what
  half slots[SLOTS][HALF_TILE_ROWS * C];                   // 5  rows of weights; or keys and values
  alignas(16) half bias[SLOTS][TILE_BIASES];               // 5  biases of the tile that begins in it
  alignas(16) float sums[RANKS * TEAMS][OWN];              // 7  y of all ranks, this rank's columns
  alignas(16) float x[C];                                  // 8  x, read once for all threads
  float qkv[3 * HS];                                       // 7  q, k, v of a head, from all ranks
  float peer_o[RANKS][OUT_ROWS], peer_peak_denom[RANKS][2];// 7  attention's results, from all ranks
  alignas(16) float q[HS];                                 // 7  q, rotated and scaled
  alignas(16) half k_now[HS], v_now[HS];                   // 7  this step's k and v, as in the cache
  float warp_o[WARPS][HS], warp_peak[WARPS],
      warp_denom[WARPS];                                   // 7  attention's results, from every warp
  float warp_dots[2][TEAMS][ROWS][TEAM_WARPS];             // 4  a tile's dot products, from every warp
  float warp_stats[TEAMS][TEAM_WARPS][2];                  // 6  LayerNorm's statistics, from every warp
  float rope_cos[ROT / 2], rope_sin[ROT / 2];              // 10 RoPE's angles at this position
  ulonglong2 warp_pair[WARPS], grid_pair;                  // 9  two maxima or two sums, see (5) and (6)
  longlong2 tally_old[2];                                  // 9  tally_words, when last used
  Settings settings;                                       // 9
  float candidate_logit;                                   // 9  if top-k or top-p is set
  unsigned vote_number, tally_number;                      // 9  so far; only thread 0 uses them
  Plan plan;                                               // 10
  Portion lm_rows;                                         // 10 the block's rows of the LM head
  int layer;                                               // 17 the layer that a failure report names
  uint64_t full[SLOTS], empty[SLOTS];                      // 5  (F), (E)
  uint64_t qkv_ready, attention_ready, sums_ready;         // 7  (1), (2), (3)
  uint64_t token_ready, workers_done;                      // 9  (h); 17: all workers are done
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the ring leaves too little memory: FIXED_BYTES is wrong");

// 13. Why it is safe ======================================================================================
// All syncs, and what goes wrong without them. `python test_block.py -k simulated_sync` leaves out one at a
// time. Then the result changes, or the launch does not end. Only the (g) that follows (4) is there for speed
// alone.
//
//     sync  who waits, and for what                                 without it
//     (0)   a cluster's threads: all its blocks have set up         a push into a block that has not begun
//     (1)   a rank: q, k and v from all ranks                       attention with stale q, k or v
//     (2)   a rank: peak, denom, o from all ranks                       a rank's tokens are forgotten
//     (3)   a rank: y from all ranks                                x lacks what a peer adds
//     (4)   all blocks: x is complete                               LayerNorm of an unfinished x
//     (5)   all blocks: all have voted, k and v are cached          a token chosen from only some logits
//     (6)   all blocks: the tally is complete                       a candidate tested with only some logits
//     (F)   workers: a slot is full                                 arithmetic with bytes of an earlier tile
//     (E)   the producer: a slot is empty                           bytes overwritten while in use
//     (a)   workers: all of x is in s.x                             columns of an older x
//     (b)   a team: warp_stats of all its warps                     a mean of stale values
//     (c)   a team: warp_dots of all its warps                      stale dot products
//     (d)   workers: q, k_now, v_now are written, qkv is read       attention with a half-rotated q
//     (e)   push_attention: the results of all warps                a merge with results of an earlier head
//     (f)   thread 0: its block has written all that (5), (6) need  a block takes part before it is done
//     (g)   workers: thread 0 has passed (4), (5) or (6)            a result of (5) or (6) used too early
//     (h)   the producer: thread 0 has passed (5)                   copies of k and v that are not cached yet
//
// Inboxes. The owner reads an inbox, then sends its next message. The peer waits for this message, and then
// pushes into the inbox again:
//
//     inbox                    is read in  the owner's next message                  the peer waits for it at
//     qkv                      S3          its peak, denom, o of this head, after (d)  (2)
//     peer_o, peer_peak_denom  S6          q, k, v of the next head, or its y        (1), or (3)
//     sums                     S9          its additions to x                        (4)
//
// For example, the inbox qkv of rank 1 of cluster 5 in two layers. Times are us since layer 0 began, by the
// table of chapter 11.
//     1.9 .. 15.4   Both ranks do S2, and push their rows into this inbox.
//     19.8          Rank 1 passes (1) with parity 0: all 960 bytes have landed.
//     < 21.5        Rank 1 reads the inbox in S3. After (d), all its threads have read it.
//     21.5          Rank 1 pushes its peak, denom and o to rank 0.
//     25.1          Rank 0 passes (2), which needs this push.
//     38.7          Rank 0 begins S2 of layer 1, and pushes into the inbox again. This is safe.
//     56.5          Rank 1 passes (1) with parity 1.
//
// Parity. One bit is enough if phase n + 1 of an mbarrier cannot end before every waiting thread has seen the
// end of phase n. For full and empty, see chapter 5. (h) has one waiting thread, the producer, and the next
// token needs rows that it copies after the wait. At (1), (2) and (3), phase n + 1 needs a push of this
// block's own, which comes after a sync that each warp reaches only when it has seen phase n: (d) of this
// head for (1), (d) of the next head for (2), (a) of the next layer or of the choice for (3).
//
// Exit. A block must not end while a push to it or from it is on its way. The last pushes of a token are
// those of y. The receiver waits for them at (3), and then adds to x. Both blocks end only after a (4) that
// needs this addition. The end of a launch is a sync, too: the next launch sees x, the cache and State.
//
// The same bits in every run. The plan depends on block, grid and position alone. Sums within a cluster are
// taken in the order of threads, warps and ranks. Only integers are combined in an order that changes:
// additions to words of x, tallies, and the maxima of a vote.

// 14. Other shapes ========================================================================================
// Small models: teams. The threads that hold one row are a *team*. A row of pythia-70m has 512 columns, so a
// team is 64 threads. A block has at least THREADS = 256 workers, here 4 teams, and each takes different
// rows: a tile has 8 rows for each team, 32 in all, and row r belongs to team r mod 4. Every team has all of
// x, a y of its own, and a (b) and (c) of its own. At (3), all teams push their y, and the owner of the
// columns adds up RANKS * TEAMS parts, in the order of ranks and teams.
//
// Smallest: half warps. A row of pythia-14m has 128 columns, so a team is 16 threads (LANES), and a warp is
// two teams. A team is within one warp, so it needs no (b) and (c): TEAM_WARPS == 1. With clusters of 4, a
// rank has 8 output rows but 16 teams. A team without an output row may read peer_peak_denom while a peer
// overwrites it. This does no harm, because this team uses nothing that it reads.
//
// Largest: two pieces. From C = 4096 on, a thread owns PIECES = 2 pieces of 8 columns, so that a block has
// half as many threads and each can have twice as many registers. The pieces lie 8 * TEAM columns apart, so
// that neighbouring threads read neighbouring pieces. ROWS is 4, so that a slot does not grow.
//
// Clusters of 1, 4 and 8 change only the shares: QKV_ROWS, OUT_ROWS, OWN and the number of tokens. With more
// heads than clusters, the loop over heads runs several times, and the first blocks get one head more.
//
// The compiler checks what the code takes for granted:
static_assert(C % 128 == 0, "a row is dealt out to half-warps, 16 bytes a lane: C must be a multiple of 128");
static_assert(NH * HS == C, "the heads together are as wide as the residual stream");
static_assert(WORKERS % 32 == 0 && WORKERS + 32 <= 1024, "whole warps, and at most 1024 threads in a block");
static_assert(TEAM % 32 == 0 || 32 % TEAM == 0,
              "a team is whole warps, or a warp whole teams: C / 8 (C / 16 from 4096 on) must divide so");
static_assert(TEAM_WARPS == 1 || TEAMS <= 14, "a team of several warps has a named barrier; a block has 16");
static_assert((ROWS & (ROWS - 1)) == 0 && ROWS <= LANES && ROWS % HALF_TILES == 0,
        "reduce_rows folds a power of two of rows over a team's lanes, and a tile comes in equal halves");
static_assert(HS % (2 * RANKS) == 0 && HS % 8 == 0, "a head's rows divide evenly; lanes take 8 dimensions");
static_assert(OWN % 8 == 0, "a rank owns whole pieces of a row");
static_assert(HS <= WORKERS, "one thread for each dimension of a head merges the warps' attention");
static_assert(SLOTS >= 2 * HALF_TILES, "two tiles: one being read, one on its way; take fewer ROWS");

// 15. Arithmetic of words =================================================================================
// Resolution. The value of a word is a multiple of 2^-22 = 2.4e-7. Above 2, this is no coarser than fp32.
//
// NaN. For a number that does not fit, to_word adds FIXED_NAN = 2^47. from_word returns NaN from FIXED_EDGE =
// 2^46 on.
//   - Other additions cannot hide one FIXED_NAN. At most 254 others, each below 65536 * 2^22 = 2^38 in size,
//     are together below 2^46.
//   - Several FIXED_NANs cannot cancel. In the 55 bits of the value, 256 of them would wrap around to 0, but
//     at most 255 additions come, of 254 clusters (MOST_CLUSTERS) and the carrier.
//   - A large sum of ordinary additions is read correctly up to 2^24. The next carrier adds it as one number,
//     65536 or more, so x becomes NaN in the next layer.
//
// Old counts. Before the carrier has added, a word would need 256 more additions to look complete, but there
// are at most 254. After the carrier's addition, the count is at most 256 + 254 + 1 = 511, which 9 bits hold.

// Noise. Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) makes four numbers of 32 bits from a key, here the
// seed, and a counter, here (token / 4, position), in ten steps of multiplications and exclusive ors. The
// four numbers serve four tokens: u = (number + 0.5) / 2^32 and delay = -log1p(-u). A large noisy logit comes
// from a small u, so the digits of small u matter, and -log(1 - u) would lose them.
static __device__ __noinline__ float log_delay(unsigned long long seed, uint32_t position, uint32_t token) {
  uint32_t counter[4] = {token / 4, position, 0, 0}, key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
#pragma unroll 1
  for (int i = 0; i < 10; i++) {
    const unsigned long long a = 0xD2511F53ull * counter[0], b = 0xCD9E8D57ull * counter[2];
    counter[0] = (uint32_t)(b >> 32) ^ counter[1] ^ key[0], counter[1] = (uint32_t)b;
    counter[2] = (uint32_t)(a >> 32) ^ counter[3] ^ key[1], counter[3] = (uint32_t)a;
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  const uint32_t bits =
      token & 2 ? (token & 1 ? counter[3] : counter[2]) : (token & 1 ? counter[1] : counter[0]);
  return logf(-log1pf(-fmaf(__uint2float_rn(bits), 0x1p-32f, 0x1p-33f)));
}

// 16. Pace ================================================================================================
// Memory does not serve all processors alike. Some blocks get their rows early, and then wait at (4) for
// blocks that get theirs late. So each producer limits itself to an equal share of PACE, in bytes a ns: after
// a copy of b bytes it waits b * blocks / PACE ns. PACE is what memory can deliver by its clock and the width
// of its bus, 4814 bytes a ns on an H200. Without a pace, a token takes 1245 us instead of 1225, and one of
// pythia-160m 83.7 instead of 81.9.
//
// A producer that has fallen behind is not allowed to catch up. If it may catch up by 0.3 us, a token takes
// 0.2 % longer. But global_ns() advances only every 32 ns, so a wait may end up to 32 ns late, and
// keep_pace() forgives these CLOCK_NS. A wait of more than 1 ms can only mean that the clock was set back.
static constexpr int CLOCK_NS = 32;  // step of global_ns, the clock that all blocks share

static __device__ void keep_pace(unsigned long long& earliest_ns, uint32_t bytes) {
  unsigned long long now;
  while ((now = global_ns()) < earliest_ns && earliest_ns - now < 1'000'000) {}
  earliest_ns = max(earliest_ns, now - CLOCK_NS) + bytes * gridDim.x / PACE;
}

// 17. Patience ============================================================================================
// A wait that never ends would hang the host, too. So workers wait at (1) to (6) for 3 s at most, and the
// producer for 6 s, so that a worker, which is closer to the cause, reports first. Two waits of workers have
// no limit: (F), and the second part of (4), where all threads read x. If workers hang there, the producer,
// which waits for them, reports.
//
// The first thread that reaches its limit writes a Failure to host memory: the sync, its block, the layer,
// and a number. At (5) this is the number of blocks that have not voted, at (4) and (6) the number of
// additions that a word lacks, elsewhere the parity. Then the thread executes a *trap*, an instruction that
// ends the launch and all of the process's work on the GPU. The host turns the Failure into an error.
static constexpr long long PATIENCE = 6'000'000'000;  // clock cycles: 3.0 s at 1.98 GHz
enum SyncId {  // (1) to (6), then (F), (E) and (h): the numbers in Failure::sync
  SYNC_QKV = 1, SYNC_ATTENTION, SYNC_SUMS, SYNC_X, SYNC_VOTE, SYNC_TALLY, SYNC_FULL, SYNC_EMPTY, SYNC_TOKEN
};

// __noinline__ keeps this rare code out of the loops.
static __device__ __noinline__ void give_up(Failure* failure, int sync, int layer, int seen) {
  if (atomicCAS_system(&failure->sync, 0, sync) != 0)
    while (true) __nanosleep(1000);  // another thread is writing its report, and its trap ends this one, too
  failure->block = blockIdx.x;
  failure->layer = layer;
  failure->seen = seen;
  __threadfence_system();  // the report is written before the trap
  __trap();
}

// Waits until the phase of `barrier` with this parity has ended. A report of failure names `sync`.
static __device__ void wait(const Model& m, Shared& s, uint64_t* barrier, uint32_t parity, SyncId sync) {
  const bool by_peers = sync <= SYNC_SUMS;
  if (!phase_running(barrier, parity, by_peers)) return;
  const long long patience = by_peers ? PATIENCE : 2 * PATIENCE, start = clock64();
  while (phase_running(barrier, parity, by_peers))
    if (clock64() - start > patience) give_up(m.failure, sync, s.layer, parity);
}

// 18. Toolbox: one function for each instruction that CUDA C++ does not offer =============================
// asm("...") is an instruction of PTX, the GPU's assembly language, which calls a block a cta. %0, %1 ...
// stand for the operands after the colons: first the results, with "=", then the inputs; "r" has 32 bits, "l"
// 64. volatile forbids the compiler to remove the instruction. "memory" forbids it to move reads and writes
// across the instruction.

// An address in shared memory, in the 32 bits that these instructions take.
static __device__ uint32_t smem(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

static __device__ uint32_t peer(const void* place, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem(place)), "r"(rank));
  return address;
}
static __device__ void push(uint32_t to, float v, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               :: "r"(to), "r"(__float_as_uint(v)), "r"(barrier) : "memory");
}
static __device__ void push4(uint32_t to, const float* v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
      :: "r"(to), "r"(__float_as_uint(v[0])), "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])),
         "r"(__float_as_uint(v[3])), "r"(barrier) : "memory");
}

static __device__ void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(smem(b)), "r"(arrivals) : "memory");
}
static __device__ void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(smem(b)) : "memory");
}
// A phase that expects bytes needs this arrival. A plain one could end the phase before the bytes have
// landed.
static __device__ void barrier_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(smem(b)), "r"(bytes) : "memory");
}
// Sleeps for a while if the phase is open. Every thread that reads the data has to call this, because the
// acquire holds for the caller alone. Data from a peer needs an acquire for the cluster, which empties the
// processor's own cache, L1.
#define TRY_WAIT(scope) "{\n.reg .pred p;\n" \
    "mbarrier.try_wait.parity.acquire." scope ".shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 0, 1, p;\n}"
static __device__ bool phase_running(uint64_t* b, uint32_t parity, bool by_peers = false) {
  uint32_t open;
  if (by_peers) asm volatile(TRY_WAIT("cluster") : "=r"(open) : "r"(smem(b)), "r"(parity) : "memory");
  else asm volatile(TRY_WAIT("cta") : "=r"(open) : "r"(smem(b)), "r"(parity) : "memory");
  return open;
}
// Without this, a peer or a bulk copy could use an mbarrier before it is initialised.
static __device__ void barriers_exist() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
static __device__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
static __device__ void named_barrier(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// Weights are read once in a token, but x by all blocks. So copied bytes are the first that L2 may replace.
// Otherwise a token takes 1212 us instead of 1202.
static __device__ uint64_t read_once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// NVIDIA calls the copying hardware TMA. Addresses and sizes are multiples of 16 bytes.
static __device__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* full,
                                 uint64_t policy) {
  asm volatile(
  "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      :: "r"(smem(to)), "l"(from), "r"(bytes), "r"(smem(full)), "l"(policy) : "memory");
}
// Bulk copies reach memory on another path (a "proxy") than loads, and an acquire does not order them. After
// this fence, the thread's copies see all that the thread has acquired.
static __device__ void order_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Goes to L2, where the additions are made, and gets value and count of a word at the same moment. A plain
// load could find an old x in L1.
static __device__ longlong2 load_relaxed(const long long* p) {
  longlong2 v;
  asm volatile("ld.relaxed.gpu.global.v2.s64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p));
  return v;
}
static __device__ float load_relaxed(const float* p) {
  float v;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}
// "red" is an addition that returns nothing, so no thread waits for it, as it may for an atomicAdd.
static __device__ void add_relaxed(long long* p, long long v) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" :: "l"(p), "l"(v));
}
static __device__ void arrive_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(counter) : "memory");
}
static __device__ unsigned load_acquire(const unsigned* counter) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
  return v;
}

// .nc loads bytes that nothing writes during the launch.
static __device__ uint4 load16(const half* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

static __device__ unsigned long long global_ns() {
  unsigned long long t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t;
}

// 19. Taps and marks ======================================================================================
// Compiler options add them. The shipped kernel has neither.
//   -DTAPS       stages write what they compute to Model::taps. The bits of y stay the same. A new tap needs
//                room in Fused.taps in build.py, and a name in test_block.py's STAGES
//   -DTIMELINE   thread 0 of every block writes the time, in ns, at each mark of a layer
enum Tap { TAP_XN1 = 0, TAP_XN2 = C, TAP_Q = 2 * C, TAP_K = 3 * C, TAP_V = 4 * C, TAP_O = 5 * C,
           TAP_H = 6 * C };
enum Mark { MARK_START, MARK_NORM, MARK_QKV, MARK_1, MARK_ATTEND, MARK_2, MARK_OUT, MARK_UNITS, MARK_3,
            MARK_ADDED, MARKS };
__device__ void tap(int where, float value) const {
#ifdef TAPS
  m.taps[where] = value;
#endif
}

__device__ void tap_norms(const Columns& xn1, const Columns& xn2) const {
  for (int i = 0; i < COLS; i++) tap(TAP_XN1 + column(i), xn1[i]), tap(TAP_XN2 + column(i), xn2[i]);
}

__device__ void mark(Mark event, int layer) const {
#ifdef TIMELINE  // [blocks][L + 1][MARKS]
  if (tid == 0) m.timeline[((size_t)blockIdx.x * (L + 1) + layer) * MARKS + event] = global_ns();
#endif
}

};  // Worker

// 20. Host side ===========================================================================================
// A block waits for all others at (4), (5) and (6). If two launches had half of the GPU each, both would wait
// for ever. So the launch is *cooperative*: the driver starts all blocks at once, or refuses.

__global__ void __launch_bounds__(WORKERS + 32, 1)
fused_block(const __grid_constant__ Worker::Model m, const int first_layer, const int end_layer,
            const int new_tokens) {
  extern __shared__ __align__(128) uint8_t raw[];
  Worker::thread_main(m, *reinterpret_cast<Worker::Shared*>(raw), first_layer, end_layer, new_tokens);
}

static cudaLaunchConfig_t configure(cudaLaunchAttribute (&attributes)[2], int clusters, void* stream) {
  attributes[0].id = cudaLaunchAttributeClusterDimension; attributes[0].val.clusterDim = {RANKS, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative; attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * RANKS); config.blockDim = dim3(WORKERS + 32);
  config.dynamicSmemBytes = sizeof(Worker::Shared);
  config.stream = (cudaStream_t)stream;
  config.attrs = attributes; config.numAttrs = 2;
  return config;
}

// build.py calls the two functions below through Python's ctypes. They return NULL, or a text that says what
// went wrong. cudaGetLastError makes CUDA forget the error.
#define CHECK(call) \
  do { const cudaError_t e = (call); if (e) return cudaGetLastError(), cudaGetErrorString(e); } while (0)

// Counts the clusters that the GPU holds at once. The query accepts only the first attribute.
extern "C" const char* fused_prepare(int* clusters) {
  int device, multiprocessors;
  cudaLaunchAttribute attributes[2];
  CHECK(cudaGetDevice(&device));
  CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  CHECK(cudaFuncSetAttribute(fused_block, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             sizeof(Worker::Shared)));
  cudaLaunchConfig_t config = configure(attributes, multiprocessors / RANKS, nullptr);
  config.numAttrs = 1;
  CHECK(cudaOccupancyMaxActiveClusters(clusters, fused_block, &config));
  if (*clusters > multiprocessors / RANKS) *clusters = multiprocessors / RANKS;
  if (*clusters > Worker::MOST_CLUSTERS) *clusters = Worker::MOST_CLUSTERS;
  return nullptr;
}

extern "C" const char* fused_launch(const void* const* pointers, int clusters, int first_layer,
                                    int end_layer, int new_tokens, void* stream) {
  if (first_layer < 0 || first_layer >= end_layer || end_layer > L || new_tokens < 0 ||
      (new_tokens > 0 && end_layer < L) || (new_tokens > 1 && first_layer > 0))
    return "no such range of layers: take 0 <= first < last <= L; several tokens need all layers";
  const int blocks = clusters * RANKS;
  if (blocks * WORKERS < C / 2 || blocks < MIN_BLOCKS)
    return "too few blocks to carry x, or to keep all logits: launch more clusters";
  if (blocks >= 1 << Worker::COUNT_BITS || (long long)V * blocks >= 1ll << 31)
    return "too many blocks for the counts of a tally, or for this vocabulary: launch fewer clusters";
  if (new_tokens > CTX) new_tokens = CTX;
  const Worker::Model& m = *reinterpret_cast<const Worker::Model*>(pointers);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configure(attributes, clusters, stream);
  CHECK(cudaLaunchKernelEx(&config, fused_block, m, first_layer, end_layer, new_tokens));
  return nullptr;
}

// 21. Exercises ===========================================================================================
// Edits worth trying, with what to expect of a token of 2.8b at T = 128 on an H200.
//
//   1. Clusters of 1 (python bench.py --ablate). Expect 26 % more, because one block has all rows of a head.
//      Which of (1), (2), (3) get shorter, which part of a layer longer?
//   2. build.py: 4 ROWS instead of 8. The block adds up sums of tiles twice as often. Expect 0.4 % more. With
//      16, the producer is at most one tile ahead. Expect two thirds more.
//   3. make_plan: filler = 0. A block with a head waits while the pushes for (1) and (2) travel. How much is
//      that for a token? Why do the bits of y change?
//   4. build.py: attention_kib = 96. Blocks with a head add to x 1.4 us earlier, the others 1.3 us later, and
//      a token takes as long as before. Why does it not lose 32 * 1.3 us? (What do blocks wait for at (4), by
//      chapter 11?)
//   5. Leave out the call of wait_for_x. Expect 5 % more, because all threads poll. Now leave out the check
//      in read_residual instead. How often do the bits change, and why do some launches not end? (See carry.)
//   6. dot_tile: leave out `flip ^= 1`, so that all tiles use the same warp_dots. Find the interleaving of
//      two warps that goes wrong, and count how often it does in the random orders of simulator.cpp
//      (test_block.py -k simulated_block).
