// fused_block.cu: one CUDA kernel for all of Pythia's decode step, from the embedding to the next token.
//
// 0. One token, and what it costs =========================================================================
// To write one more token of one text, a language model such as Pythia reads all of its weights once. This
// file does that whole step in one *kernel*, a function that all threads of a GPU run together. One call of
// the kernel is a *launch*. It makes up to as many tokens in a row as the caller asks for, which is 8 in
// build.py. Before the first launch, PyTorch has read the prompt (model.py) and left its keys and values in
// the cache.
//
// In PyTorch the step is these lines. The kernel computes the same in *stages*, S0 to S10. Chapter 9 has the
// noise, chapter 14 top-k and top-p.
//
//     x = embed_in[token]                                                          # S0     [C]
//     for each layer:
//         xn1, xn2 = layer_norm(x, ln1_w, ln1_b), layer_norm(x, ln2_w, ln2_b)      # S1     [C]
//         q, k, v = (w_qkv @ xn1 + b_qkv).view(NH, 3, HS).unbind(1)                # S2     [NH, HS]
//         q, k = rope(q, T), rope(k, T)  # rotates them by the position            # S3     [NH, HS]
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
//     C        width of x                                                    2560
//     NH, HS   attention heads of a layer; dimensions of a head              32, 80
//     MLP      hidden units of a layer                                       10240
//     V        tokens in the vocabulary                                      50304
//     L        layers                                                        32
//     T        position of the token that this step reads, counted from 0.   128, if no other number
//              So it is also the number of positions in the cache            is given
//
// A *layer* is what papers call a transformer block. In this file a *block* is CUDA's: a group of threads
// (chapter 2). The text explains pythia-2.8b on an H200. Chapter 15 says what is different in the other nine
// sizes.
//
// The budget. Each weight is used once for each token, so a layer takes at least the time in which memory
// delivers its bytes. In us, microseconds:
//     (4*C*C + 2*C*MLP) weights of 2 bytes         157.3 MB / 4.622 TB/s =   34.0 us a layer
//     keys and values of T tokens: 4*C*T bytes      1.31 MB / 4.622 TB/s =    0.3 us a layer
//     L layers, 2*V*C bytes of the LM head, biases 5.335 GB / 4.622 TB/s = 1154   us a token: the floor
// The 4.622 TB/s are measured: the fastest of several kernels that only read reaches this rate on this H200.
// The kernel below takes 1232 us for a token, 7 % above the floor. Arithmetic is not the limit: even without
// GELU and without the sums across threads, a token takes the same time within 0.3 %. One goal explains
// nearly everything in this file: memory must never sit idle.
//
// How to read. Chapters 1 to 3 are the algorithm. Chapters 4 to 9 fill in what the layer loop of chapter 3
// leaves open. Chapter 10 divides the work among the blocks, and chapter 11 follows one layer, and one
// number, through time. Stop there: the appendix, from chapter 12 on, is for looking things up.
//
// A *sync* is a point where a thread waits until other threads have done something. Syncs between blocks are
// (0) to (6). Syncs inside a block are (a) to (g), (F), (E) and (N). Chapter 13 lists all of them. Each stage
// has a card above it: its *math*; *who* computes what; the *bytes* that a block moves, unless it says
// otherwise; its *syncs*.
//
// Times are us for one token of 2.8b, unless a sentence says otherwise. GPUs and versions of the kernel
// differ, so compare times only within a sentence. Many percentages, and the times in chapters 8 and 19, were
// measured on older versions (docs/what-did-not-help.md).
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
// An H200 has 132 processors (NVIDIA calls them multiprocessors). Each has fast *shared memory* for its own
// threads, of which a block may take 227 KiB. All processors read and write one large *global memory*,
// through one cache, *L2*. Global memory holds the weights, the cache of keys and values, and x. CUDA groups
// threads like this:
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
// end after the setup.
//
//     what                                    is divided among        how much each gets
//     columns of every row, of x and of y     the workers of a block  8 columns, the same in all layers
//     heads of a layer                        clusters                clusters 0..31 one each, 32..65 none
//       rows of the head's q, k, v            ranks of its cluster    120 of 240
//       cached positions of the head          ranks                   64 of 128
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
// and all others would wait for it at (4): a token takes 1551 us instead of 1223. In a cluster of 2, each
// block has 160 rows of the head, and hidden units fill the rest of its share. Larger clusters change little:
// 1231 us with 4 blocks, 1219 with 8.

// 3. The layer loop =======================================================================================
// The loop below is what one worker does. A few sizes come first, with their values for 2.8b in brackets. The
// names in capitals that this file does not define, such as HIDDEN, are set by build.py. Every other name is
// defined further down, single instructions of the GPU in chapter 19. ROT is the number of dimensions of a
// head that RoPE rotates (chapter 7), CTX the number of positions that the cache has room for. `__device__`
// marks a function that runs on the GPU, `__host__` one that runs on the CPU (the *host*). threadIdx.x is the
// index of a thread in its block, blockIdx.x the index of a block, and gridDim.x the number of blocks. In
// 2.8b, PIECES and TEAMS are 1: ignore both until chapter 15.

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int C = HIDDEN, NH = HEADS, HS = HEAD_SIZE, ROT = ROTARY, V = VOCAB, L = LAYERS, CTX = CONTEXT;
constexpr int RANKS = CLUSTER;                      // blocks in a cluster, its ranks [2]
constexpr int PIECES = C < 4096 ? 1 : 2;            // pieces of 8 columns that a worker owns [1]
constexpr int COLS = 8 * PIECES;                    // columns that a worker owns [8]
constexpr int TEAM = C / COLS;                      // workers that hold one row together: a team [320]
constexpr int TEAMS = ceil_div(MIN_WORKERS, TEAM);  // as many as make MIN_WORKERS [256] or more [1]
constexpr int WORKERS = TEAM * TEAMS;               // threads of a block that compute [320]

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
// swap roles. x_next is not cleared first. It still holds an older x. For each column, one of the threads
// that add to it also subtracts the older x (chapter 8). `swaps` counts the swaps of all launches, and its
// last bit says which buffer is x_now. `plan` says what this block does for the token (chapter 10). mark() is
// a stopwatch and tap() a probe for tests (chapter 20).
__device__ void run(int first_layer, int end_layer, int new_tokens,
                    int token, int position, int end, unsigned swaps) {
  Columns x, xn1, xn2;  // y, norms, carried_now, carried_next: chapters 4, 6, 8
  long long *x_now = buffer(swaps), *x_next = buffer(swaps + 1);

  for (int layer = first_layer; position < end;) {
    // S0. In layer 0, x is the token's row of embed_in. In later layers, wait at (4) until every cluster of
    // the grid has added to x. Then read x.
    read_x(layer, token, x_now, swaps, x);
    if (layer == end_layer && new_tokens == 0) break;  // a launch that makes no token ends here

    // S1. Normalize x, once for both LayerNorms. From here on, x is normalized. Apply the gain and bias of
    // LayerNorm 1, for the heads. The gains and biases are in `norms`, after the last layer those of the
    // final LayerNorm.
    normalize(x);
    affine(x, norms.w1, norms.b1, xn1);

    // S10. After the last layer, compute the logits and choose the next token: (5). This pass adds nothing to
    // x_next, so the buffers do not swap.
    if (layer == L) {
      token = next_token(xn1, position, end);
      position++, layer = 0;
      continue;
    }

    // S9, first part. 1280 threads of the grid, the *carriers*, each add two columns of x and of the biases
    // to x_next, and subtract the older x. This need not wait for y.
    carry_x(layer, token, x_next, swaps);

    // S1. Apply the gain and bias of LayerNorm 2, for the hidden units.
    affine(x, norms.w2, norms.b2, xn2);

    // y sums up what this block adds to this thread's columns of x.
    for (int i = 0; i < COLS; i++) y[i] = 0;
    tap_norms(xn1, xn2); mark(MARK_NORM, layer);

    int done = 0;  // hidden units of this layer that are done; hidden_units() advances it
    for (int head = plan.cluster; head < NH; head += plan.clusters) {  // this cluster's heads: one or none
      // S2. Compute this rank's rows of q, k, v. Send them to all ranks of the cluster.
      qkv_rows(xn1, head); mark(MARK_QKV, layer);

      // S8. Do plan.filler hidden units (16, chapter 10) while q, k and v are on their way. Then wait for q,
      // k and v: (1).
      hidden_units(xn2, done, min(done + plan.filler, plan.units.size));
      wait_for_qkv(); mark(MARK_1, layer);

      // S3, S4. Rotate q and k by the position. Append k and v to the cache.
      rotate_and_append(layer, head, position);

      // S5. Attend to this rank's share of the positions. Send the result to the ranks of the cluster.
      attend(); mark(MARK_ATTEND, layer);

      // S8. Do plan.filler more while the results are on their way. Then wait for all results: (2).
      hidden_units(xn2, done, min(done + plan.filler, plan.units.size));
      wait_for_attention(); mark(MARK_2, layer);

      // S6. Merge the results of all ranks into o. S7. For each of this rank's dimensions d of the head, add
      // o[d] times output row d to y.
      out_rows(head); mark(MARK_OUT, layer);
    }

    // S8. Do the hidden units that are left.
    hidden_units(xn2, done, plan.units.size); mark(MARK_UNITS, layer);

    // S9, second part. Send each column of y to the rank that owns it, and wait for the other ranks' y: (3).
    // S9, third part. Add up the columns that this rank owns, and add the sums to x_next.
    cluster_reduce(); mark(MARK_3, layer);
    add_to_residual(x_next);

    // Start to load the gains and biases of the next layer, which do not depend on x.
    norms = load_norms(layer + 1); mark(MARK_ADDED, layer);

    // Swap the buffers. What the carriers have read from x_now is the old value that they subtract in the
    // next layer (chapter 8).
    long long* const previous = x_now;
    x_now = x_next, x_next = previous, carried_next = carried_now, swaps++, layer++;
  }
  finish(x_next, token, position, swaps);
}

const Model& m;     // what is in global memory: the weights, the cache, x. Chapter 12 lists it
Shared& s;          // what is in the block's shared memory: chapter 12, too
const Plan& plan;   // the block's plan
const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;  // of this worker; lanes: chapter 4

// 4. dot tile and axpy tile ===============================================================================
// The problem. Each of the 320 threads has a part of a dot product, and the parts have to be added up. The
// number of a thread in its warp is its *lane*, and a lane can read a register of another lane by a
// *shuffle*. Five shuffles are enough for a warp: each lane adds the value of the lane at distance 1, then of
// the lane at distance 2, then 4, 8 and 16. Then every lane has the sum of all 32. After that, the 10 warps
// exchange their sums through shared memory, which takes a sync. This is a *reduction*. One for every row
// would take longer than memory needs to deliver the row.
//
// The answer. 8 rows share one reduction: they are a *tile*. Each worker multiplies its columns of all 8 rows
// before the sums are reduced together. With tiles of 2 rows a token takes 2018 us, with 4 or 8 rows 1221 and
// 1223. (A token of pythia-160m takes 87 us with 4 rows, and 82 with 8.) With 16 rows it takes 68 % longer
// than with 8, because only two such tiles fit into shared memory.
//
// A tile arrives in two *half tiles* of 4 rows, each in a *slot* of shared memory. The next chapter explains
// how. Here, the next tile is already there.
static constexpr int WARPS = WORKERS / 32;                // warps of workers [10]
static constexpr int TEAM_LANES = TEAM < 32 ? TEAM : 32;  // threads of a warp that belong to one team [32]
static constexpr int TEAM_WARPS = TEAM / TEAM_LANES;      // warps of a team [10]

static constexpr int TILE_ROWS = ROWS * TEAMS;                      // rows of a tile, ROWS for each team [8]
static constexpr int HALF_TILES = 2;                                // slots that a tile takes
static constexpr int HALF_TILE_ROWS = TILE_ROWS / HALF_TILES;       // [4]
static constexpr int SLOT_BYTES = HALF_TILE_ROWS * C * 2;           // [20480]
static constexpr int TILE_BIASES = ceil_div(TILE_ROWS, 8) * 8 + 8;  // room for a tile's biases [16]

// CUDA's types: half is a number in fp16, half2 is two of them, uint4 is 16 bytes: 8 numbers in fp16. Types
// such as float2 or longlong2 are pairs, with the members x and y.
static __device__ const uint4& as16(const half* p) { return *reinterpret_cast<const uint4*>(p); }
static __device__ float2 widen2(const half* p) { return __half22float2(*reinterpret_cast<const half2*>(p)); }
// 8 numbers from fp16 to fp32. Weights, k and v are fp16, but a block multiplies and adds in fp32.
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

// Waits until all workers of the block, or of a team, are here. CUDA's __syncthreads would also wait for the
// producer, which must not stop. So this is a *named barrier*: a barrier in hardware for a given number of
// threads. A block has 16.
static __device__ void workers_sync() { named_barrier(1, WORKERS); }
static __device__ void team_sync(int team) { named_barrier(TEAMS == 1 ? 1 : 2 + team, TEAM); }

const int team = TEAMS == 1 ? 0 : tid / TEAM, team_thread = TEAMS == 1 ? tid : tid % TEAM;  // [0, tid]
const int team_warp = team_thread / 32;                                                     // [warp]

// Element i of a worker's Columns is column(i) of x. In 2.8b this is column 8 * tid + i.
__device__ int column(int i) const { return (i / 8 * TEAM + team_thread) * 8 + i % 8; }

// This worker's 8 columns of one row of the slot that `cursor` points to, chapter 5 (of piece p: chapter 15).
__device__ uint4 row_piece(int slot_row, int p) const {
  return as16(&s.slots[cursor.slot][slot_row * C + column(8 * p)]);
}

const int my_row = lane % ROWS * TEAMS + team;  // the row of a tile whose result this lane gets [lane % 8]
int flip = 0;                                   // which of two arrays, warp_dots[0] or [1], is next

// DOT TILE
//   math    dot(row r, in) + bias[r], for the n rows of the tile; n < 8 only in the last tile
//   who     every worker multiplies its 8 columns; then lane l of every warp gets the result of row l % 8
//   bytes   n * C * 2 from shared memory, 41 KB for 8 rows
//   syncs   for each half tile: (F) its rows are here, (E) they were read (chapter 5). One (c)
// At (c) every warp waits until all 10 warps have written their sums to warp_dots. One sync is enough,
// because tiles use warp_dots[0] and warp_dots[1] in turn (chapter 13).
//
// If a row is missing, the loop multiplies old bytes in its place, and the result is not used. There is no
// test for each row, so that the GPU can start the loads of all 4 rows before it multiplies.
__device__ float dot_tile(const Columns& in, int n, int skip, bool has_bias) {
  float dots[ROWS] = {}, bias = 0;
  for (int half_tile = 0; half_tile < HALF_TILES; half_tile++) {
    if (half_tile * HALF_TILE_ROWS >= n) break;

    // Wait until the half tile is here. Then multiply. A tile's biases begin with `skip` biases of earlier
    // rows, which workers ignore (copy_rows, chapter 5).
    wait_full();  // (F)
    for (int i = 0; i < ROWS / HALF_TILES; i++) {
      const int r = half_tile * ROWS / HALF_TILES + i;
      for (int p = 0; p < PIECES; p++) dots[r] = dot8(row_piece(i * TEAMS + team, p), in + 8 * p, dots[r]);
    }
    if (half_tile == 0 && has_bias && my_row < n)
      bias = __half2float(s.bias[cursor.slot][skip + my_row]);
    free_slot();  // (E)
  }

  // Add up over the 32 lanes of the warp: lane l gets the sum of row l % 8, in 9 shuffles (chapter 16). Then
  // add up over the warps.
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
// In lane l, `factor` is that of row l % 8, as dot_tile returns it. __shfl_sync(~0u, v, r, n) returns the v
// of lane r of the n lanes of a team; ~0u says that all lanes take part. A missing row gets the factor 0. Its
// old bytes may be NaN, and NaN times 0 is NaN, so the thread reads row 0 of the half tile in its place.
// `#pragma unroll` makes the compiler unroll a loop.
__device__ void axpy_tile(float factor, int n) {
  if (my_row >= n) factor = 0;
#pragma unroll
  for (int half_tile = 0; half_tile < HALF_TILES; half_tile++) {
    if (half_tile * HALF_TILE_ROWS >= n) break;
    wait_full();  // (F)
    for (int i = 0; i < ROWS / HALF_TILES; i++) {
      const int r = half_tile * ROWS / HALF_TILES + i, slot_row = i * TEAMS + team;
      const float of_row = __shfl_sync(~0u, factor, r, TEAM_LANES);
      const int safe_row = half_tile * HALF_TILE_ROWS + slot_row < n ? slot_row : 0;
      for (int p = 0; p < PIECES; p++) axpy8(of_row, row_piece(safe_row, p), y + 8 * p);
    }
    free_slot();  // (E)
  }
}

// 5. The ring =============================================================================================
// The problem. Memory answers a request only after some time. If that is 1 us, then all the bytes that memory
// delivers in 1 us must be in flight at every moment: 35.0 KB for each processor, its share of 4.62 TB/s. If
// workers loaded rows into registers, these bytes would take 28 registers of each worker. And no loads would
// start while workers wait at (4).
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
//   1. An mbarrier goes through phases 0, 1, 2, ... A phase ends when as many arrivals have come as
//      barrier_init has set, and all announced bytes have landed. barrier_arrive is an arrival.
//      barrier_expect is an arrival that also announces the bytes of a copy.
//   2. The *parity* of a phase is its number modulo 2. phase_running(b, parity) is true while the current
//      phase has this parity. So a thread waits until it is false, and flips the parity for its next wait.
//      (Why one bit is enough: chapter 13.)
//   3. A thread that has seen a phase end can read all that was written before the phase's arrivals, and all
//      bytes that were announced.
// Most places call wait(), which repeats phase_running() up to a limit of some seconds. Then the launch ends
// with an error that names the sync, such as SYNC_EMPTY. wait_full() has no limit of its own; chapter 18 says
// how a hang there is reported.
//
// full[slot] needs 1 arrival, the producer's, and the bytes of its copies. empty[slot] needs 10 arrivals, one
// from each warp of workers. Two trips around the ring, for one slot:
//     who        waits for                   then                                        which ends
//     producer   (nothing)                   announces and copies 4 rows                 phase 0 of full
//     workers    full, parity 0 (phase 0)    read the rows; each warp arrives at empty   phase 0 of empty
//     producer   empty, parity 0 (phase 0)   announces and copies 4 later rows           phase 1 of full
//     workers    full, parity 1 (phase 1)    read the rows; each warp arrives at empty   phase 1 of empty
struct Cursor {  // the slot of the ring that a thread uses next
  int slot = 0;
  uint32_t parity = 0;  // 0 in the first trip around the ring, 1 in the second, 0 again
  __device__ void advance() {
    if (++slot == SLOTS) { slot = 0; parity ^= 1; }  // SLOTS [10]
  }
};

Cursor cursor;  // where this worker reads

__device__ void wait_full() const {
  while (phase_running(&s.full[cursor.slot], cursor.parity)) {}  // (F)
}

__device__ void free_slot() {
  __syncwarp();                                          // (E) waits until all lanes of the warp have read
  if (lane == 0) barrier_arrive(&s.empty[cursor.slot]);  // (E)
  cursor.advance();
}

// RULE. A slot has no label. The producer has to copy exactly the tiles that the workers use, in the same
// order, so copy_layers() below has the same loops as Worker::run. With a wrong order, workers multiply wrong
// rows, and the tests, which compare every stage with float64, turn red. With a wrong number of tiles,
// workers multiply wrong rows, too, or the launch ends with an error about (F), (E), (4) or (5).
//
// To add a stage, change Worker::run and its model in numpy, emulator/emulator.py. If the stage reads rows,
// change copy_layers(), too. If some blocks do more of it than others, change make_plan() (chapter 10).
static constexpr int KV_POSITIONS = SLOT_BYTES / (4 * HS);  // cached positions in a slot [64]

struct Producer {  // one thread of each block
  const Model& m;
  Shared& s;
  const uint64_t policy = read_once_policy();  // chapter 19
  Cursor cursor;
  uint32_t token_parity = 0;           // parity of (N): see copy_layers
  unsigned long long earliest_ns = 0;  // no copy may start before this time

  // Waits until the next slot is empty and until it is time for the copy (keep_pace, chapter 17). Then
  // announces the copy's bytes. In the first trip all slots are empty, and phase_running() is false at once:
  // it is asked for parity 1, and phase 0 is running.
  __device__ void claim(uint32_t bytes) {
    wait(m, s, &s.empty[cursor.slot], cursor.parity ^ 1, SYNC_EMPTY);  // (E)
    keep_pace(earliest_ns, bytes);
    barrier_expect(&s.full[cursor.slot], bytes);  // (F)
  }
  __device__ void copy(void* to, const void* from, uint32_t bytes) {
    bulk_copy(to, from, bytes, &s.full[cursor.slot], policy);
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
        copy(s.slots[cursor.slot], matrix + (size_t)(row + i) * C, bytes);
        if (bias_bytes) copy(s.bias[cursor.slot], bias + row - skip, bias_bytes);
        cursor.advance();
      }
    }
  }

  // Copies a tile of up rows, then the down rows of the same units, and so on.
  __device__ void copy_units(const Layer& w, const Plan& plan, int& done, int end) {
    for (; done < end; done += TILE_ROWS) {
      const int unit = plan.units.at(done), n = min(TILE_ROWS, end - done);  // at(): chapter 10
      copy_rows(w.w_up, w.b_up, unit, unit + n);
      copy_rows(w.w_down, nullptr, unit, unit + n);
    }
  }

  // Copies keys and values of 64 cached positions a slot. This step's own k and v are not in the cache yet.
  // S5 takes them from shared memory.
  __device__ void copy_cached(const half* k, const half* v, int first, int end) {
    for (int t = first; t < end; t += KV_POSITIONS) {
      const int bytes = min(KV_POSITIONS, end - t) * HS * 2;
      claim(2 * bytes);
      copy(s.slots[cursor.slot], k + (size_t)t * HS, bytes);
      copy(s.slots[cursor.slot] + KV_POSITIONS * HS, v + (size_t)t * HS, bytes);
      cursor.advance();
    }
  }

  // Copies what the layers of one token need. The producer may be a token ahead of the workers, so it has a
  // plan of its own.
  __device__ void copy_layers(const Plan& plan, int first_layer, int end_layer, bool first_of_launch) {
    for (int layer = first_layer; layer < end_layer; layer++) {
      const Layer& w = m.layers[layer];
      int done = 0;
      for (int head = plan.cluster; head < NH; head += plan.clusters) {
        // this rank's first row of q, k, v, and its first output row (chapter 7)
        const int qkv = head * 3 * HS + plan.rank * QKV_ROWS, out = head * HS + plan.rank * OUT_ROWS;
        copy_rows(w.w_qkv, w.b_qkv, qkv, qkv + QKV_ROWS);                     // S2
        copy_units(w, plan, done, min(done + plan.filler, plan.units.size));  // S8

        // Only copies of keys and values depend on earlier tokens. Before the first of them, wait until the
        // workers have finished the previous token: (N). Blocks without a head copy no keys and need not
        // wait. At (5) the previous token's k and v of all blocks became visible (release and acquire,
        // chapter 8), and order_copies() makes them visible to the copies, too.
        if (!first_of_launch && layer == 0 && head == plan.cluster) {
          wait(m, s, &s.token_ready, token_parity, SYNC_TOKEN);           // (N)
          token_parity ^= 1;
          order_copies();                                                 // chapter 19
        }
        copy_cached(cache_row(m, layer, 0, head, 0), cache_row(m, layer, 1, head, 0),
                    plan.first_cached, plan.end_cached);                      // S5
        copy_units(w, plan, done, min(done + plan.filler, plan.units.size));  // S8
        copy_rows(w.w_out, nullptr, out, out + OUT_ROWS);                     // S7
      }
      copy_units(w, plan, done, plan.units.size);                             // S8
    }
  }

  __device__ void copy_all(int first_layer, int end_layer, int first_position, int end_position,
                           bool with_lm_head) {
    for (int position = first_position; position < end_position; position++) {
      const Plan plan = make_plan(blockIdx.x, gridDim.x, position);
      copy_layers(plan, first_layer, end_layer, position == first_position);
      if (with_lm_head)
        for (int i = 0; i < s.lm_rows.size; i += TILE_ROWS) {
          const int row = s.lm_rows.at(i);
          copy_rows(m.embed_out, nullptr, row, row + min(TILE_ROWS, s.lm_rows.size - i));
        }
    }
    wait(m, s, &s.workers_done, 0, SYNC_FULL);  // stays until all workers are done: chapter 18
  }
};

// 6. LayerNorm and hidden units ===========================================================================

// A worker's columns of the gains and biases of two LayerNorms.
struct Norms { uint4 w1[PIECES], b1[PIECES], w2[PIECES], b2[PIECES]; };
Norms norms;

// Starts to load this thread's columns of a layer's gains and biases. Layer L stands for the final LayerNorm.
// load16 is a load that the compiler cannot delay.
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
//   syncs   (b) makes every warp wait for warp_stats of all warps. Before warp_stats is written again, there
//           is always another sync of the block
// Each thread takes the mean of its 8 values, and `squares`, the sum of squared distances from this mean.
// Then lanes and warps are merged. Chapter 16 has the formulas, and says why.
static constexpr float LN_EPS = 1e-5f;

__device__ void normalize(Columns& x) const {
  float mean = 0, squares = 0, n = COLS;
  for (int i = 0; i < COLS; i++) mean += x[i];
  mean /= n;
  for (int i = 0; i < COLS; i++) squares += (x[i] - mean) * (x[i] - mean);

  // Merge with the lane at distance 1, then 2, 4, 8 and 16. __shfl_xor_sync(~0u, v, n) returns the v of the
  // lane at distance n.
  for (int apart = 1; apart < TEAM_LANES; apart *= 2) {
    const float other = __shfl_xor_sync(~0u, mean, apart);
    squares += __shfl_xor_sync(~0u, squares, apart) + (other - mean) * (other - mean) * (0.5f * n);
    mean = 0.5f * (mean + other);
    n *= 2;
  }

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
//   who     each block, for its own units
//   bytes   4 * C for a unit, 10 KB
//   syncs   (F) (E) for each half tile; (c) for each tile of up rows
// gelu(u) = u / 2 * (1 + erf(u / sqrt 2)). Pythia's config.json asks for this exact form. Other models use
// tanh instead, which differs by up to 5e-4.
__device__ void hidden_units(const Columns& xn2, int& done, int end) {
  for (; done < end; done += TILE_ROWS) {
    const int unit = plan.units.at(done), n = min(TILE_ROWS, end - done);
    const float u = dot_tile(xn2, n, unit % 8, true);
    const float h = 0.5f * u * (1 + erff(u * 0.70710678f));
    if (my_row < n) tap(TAP_H + unit + my_row, h);
    axpy_tile(h, n);
  }
}

// 7. A head on a cluster ==================================================================================
// The problem. The two blocks of a cluster share a head. Each computes 120 of the 240 rows of q, k and v, but
// both need all of q for attention. Each attends to half of the positions, but o needs both halves. At the
// end each has a y, and x needs the sum. So the cluster exchanges data three times in a layer.
//
// The answer. A *push* is a store into the shared memory of another block of the cluster, a *peer*. The
// sender goes on at once. When the data lands, the hardware counts its bytes on an mbarrier of the peer, and
// the peer waits on that. The array that a push goes to is an *inbox*. A rank pushes to its own inboxes, too,
// so that all parts are handled alike.
//
// In a *ClusterGather* every rank gets all parts. In a *ClusterReduce* each rank gets all parts of what it
// owns, and adds them up (ClusterFusion, arXiv 2508.18850).
//
//     sync  inbox            what each rank pushes                   to which rank
//     (1)   qkv              its 120 rows of q, k, v                 all ranks: a ClusterGather
//     (2)   rank_o           o of its positions, in parts            owner of the dimension: a ClusterReduce
//           rank_peak_denom  peak and denom of its positions (S5)    all ranks
//     (3)   sums             its y, in parts                         owner of the column: a ClusterReduce
//
// When may a rank push into an inbox again? When the receiver has read the inbox. The sender needs no extra
// signal to know this: it waits for a later message of the receiver anyway (a push, or an addition to x), and
// the receiver sends that message only after reading. Chapter 13 has this message for each inbox.
//
// in_rank(place, r) is the address of `place` in the shared memory of rank r. push stores one float there,
// push4 four.

static constexpr int QKV_ROWS = 3 * HS / RANKS;  // rows of a head's q, k, v that one rank computes [120]
static constexpr int OUT_ROWS = HS / RANKS;      // output rows, and dimensions of o, that one rank has [40]
static constexpr int OWN = C / RANKS;            // columns of the cluster's y that one rank adds up [1280]

// CLUSTERGATHER of the 8 results of a dot tile. Every warp has them all, so warp 0 alone pushes: its lanes 0
// to 7 push to rank 0, lanes 8 to 15 to rank 1.
__device__ void cluster_gather(float* to, float value, bool valid, uint64_t* ready) const {
  if (!valid || team_warp > 0) return;
  for (int r = lane % TEAM_LANES / ROWS; r < RANKS; r += TEAM_LANES / ROWS)
    push(in_rank(to, r), value, in_rank(ready, r));  // (1)
}

// S2 QKV
//   math    q, k, v of a head = its 3*HS rows times xn1, plus biases
//   who     rank r computes QKV_ROWS rows, from row r * QKV_ROWS on
//   bytes   3 * HS * C * 2 / RANKS, 614 KB
//   syncs   (F) (E) for each half tile; (c) for each tile; (1) later, after some hidden units
__device__ void qkv_rows(const Columns& xn1, int head) {
  // Expect q, k and v from all ranks: 960 bytes. Some may land before this call. That is safe, because the
  // phase cannot end without the arrival made here.
  if (tid == 0) barrier_expect(&s.qkv_ready, sizeof(s.qkv));  // (1)

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
//   math    (x1, x2) <- (x1 cos - x2 sin, x2 cos + x1 sin), dimensions i and i + ROT/2 of q and k, i < ROT/2
//   who     one thread for each of the 3*HS values, in every rank; the last rank writes k and v to the cache
//   bytes   4 * HS to the cache
//   syncs   (d) makes all warps wait until q is rotated and k and v are stored. After (d), nothing reads qkv
// Every rank rotates for itself, because results from another rank would need one more sync. S5 uses k and v
// rounded to fp16, as they are in the cache, so this step sees the same k and v as all later steps.
__device__ void rotate_and_append(int layer, int head, int position) const {
  for (int i = tid; i < 3 * HS; i += WORKERS) {
    const int kind = i / HS, d = i % HS;  // q, k or v; the dimension
    const float* vector = s.qkv + kind * HS;
    float value = vector[d];

    // Rotate the first ROT dimensions of q and k. The partner of dimension d is half of ROT away.
    if (kind < 2 && d < ROT) {
      const int angle = d % (ROT / 2);
      const float other = d < ROT / 2 ? -vector[(d + ROT / 2) % ROT] : vector[(d + ROT / 2) % ROT];
      value = fmaf(value, s.rope_cos[angle], other * s.rope_sin[angle]);
    }

    // Keep q in fp32, scaled for the softmax. Round k and v to fp16, and append them to the cache.
    if (kind == 0) {
      s.q[d] = value * (rsqrtf((float)HS) * 1.44269504f);  // log2(e), see S5
      tap(TAP_Q + head * HS + d, value);
    } else {
      (kind == 1 ? s.k_now : s.v_now)[d] = __float2half_rn(value);
      if (plan.rank == RANKS - 1)
        cache_row(m, layer, kind - 1, head, position)[d] = __float2half_rn(value);
      tap((kind == 1 ? TAP_K : TAP_V) + head * HS + d, value);
    }
  }
  workers_sync();  // (d)
}

// S5 ATTEND. The softmax takes positions a few at a time ("online softmax") and works with powers of 2:
//   1. A set of positions with scores score_t has three results: peak = max score_t, denom = the sum of
//      2^(score_t - peak), and o = the sum of 2^(score_t - peak) * v_t, here still undivided. The attention
//      of the set is o / denom. S6 divides.
//   2. To merge two sets, take the larger peak. Multiply each set's denom and o by 2^(its peak - larger
//      peak), which shrinks them to this peak. Then add both denoms and both o. attend() merges the results
//      of lanes, push_attention() those of warps, S6 those of ranks.
//   3. The GPU computes 2^x in one instruction, but not e^x. So S3 has multiplied q by log2(e).
//
//   math    score_t = dot(q, k_t); then peak, denom and o of this rank's positions
//   who     rank r: cached positions first_cached .. end_cached - 1. This step's own position goes to the
//           last rank, which never has more cached positions than the others. In a warp, 16 lanes share a
//           position: 10 of them have 8 of the 80 dimensions each, and 6 have none
//   bytes   4 * HS * T / RANKS, 20 KB; with T = 2047, 328 KB, which takes 9.4 us
//   syncs   (F) (E) for each slot; (e) makes push_attention wait for the results of all warps; (2) later
static constexpr int POSITION_LANES = HS <= 32 ? 4 : HS <= 64 ? 8 : HS <= 128 ? 16 : 32;  // [16]
static constexpr int WARP_POSITIONS = 32 / POSITION_LANES;  // positions that a warp takes at once [2]

__device__ void attend() {
  if (tid == 0) barrier_expect(&s.attention_ready, sizeof(s.rank_o) + sizeof(s.rank_peak_denom));  // (2)

  // This lane has dimensions d .. d + 7. In a slot it takes position 2 * warp + in_warp, then every 20th.
  const int d = lane % POSITION_LANES * 8, in_warp = lane / POSITION_LANES;
  const bool has_d = d < HS;
  float q[8], o[8] = {}, peak = -1e30f, denom = 0;  // results of the empty set
  for (int i = 0; i < 8; i++) q[i] = has_d ? s.q[d + i] : 0.f;

  // The last warp of the last rank starts with this step's own position.
  if (plan.rank == RANKS - 1 && warp == WARPS - 1) {
    float score = has_d ? dot8(as16(s.k_now + d), q, 0) : 0.f;
    for (int apart = 1; apart < POSITION_LANES; apart *= 2) score += __shfl_xor_sync(~0u, score, apart);
    if (in_warp == 0) {
      peak = score; denom = 1;
      if (has_d) widen(as16(s.v_now + d), o);
    }
  }

  constexpr int STRIDE = WARPS * WARP_POSITIONS, BATCH = ceil_div(KV_POSITIONS, STRIDE);  // [20, 4]
  for (int t0 = plan.first_cached; t0 < plan.end_cached; t0 += KV_POSITIONS) {
    const int n = min(KV_POSITIONS, plan.end_cached - t0);
    wait_full();  // (F)
    const half *k = s.slots[cursor.slot] + d, *v = k + KV_POSITIONS * HS;
    const int base = warp * WARP_POSITIONS + in_warp;

    // Compute the scores of up to 4 positions, and the peak with them, in two loops: the first has only
    // loads and products, the second the shuffles. In one loop, each load would wait for the shuffles of the
    // position before. With T = 2000 this would cost 2.1 %.
    float score[BATCH], higher = peak;
    for (int u = 0; u < BATCH; u++) {
      const int at = base + u * STRIDE;
      score[u] = at < n && has_d ? dot8(as16(k + at * HS), q, 0) : 0.f;
    }
    for (int u = 0; u < BATCH; u++) {
      for (int apart = 1; apart < POSITION_LANES; apart *= 2)
        score[u] += __shfl_xor_sync(~0u, score[u], apart);
      if (base + u * STRIDE < n) higher = fmaxf(higher, score[u]);
    }

    // Merge: shrink the results so far to the new peak, and add these positions.
    const float shrink = exp2f(peak - higher);
    peak = higher; denom *= shrink;
    for (int i = 0; i < 8; i++) o[i] *= shrink;
    for (int u = 0; u < BATCH; u++) {
      const int at = base + u * STRIDE;
      if (at < n) {  // later positions hold old bytes, perhaps NaN
        const float p = exp2f(score[u] - peak);
        denom += p;
        if (has_d) axpy8(p, as16(v + at * HS), o);
      }
    }
    free_slot();  // (E)
  }

  // Merge the two groups of 16 lanes, which hold the same dimensions of different positions.
  for (int apart = POSITION_LANES; apart < 32; apart *= 2) {
    const float higher = fmaxf(peak, __shfl_xor_sync(~0u, peak, apart)), shrink = exp2f(peak - higher);
    peak = higher;
    denom *= shrink; denom += __shfl_xor_sync(~0u, denom, apart);
    for (int i = 0; i < 8; i++) { o[i] *= shrink; o[i] += __shfl_xor_sync(~0u, o[i], apart); }
  }

  // Now lanes 0 to 15 have the warp's results. Leave them in shared memory.
  if (in_warp == 0 && has_d)
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
  push(in_rank(&s.rank_o[plan.rank][tid % OUT_ROWS], owner), o, in_rank(&s.attention_ready, owner));  // (2)
  if (tid < RANKS) {
    push(in_rank(&s.rank_peak_denom[plan.rank][0], tid), peak, in_rank(&s.attention_ready, tid));   // (2)
    push(in_rank(&s.rank_peak_denom[plan.rank][1], tid), denom, in_rank(&s.attention_ready, tid));  // (2)
  }
}

__device__ void wait_for_attention() {
  wait(m, s, &s.attention_ready, head_parity, SYNC_ATTENTION);  // (2)
  head_parity ^= 1;
}

// S6 MERGE, S7 OUT ROWS. The second half of the CLUSTERREDUCE of o, and output rows
//   math    o = sum_r 2^(peak_r - peak) o_r / sum_r 2^(peak_r - peak) denom_r; then y += o[d] * output row d
//   who     rank r: OUT_ROWS dimensions, from r * OUT_ROWS on. Every warp merges all of them
//   bytes   HS * C * 2 / RANKS, 205 KB
//   syncs   (F) (E) for each half tile
__device__ void out_rows(int head) {
  // How much each rank's results shrink, and the common denominator.
  float peak = s.rank_peak_denom[0][0], shrink[RANKS], denom = 0;
  for (int r = 1; r < RANKS; r++) peak = fmaxf(peak, s.rank_peak_denom[r][0]);
  for (int r = 0; r < RANKS; r++) {
    shrink[r] = exp2f(s.rank_peak_denom[r][0] - peak);
    denom = fmaf(shrink[r], s.rank_peak_denom[r][1], denom);
  }

  // For each tile, merge o for this lane's row. Then add all rows of the tile, each times its o, to y.
  for (int i = 0; i < OUT_ROWS; i += TILE_ROWS) {
    const int n = min(TILE_ROWS, OUT_ROWS - i);
    float o = 0;
    if (my_row < n) {
      for (int r = 0; r < RANKS; r++) o = fmaf(shrink[r], s.rank_o[r][i + my_row], o);
      o /= denom;
      tap(TAP_O + head * HS + plan.rank * OUT_ROWS + i + my_row, o);
    }
    axpy_tile(o, n);
  }
}

// S9 SUM, second part: CLUSTERREDUCE of y
//   math    sums[r][c] = y of rank r, for the columns c that this rank owns
//   who     every thread pushes its 8 columns to the rank that owns them
//   bytes   4 * C, 10 KB, to the shared memories of the cluster
//   syncs   (3)
// Why does the cluster add up first? L2 carries out additions (chapter 8) to one column one after another, so
// fewer additions are faster. Without this adding-up a token takes 2.9 % longer.
__device__ void cluster_reduce() {
  if (tid == 0) barrier_expect(&s.sums_ready, sizeof(s.sums));  // (3)
  for (int p = 0; p < PIECES; p++) {
    const int c = column(8 * p), owner = c / OWN;
    const uint32_t to = in_rank(&s.sums[plan.rank * TEAMS + team][c % OWN], owner),
                   ready = in_rank(&s.sums_ready, owner);
    for (int i = 0; i < 8; i += 4) push4(to + 4 * i, y + 8 * p + i, ready);  // (3)
  }
  wait(m, s, &s.sums_ready, sums_parity, SYNC_SUMS);  // (3)
  sums_parity ^= 1;
}

// 8. x between layers =====================================================================================
// The problem. 66 clusters add their sums to x, and then all 132 blocks read x. The usual way is to clear a
// buffer, add floating-point numbers to it, and count finished blocks in a separate counter. This costs three
// things:
//   - The last bits of a floating-point sum depend on the order of additions, which changes from run to run.
//   - A block may increment the counter only after its additions have arrived, and this takes about 1 us.
//   - The buffer has to be cleared, and all blocks have to wait for that.
//
// The answer to all three is a 64-bit *word* for each column of x, which holds a value and a count:
//
//     bits 63 .. 9    the value, an integer multiple of 2^-22. Sums of integers do not depend on the order
//     bits 8 .. 0     the count of additions to this word
//
// L2 can add: a thread sends it an address and a number, and goes on. The addition is *atomic*: it changes
// value and count in one step. When the count shows that every cluster and the carrier (below) have added,
// the word is *complete*. A reader that finds another count reads again. With a separate counter, a token
// takes 1233 us instead of 1203.
//
// addend(v) is what to add to a word so that its value grows by v and its count by 1. value_of is a word's
// value. lacking is 0 if two words have the wanted count. x has to stay below 65536 in magnitude (chapter
// 16).
//
// Three kinds of access are used between blocks:
//   relaxed   the access is atomic, in L2. It says nothing about other data
//   release   an addition that comes last. All that its thread wrote earlier is visible before it. So is all
//             that the other threads of the block wrote before the last sync of the block
//   acquire   a load. If it finds the result of a release, its thread then sees all those earlier writes, too
// At (4) relaxed is enough, because the data is its own flag. At (5) the flag is a counter, separate from the
// data, so (5) needs a release and an acquire.

// There are two buffers, which alternate:
//
//     layer    blocks read x from    blocks add to    which still holds    so the carriers subtract
//     l        buffer 0              buffer 1         x of layer l - 1     carried_next, read in layer l - 1
//     l + 1    buffer 1              buffer 0         x of layer l         carried_next, read in layer l
//
// If l + 1 is the last layer, L - 1, the next token follows. The pass that chooses it does not swap:
//     pass L   buffer 0              none
//     0        none: embed_in        buffer 1         x of layer L - 1     carried_next, read in layer L - 1
//     1        buffer 1              buffer 0         x of pass L          carried_next, read in pass L
//
// No buffer is cleared between layers. The carrier of a column adds x - old, where old is the value that the
// buffer still holds. The old value cancels, in whatever order the additions arrive. For example, the buffer
// holds 5, x is 8, and two clusters add 1 and 2: 5 + (8 - 5) + 1 + 2 = 11.
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
//   1. In layer l, the slow block reads buffer 0. Then it adds to buffer 1, the columns of its rank.
//   2. The fast block waits until every column of buffer 1 is complete, also those of the slow block. This is
//      (4) of layer l + 1.
//   3. Only then does the fast block add to buffer 0.

// The x that is read after `swaps` swaps has a count that began at this number. A buffer gets a new x at
// every second swap, and the counts of its x begin at 0, LAP, 0, LAP ...
static __device__ int first_count(unsigned swaps) { return swaps / 2 % 2 * LAP; }

__device__ long long* buffer(unsigned swaps) const { return m.residual + swaps % 2 * C; }

// S9 SUM, first part: the carrier's
//   math    x_next += x + b_out + b_down - old
//   who     a thread for each pair of columns, in the last blocks of the grid, 128 to 131, which have no head
//   bytes   8 * C for the whole grid, 20 KB to L2
//   syncs   none
// carried_now holds this thread's two words of x_now, and carried_next those of x_next, as they were when
// that buffer was last read. (In a launch's first layer, those of x_next are 0.) Subtracting this whole old
// word cancels its value and its count. Differences are unsigned, because signed overflow is undefined in
// C++.
__device__ void carry_x(int layer, int token, long long* x_next, unsigned swaps) const {
  const int c = 2 * my_pair;
  if (c >= C) return;
  const Layer& w = m.layers[layer];
  const int start = first_count(swaps + 1);
  const float2 out = widen2(w.b_out + c), down = widen2(w.b_down + c),
               both = layer == 0 ? widen2(embedding(token) + c)
                                 : make_float2(value_of(carried_now.x), value_of(carried_now.y));
  add_relaxed(x_next + c, addend(both.x + out.x + down.x) + start - (unsigned long long)carried_next.x);
  add_relaxed(x_next + c + 1, addend(both.y + out.y + down.y) + start - (unsigned long long)carried_next.y);
}

// The pair of columns that a thread carries, counted from the grid's last block on.
static __device__ int carried_pair() { return (gridDim.x - 1 - blockIdx.x) * WORKERS + threadIdx.x; }
const int my_pair = carried_pair();
longlong2 carried_now, carried_next;  // if this thread is a carrier

// Sets carried_now and carried_next for a launch's first layer. thread_main (chapter 10) has loaded the words
// of x_now. The words of x_next are 0 (chapter 13). Also starts to load the gains and biases.
__device__ void begin(int first_layer, const longlong2& carried_words) {
  carried_now = carried_words;
  carried_next = {0, 0};
  norms = load_norms(first_layer);
}

// Ends a launch: clears x_next for the next launch, and writes State (chapter 12). Chapter 13 says why no
// block still reads them.
__device__ void finish(long long* x_next, int token, int position, unsigned swaps) const {
  if (lane == 0) barrier_arrive(&s.workers_done);  // chapter 18
  if (2 * my_pair < C) x_next[2 * my_pair] = x_next[2 * my_pair + 1] = 0;
  if (blockIdx.x == 0 && tid == 0) {
    State& state = *m.state;
    state.token = token, state.position = position, state.swaps = swaps, state.vote_number = s.vote_number;
  }
}

// S9 SUM, third part
//   math    x_next += sum_r sums[r], in the order of ranks
//   who     rank r adds the OWN columns from r * OWN on; thread i takes every 320th of them, from the i-th on
//   bytes   8 * C for a cluster, 20 KB to L2
//   syncs   none; cluster_reduce has passed (3)
__device__ void add_to_residual(long long* x_next) const {
  for (int c = tid; c < OWN; c += WORKERS) {
    float sum = 0;
#pragma unroll 8
    for (int from = 0; from < RANKS * TEAMS; from++) sum += s.sums[from][c];
    add_relaxed(x_next + plan.rank * OWN + c, addend(sum));
  }
}

// S0 READ X
//   math    x = the values of all words, once they are complete; in layer 0, a row of embed_in
//   who     each thread reads 4 pairs of columns and puts them into shared memory. Then it takes its own 8
//   bytes   8 * C, 20 KB from L2
//   syncs   (4) in two parts: thread 0 waits for one pair, and (g) makes the block wait for thread 0. Then
//           each thread waits for the 4 pairs that it reads. (a) waits until all are in shared memory
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

// To read again and again is to *poll*. If all threads polled, they would slow down the additions that they
// wait for: a token would take 5 % longer. So thread 0 polls alone, and only one pair: the last of its rank's
// columns. Clusters add this pair last. After 3 s, PATIENCE, it gives up (chapter 18). clock64() is the clock
// of its processor.
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

  // Keep the words that this thread carries. Put all values into shared memory.
  for (int i = 0; i < PAIRS; i++) {
    const int pair = tid + i * WORKERS;
    if (pair == my_pair) carried_now = words[i];
    if (pair < C / 2)
      *reinterpret_cast<float2*>(&s.x[2 * pair]) = make_float2(value_of(words[i].x), value_of(words[i].y));
  }
  workers_sync();  // (a)
  for (int i = 0; i < COLS; i++) x[i] = s.x[column(i)];
}

// If the largest logit is not finite, the token is -1, and the host ends the text there. The rest of the
// launch reads row 0 in its place.
__device__ const half* embedding(int token) const {
  return m.embed_in + (size_t)min(max(token, 0), V - 1) * C;
}
__device__ void read_embedding(int token, Columns& x) const {
  for (int p = 0; p < PIECES; p++) widen(load16(embedding(token) + column(8 * p)), x + 8 * p);
}

// 9. The LM head, and the next token ======================================================================
// The problem. A block multiplies 381 or 382 of the 50304 rows of the LM head by the final LayerNorm of x.
// Each row gives the *logit* of one token of the vocabulary. From them, all blocks have to choose the same
// next token. At temperature 0 this is the token with the largest logit. At other temperatures it is drawn at
// random, with the probabilities p = softmax(logits / temperature). Taken literally, this needs a sum over
// all logits, and then a search along the sums, but the logits are spread over 132 blocks.
//
// The answer. A draw is an argmax. Give each token i an alarm clock, which goes off after the time
//     delay_i * exp(-logit_i / temperature)
// where delay_i is a random number, exponentially distributed with mean 1, and independent of the others.
// Then clock i is the first to go off with exactly the probability p_i. So the draw is the clock with the
// smallest time, or the largest -log(time). Multiplied by the temperature, -log(time) is
//     noisy_i = logit_i - temperature * log(delay_i)
// So a draw is the argmax of these *noisy logits* (the Gumbel-max trick). At temperature 0 the noise is 0.
//
// delay_i comes from Philox, a function that scrambles (seed, position, token) into random bits and keeps no
// state (chapter 16). So the noise depends neither on the size of the grid nor on the number of tokens that a
// launch makes, and Sampler in model.py computes the same noise.
//
// At (5) the grid *votes*: each block contributes the largest noisy logit of its rows, and all blocks get the
// largest of all. Its token is the *candidate*. *top-k* and *top-p* may refuse the candidate, and then the
// grid votes again (chapter 14). Without them, the candidate is the next token.
//
// pack(logit, token) makes one integer of a logit and the id of its token. A larger logit gives a larger
// integer, so a maximum of such integers is an argmax. token_of and logit_of unpack them (chapter 16).

// Computes the logits, chooses the next token, and returns it.
__device__ int next_token(const Columns& xn, int position, int end) {
  // Prepare plan and angles of the next token. After (a) in read_x, nothing uses the old ones. Every thread
  // sees the new ones after (f) of vote().
  if (position + 1 < end) prepare(position + 1);

  lm_head(xn, position + 1);
  norms = load_norms(0);
  const int token = choose();                                             // (5); (6): chapter 14

  // After (5), the cache holds k and v of this position. Let the producer copy cached positions again. The
  // host reads the history, and drops what comes after an end of text.
  if (tid == 0) barrier_arrive(&s.token_ready);                           // (N)
  if (blockIdx.x == 0 && tid == 0) m.history[position] = token;
  return token;
}

// The next token: of all tokens that top-k and top-p keep, the one with the largest noisy logit; -1 if the
// largest logit is not finite. `bound` is the packed logit of the last refused candidate, and 0 in the first
// vote. All tokens that are less likely than a refused candidate are refused with it.
__device__ int choose() {
  unsigned long long bound = 0, whole = 0;
  float largest = 0;
  while (true) {
    // Vote for a candidate. The vote leaves the largest packed logit in grid_result.x, and the candidate's
    // packed noisy logit in .y.
    vote(bound);
    const int candidate = token_of(s.grid_result.y);
    if (bound == 0) largest = logit_of(s.grid_result.x);
    if (!(fabsf(largest) <= 3.4028235e38f)) return -1;

    // Without top-k and top-p, vote() has not set candidate_logit. Then is_kept (chapter 14) returns true and
    // does not use `bound`.
    bound = pack(s.candidate_logit, candidate);
    if (is_kept(bound, largest, whole)) return candidate;
  }
}

// Which logits does a thread hold for the vote? Every warp has all 8 results of a dot tile, but one thread is
// enough to hold a result. So the 320 threads form 40 GROUPS of 8 lanes, and group g holds the results of the
// block's tiles g, g + 40, and in a smaller grid g + 80. held_token(k) is the id of the token whose logit
// this thread has in logits[k], or V for none. For example, thread 9 of block 0 is lane 1 of group 1. So it
// holds row 1 of the block's tiles 1 and 41. These begin at rows 1056 and 43296 of the LM head (chapter 10),
// so its tokens are 1057 and 43297. For logits[2] it has V.
static constexpr int GROUPS = TEAM / ROWS;
static constexpr int HELD = ceil_div(V, MIN_BLOCKS * WORKERS);  // MIN_BLOCKS: the smallest grid [3]
float logits[HELD], noise[HELD];

__device__ int held_token(int k) const {
  const int i = (k * GROUPS + team_thread / ROWS) * TILE_ROWS;
  return i + my_row < s.lm_rows.size ? s.lm_rows.at(i) + my_row : V;
}

// S10 LM HEAD
//   math    logits = rows times the final LayerNorm of x; noise = -temperature * log(delay)
//   who     each block, for the rows in s.lm_rows; one thread holds the logit of a row
//   bytes   2 * V * C / 132, 1.95 MB, 56 us
//   syncs   (F) (E) for each half tile; (c) for each tile. read_x has passed (4)
// While threads make noise, they free no slot, so the producer can fill only slots that are empty. In the
// middle of the loop most slots are empty, because workers are faster than memory here. So the noise is made
// there, and memory does not stop. Logits also go to global memory, for vote() and for tests.
__device__ void lm_head(const Columns& in, int next_position) {
  const int size = s.lm_rows.size;
  for (int k = 0; k < HELD; k++) noise[k] = 0;
  for (int i = 0; i < size; i += TILE_ROWS) {
    const float logit = dot_tile(in, min(TILE_ROWS, size - i), 0, false);
#pragma unroll
    for (int k = 0; k < HELD; k++)
      if (i == (k * GROUPS + team_thread / ROWS) * TILE_ROWS) logits[k] = logit;
    if (i == size / 2 / TILE_ROWS * TILE_ROWS && s.settings.temperature > 0)
#pragma unroll
      for (int k = 0; k < HELD; k++)
        if (held_token(k) < V)
          noise[k] = -s.settings.temperature * log_delay(s.settings.seed, next_position, held_token(k));
  }
#pragma unroll
  for (int k = 0; k < HELD; k++)
    if (held_token(k) < V) m.logits[held_token(k)] = logits[k];
}

// (5) VOTE
//   math    s.grid_result = {largest packed logit, largest packed noisy logit}, over the tokens whose packed
//           logit is above `bound`. With top-k or top-p, also s.candidate_logit, the candidate's logit
//   who     maxima are taken in each thread, in each warp, in the block by thread 0, and in the grid by L2
//   syncs   (f) thread 0 waits for all warps; (5); (g) all threads wait for thread 0
// A maximum does not count how many blocks have contributed to it, so a separate counter does. Thread 0 gives
// the block's maxima to the grid, then adds 1 to the counter with a release. A thread whose acquire finds
// this 1 also sees the maxima, and what the block wrote before (f): its logits, and k and v of this step.
// Vote n, counted from 0, is complete when the counter has reached (n + 1) * blocks. The sign of the
// difference tells this, even after an overflow.
//
// The maxima have to be 0 before a vote. Vote n uses maxima[n % 3], and block 0 clears those of vote n + 1
// before it arrives at vote n (chapter 13).
__device__ void vote(unsigned long long bound) {
  if (blockIdx.x == 0 && tid == 0) m.state->maxima[(s.vote_number + 1) % 3] = {0, 0};

  unsigned long long best = 0, drawn = 0;
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int token = held_token(k);
    const unsigned long long packed = token < V ? pack(logits[k], token) : 0;
    if (packed <= bound) continue;
    best = max(best, packed);
    drawn = max(drawn, pack(logits[k] + noise[k], token));
  }
  best = warp_max(best), drawn = warp_max(drawn);
  if (lane == 0) s.warp_result[warp] = {best, drawn};
  workers_sync();  // (f)
  if (tid == 0) {
    for (int from = 1; from < WARPS; from++)
      best = max(best, s.warp_result[from].x), drawn = max(drawn, s.warp_result[from].y);

    // Give the block's maxima to the grid, and wait until all blocks have done so.
    State& state = *m.state;
    Maxima& maxima = state.maxima[s.vote_number % 3];
    atomicMax(&maxima.best, best), atomicMax(&maxima.drawn, drawn);
    const unsigned target = ++s.vote_number * gridDim.x;
    arrive_release(&state.voted);  // (5)
    const long long start = clock64();
    for (unsigned seen; (int)((seen = load_acquire(&state.voted)) - target) < 0;)  // (5)
      if (clock64() - start > PATIENCE) give_up(m.failure, SYNC_VOTE, s.layer, target - seen);

    const longlong2 pair = load_relaxed((const long long*)&maxima);
    s.grid_result = {(unsigned long long)pair.x, (unsigned long long)pair.y};
    const bool cut = s.settings.top_k < V || s.settings.top_p < 1;
    if (cut) s.candidate_logit = load_relaxed(m.logits + token_of(pair.y));
  }
  workers_sync();  // (g)
}

// 10. The division of work, and the kernel ================================================================
// The problem. All blocks wait for the slowest one at (4), so all blocks should read the same number of
// bytes. Say that a head costs each block of its cluster as many bytes as `cost` hidden units, of 4 * C bytes
// each. `busy` blocks have a head, and take `few` units. The others take `many` units:
//     cost + few = many                              all blocks read the same number of bytes
//     busy * few + (blocks - busy) * many = MLP      all units are dealt out
// In 2.8b, cost is 83: 80 for the 160 rows of a head, and 3 for keys and values. (They have the bytes of 2
// units, which count 1.5 times: chapter 15.) busy is 64, blocks is 132. The solution is few = 34.8 and many =
// 117.8.
//
// Which units does a block get? Memory is faster when all blocks read near one another. So tiles are dealt
// out like cards, one to each block in turn, as long as there is one for every block. The rows that remain
// are split into one short stretch for each block. For example, the 50304 rows of the LM head for 132 blocks,
// with 47 tiles for each:
//
//     rows    0..7   8..15   ...   1048..1055 | 1056..1063   ...  | 49632..49636   49637..49641   ...
//     block   0      1       ...   131        | 0            ...  | 0              1              ...
//             the first tile of each block    | 2nd to 47th tile  | short stretches of 5 or 6 rows
//
// Hidden units are dealt out in the same way, first `few` for each block with a head, then `many` for each of
// the others. This makes a token 0.6 % faster than one long stretch for each block, and a token of
// pythia-1.4b 2 %.
struct Portion {  // the hidden units, or rows of the LM head, that one block gets
  int size, tiled;              // how many, and how many of them in tiles
  int first_tiled, first_rest;  // the first one of its first tile, the first one of its stretch
  int blocks;                   // among which the tiles were dealt out
  __device__ int at(int i) const {  // the block's i-th; i is a multiple of TILE_ROWS
    return i < tiled ? first_tiled + i * blocks : first_rest + i - tiled;
  }
};

struct Plan {  // what one block does for one token
  int rank, cluster, clusters;
  Portion units;                 // its hidden units, in every layer
  int filler;                    // how many it does before it waits at (1), and again before (2)
  int first_cached, end_cached;  // its cached positions, for every head: first_cached .. end_cached - 1
};

static constexpr int KV_COST = 3;  // chapter 15
static_assert(64ll * (8ll * HS * C + 2ll * KV_COST * HS * CTX + ATTENTION_BYTES) < 1ll << 31,
              "make_plan counts in 32 bits");

// Deals n rows, from `first` on, to `blocks` blocks, and returns what block `index` gets.
static __device__ Portion deal(int first, int n, int index, int blocks) {
  const int tiled = n / blocks / TILE_ROWS * TILE_ROWS, rest = n - tiled * blocks;
  const int begin = rest * index / blocks, end = rest * (index + 1) / blocks;
  return {tiled + end - begin, tiled, first + index * TILE_ROWS, first + tiled * blocks + begin, blocks};
}

static __device__ __noinline__ Plan make_plan(int block, int blocks, int position) {
  Plan plan;
  plan.rank = block % RANKS; plan.cluster = block / RANKS; plan.clusters = blocks / RANKS;
  const int heads = NH / plan.clusters, busy = NH % plan.clusters * RANKS;

  // Solve the equations. All heads cost NH * RANKS * cost, so every block should do many = (MLP + NH * RANKS
  // * cost) / blocks units in all, heads included. A block that has a head does few = many - cost units.
  // (With more heads than clusters, every block has `heads` heads, and `busy` blocks have one more.) Numbers
  // are in *grains* of C / 64 bytes. A hidden unit has 256 grains. They are fine enough, and integers of 32
  // bits can hold all numbers. KV_COST and ATTENTION_BYTES: chapter 15.
  const int cost_bytes = (8 * HS * C + 2 * KV_COST * HS * position) / RANKS + ATTENTION_BYTES;
  const int cost_grains = 64 * cost_bytes / C,                              // [21248]
            many_grains = (256 * MLP + cost_grains * NH * RANKS) / blocks;  // [30161]
  const int few_grains = max(many_grains - (heads + 1) * cost_grains, 0);   // [8913]
  const int units_of_busy = few_grains * busy / 256;                        // [2228]
  const bool is_busy = block < busy;
  plan.units = is_busy ? deal(0, units_of_busy, block, busy)
                    : deal(units_of_busy, MLP - units_of_busy, block - busy, blocks - busy);

  // A block waits twice for each of its heads, at (1) and (2). So its units are split into slices, one before
  // each wait, and one at the end. `filler` is an equal share, rounded up to whole tiles, because
  // hidden_units() advances in whole tiles. The last slice gets what is left.
  const int slices = 2 * (heads + is_busy) + 1;
  plan.filler = ceil_div(ceil_div(plan.units.size, slices), TILE_ROWS) * TILE_ROWS;

  const int each = ceil_div(position, RANKS);
  plan.first_cached = min(each * plan.rank, position);
  plan.end_cached = min(each * (plan.rank + 1), position);
  return plan;
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
    s.tally_old[0] = state.tally_words[0], s.tally_old[1] = state.tally_words[1];  // chapter 14
    s.vote_number = state.vote_number, s.tally_number = 0;
    for (int i = 0; i < SLOTS; i++) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], WARPS);
    barrier_init(&s.qkv_ready, 1), barrier_init(&s.attention_ready, 1), barrier_init(&s.sums_ready, 1);
    barrier_init(&s.token_ready, 1), barrier_init(&s.workers_done, WARPS);
    barriers_exist();
  }
  load_rope(m, s, position, WORKERS + 32);

  // Load the words of x_now that this thread carries. No block has added to x_now yet (chapter 13).
  longlong2 carried_words = {0, 0};
  if (threadIdx.x < WORKERS && 2 * carried_pair() < C)
    carried_words = load_relaxed(m.residual + swaps % 2 * C + 2 * carried_pair());

  // A push must not go to a block that has not begun. So the blocks of a cluster wait for each other.
  cluster_sync();  // (0)

  // The first thread of the last warp is the producer. The other 31 threads of this warp are done.
  if (threadIdx.x >= WORKERS) {
    const bool with_lm_head = new_tokens > 0;
    if (threadIdx.x == WORKERS) Producer{m, s}.copy_all(first_layer, end_layer, position, end, with_lm_head);
    return;
  }

  Worker worker{m, s, s.plan};
  worker.begin(first_layer, carried_words);
  worker.run(first_layer, end_layer, new_tokens, token, position, end, swaps);
}

// 11. A layer in time =====================================================================================
// This table follows thread 0 of block 11, which is rank 1 of cluster 5, through one layer. `took` is the
// time from the previous mark to the mark in the first column (chapter 20). Marks 1, 2 and 3 come after the
// syncs (1), (2) and (3). A line without a mark shares the time of the line above. The columns of numbers
// are:
//     KB       what the producer of the block copies
//     needs    how many us these bytes take at 35.0 KB a us, a processor's share of the memory's rate
//     took     how many us the line took, as a mean over the layers (results/bench-h200.json)
//
//  mark        thread 0 of block 11                                           KB  needs  took  waits for
//  NORM        S0: reads columns 2i, 2i + 1 of x for i = 0, 320, 640, 960                 2.0  L2, (a)
//              S1: normalizes columns 0..7, which it has from here on                          (b)
//  QKV         S2: rows 1320..1439: head 5, k from dimension 40 on, and v    615   17.6  13.4  memory
//  1           S8: units 88..95, 600..607; (1)                               164    4.7   4.4  memory
//  ATTEND      S3: rotates q[0] with q[10]; S4: threads 80..239 append k, v               1.7  (d)
//              S5: takes dimensions 0..7 of positions 64, 84, 104, 124        20    0.6        (e)
//              S5: merges o[0] of 10 warps, and pushes it to rank 0
//  2           S8: units 1112..1119, 1624..1631; (2)                         164    4.7   3.6  memory
//  OUT, UNITS  S6, S7: output rows 440..479; S8: units 2078..2080            236    6.7   7.1  memory
//  3           S9: pushes y[0..7] to rank 0; (3)                                          0.7  peer's sums
//  ADDED       S9: adds columns 1280, 1600, 1920, 2240 of the sum to x                    0.8  L2
//  START       (4): polls columns 2558 and 2559 of x                                      3.1  other blocks
//  a layer                                                                  1198   34.2  36.8
//
// The lines of the marks "QKV" and "1" take less than their bytes need, because the ring is full when S2
// begins. During S3 to S5 it fills in part, so the line of the mark "2" takes less, too. In all, a layer
// takes 2.6 us longer than its bytes need. 0.7 us of this are explained. Between two layers, in S9, (4), S0
// and S1, the workers free no slot for 6.5 us (before rounding). Memory fills even an empty ring in 5.9 us,
// and then pauses. The other 1.9 us are not explained.
//
// Follow one number: hidden unit 602 of block 11, in layer 0 of a launch's first token.
//  1. Its up row lies in global memory: w_up + 602 * C, 5120 bytes.
//  2. Unit 602 belongs to the block's second tile of units, 600..607. Before this tile, the producer of block
//     11 has copied 34 half tiles: 30 for S2, and 4 for the first tile of units. These are three trips around
//     the ring and 4 slots, so rows 600..603 go to slot 4. The producer waits until slot 4 is empty, (E),
//     announces 20480 bytes of rows and 16 of biases at full[4], and starts two copies: to slots[4] and to
//     bias[4].
//  3. When all bytes have landed, (F) lets the workers go on. Thread 0 reads columns 0..7 of row 602 from
//     slots[4], multiplies them by its xn2[0..7], and adds the products up in dots[2]. Threads 1 to 319 do
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
//  8. Thread 0 of block 131 is the carrier of column 0. Before or after step 7, it adds x[0] + biases -
//     old to the same word.
//  9. After 66 clusters and the carrier have added, word 0 is complete. In every block, thread 0 polls
//     another pair of words until it is complete, (4), and lets the block go on, (g). Then it reads word 0,
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

struct alignas(16) Maxima { unsigned long long best, drawn; };  // two maxima over the grid
struct State {  // what one launch passes to the next one
  int token;                 // the token to be read next; -1 if the largest of the last logits was not finite
  int position;              // tokens in the cache
  unsigned swaps;            // layers computed so far; if odd, x is in the second buffer
  unsigned vote_number;      // votes of the grid so far
  unsigned voted;            // votes of blocks, over all votes so far
  Maxima maxima[3];          // of this vote, the next vote and the vote before
  longlong2 tally_words[2];  // two sums over the grid, in two sets that take turns: chapter 14
};

struct Settings {  // how to draw tokens; the host writes it: chapters 9 and 14
  unsigned long long seed;
  double top_p;        // 1 keeps all tokens
  float temperature;   // 0 takes the likeliest token
  unsigned top_k;      // V keeps all tokens
};

struct Failure { int sync, block, layer, number; };  // a report, in host memory: chapter 18

struct Model {  // the kernel's parameter: pointers only, the same in every launch
  Layer layers[L];
  const half *embed_in, *lnf_w, *lnf_b, *embed_out;  // [V] rows, [C], [C], [V] rows
  const float *rope_cos, *rope_sin;                  // [CTX][ROT / 2] of the RoPE angles of each position
  half* cache;                   // [L][2][NH][CTX][HS] keys and values
  long long* residual;           // [2][C] the two buffers of x (chapter 8)
  float* logits;                 // [V]
  int* history;                  // [CTX] the token chosen after each position, in host memory
  State* state;
  const Settings* settings;
  Failure* failure;
  float* taps;                   // chapter 20
  unsigned long long* timeline;  // chapter 20
};

// The place of a key (kv 0) or value (kv 1) in the cache.
static __device__ half* cache_row(const Model& m, int layer, int kv, int head, int position) {
  return m.cache + (((size_t)(layer * 2 + kv) * NH + head) * CTX + position) * HS;
}

// One block's shared memory, 232192 bytes. REST_BYTES is at least the size of all but the ring. The ring gets
// what REST_BYTES leaves: 10 slots, 205 KB. A slot needs room for its rows, its biases and two mbarriers of 8
// bytes, full and empty. In REST_BYTES, 4 * (...) is x, sums and warp_o. 25 * HS: qkv takes 12 * HS bytes,
// rank_o, q, and k_now with v_now take 4 * HS each, and RoPE's angles HS. 512 is for the small members.
static constexpr int WARP_BYTES = 24 * WARPS + 8 * (ROWS + 1) * TEAMS * TEAM_WARPS;  // [960]
static constexpr int REST_BYTES = 4 * (C + TEAMS * C + WARPS * HS) + 25 * HS + WARP_BYTES + 512;
static constexpr int SLOTS = (SHARED_BYTES - REST_BYTES) / (SLOT_BYTES + 2 * TILE_BIASES + 16);  // [10]

// Bulk copies, and loads of 16 bytes, need addresses that are multiples of 16: `alignas`.
struct alignas(128) Shared {                               // chapter, and what
  half slots[SLOTS][HALF_TILE_ROWS * C];                   // 5  rows of weights; or keys and values
  alignas(16) half bias[SLOTS][TILE_BIASES];               // 5  biases of the tile that begins in it
  alignas(16) float sums[RANKS * TEAMS][OWN];              // 7  y of all ranks, this rank's columns
  alignas(16) float x[C];                                  // 8  x, read once for all threads
  float qkv[3 * HS];                                       // 7  q, k, v of a head, from all ranks
  float rank_o[RANKS][OUT_ROWS],
      rank_peak_denom[RANKS][2];                           // 7  attention's results, from all ranks
  alignas(16) float q[HS];                                 // 7  q, rotated and scaled
  alignas(16) half k_now[HS], v_now[HS];                   // 7  this step's k and v, as in the cache
  float warp_o[WARPS][HS], warp_peak[WARPS],
      warp_denom[WARPS];                                   // 7  attention's results, from every warp
  float warp_dots[2][TEAMS][ROWS][TEAM_WARPS];             // 4  a tile's dot products, from every warp
  float warp_stats[TEAMS][TEAM_WARPS][2];                  // 6  LayerNorm's statistics, from every warp
  float rope_cos[ROT / 2], rope_sin[ROT / 2];              // 10 RoPE's angles at this position
  ulonglong2 warp_result[WARPS], grid_result;              // 9  two maxima or two sums, see (5) and (6)
  longlong2 tally_old[2];                                  // 14 tally_words, when last used
  Settings settings;                                       // 9
  float candidate_logit;                                   // 14 if top-k or top-p is set
  unsigned vote_number, tally_number;                      // 9  so far; only thread 0 uses them
  Plan plan;                                               // 10
  Portion lm_rows;                                         // 10 the block's rows of the LM head
  int layer;                                               // 18 the layer that a failure report names
  uint64_t full[SLOTS], empty[SLOTS];                      // 5  (F), (E)
  uint64_t qkv_ready, attention_ready, sums_ready;         // 7  (1), (2), (3)
  uint64_t token_ready, workers_done;                      // 9  (N); 18: all workers are done
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the ring leaves too little memory: REST_BYTES is wrong");

// 13. Why it is safe ======================================================================================
// All syncs, and what goes wrong without them. `python test_block.py -k simulated_sync` leaves out one at a
// time, in a simulation on a CPU (emulator/simulator.cpp). Then the result changes, or the launch does not
// end. Only the (g) that follows (4) is there for speed alone.
//
//     sync  who waits, and for what                                 without it
//     (0)   a cluster's threads: all its blocks have set up         a push into a block that has not begun
//     (1)   a rank: q, k and v from all ranks                       attention with stale q, k or v
//     (2)   a rank: peak, denom, o from all ranks                   a merge without the positions of one rank
//     (3)   a rank: y from all ranks                                x lacks what a peer adds
//     (4)   all blocks: x is complete                               LayerNorm of an unfinished x
//     (5)   all blocks: all have voted, k and v are cached          a token chosen from only some logits
//     (6)   all blocks: the tally (chapter 14) is complete          a candidate tested with only some logits
//     (F)   workers: a slot is full                                 arithmetic with bytes of an earlier tile
//     (E)   the producer: a slot is empty                           bytes overwritten while in use
//     (a)   workers: all of x is in s.x                             columns of an older x
//     (b)   a team: warp_stats of all its warps                     a mean of stale values
//     (c)   a team: warp_dots of all its warps                      stale dot products
//     (d)   workers: q, k_now, v_now are written, qkv is read       attention with a half-rotated q
//     (e)   push_attention: the results of all warps                a merge with results of an earlier head
//     (f)   thread 0: its block has written all that (5), (6) need  a block takes part before it is done
//     (g)   workers: thread 0 has passed (4), (5) or (6)            a result of (5) or (6) used too early
//     (N)   the producer: thread 0 has passed (5)                   copies of k and v that are not cached yet
//
// Inboxes. The receiver reads an inbox, then sends its next message. The peer waits for this message, and
// then pushes into the inbox again:
//
//     inbox                    is read in  the receiver's next message                 the peer waits at
//     qkv                      S3          its peak, denom, o of this head, after (d)  (2)
//     rank_o, rank_peak_denom  S6          q, k, v of the next head, or its y          (1), or (3)
//     sums                     S9          its additions to x                          (4)
//
// For example, the inbox qkv of rank 1 of cluster 5 in two layers. Times are us since layer 0 began, by the
// table of chapter 11.
//     2.0 .. 15.4   Both ranks do S2, and push their rows into this inbox.
//     19.8          Rank 1 passes (1) with parity 0: all 960 bytes have landed.
//     < 21.5        Rank 1 reads the inbox in S3. After (d), all its threads have read it.
//     21.5          Rank 1 pushes its peak, denom and o to rank 0.
//     25.1          Rank 0 passes (2), which needs this push.
//     38.8          Rank 0 begins S2 of layer 1, and pushes into the inbox again. This is safe.
//     56.6          Rank 1 passes (1) with parity 1.
//
// Parity. A thread that waits for the end of phase n has to look while phase n + 1 is running. If it looks
// later, phase n + 2 may be running. This has the parity of phase n, so the thread would go on waiting. So
// one bit is enough if phase n + 1 cannot end before every waiting thread has seen the end of phase n. What
// phase n + 1 needs:
//     full    It needs later rows. The producer copies them only after phase n of empty. Every warp arrives
//             at empty only after it has seen phase n of full end
//     empty   It needs arrivals of warps that have read these later rows. The producer copies the rows only
//             after it has seen phase n of empty end
//     (N)     It needs the end of the next token, and so rows that the producer copies after its wait at (N)
// At (1), (2) and (3), phase n + 1 needs a later push of this block itself:
//     (1)     The push of the next head's rows comes after (d) of this head. A warp comes to this (d) only
//             after (1)
//     (2)     The push of the next head's peak comes after (d) of the next head. A warp comes to that (d)
//             only after (2) of this head
//     (3)     The push of the next layer's y comes after (a) of the next layer or of the choice. A warp
//             comes to that (a) only after (3) of this layer
//
// Arrays that take turns. Before a warp writes to warp_dots[0] again, it passes the (c) of the tile between.
// No warp comes to that (c) before it has read warp_dots[0]. When block 0 clears the maxima of vote n + 1, no
// block reads them any more. Vote n - 2 has used the same maxima, and every block read them before it arrived
// at vote n - 1. Block 0 comes to vote n only after vote n - 1 is complete, so after every block has arrived
// there.
//
// Beginning of a launch. Carriers load their words of x_now. No block has added to x_now yet. A block adds to
// it only after the (4) of the launch's second layer. That (4) needs an addition that the carrier's block
// makes after the load. Carriers must not load their words of x_next, because a faster block may already have
// added to them. These words are 0: the previous launch has cleared them, and the first launch finds zeros.
//
// End of a launch. finish() clears x_next. The last layer was the last to read x_next, and this block has
// passed the (4) after that layer, so no block reads x_next any more. And blocks read the members of State
// that finish() writes only before their (0). This block has passed a (4), which needs additions that every
// block makes after its (0).
//
// Exit. A block must not end while a push to it or from it is on its way. The last pushes of a token are
// those of y. The receiver waits for them at (3), and then adds to x. Both blocks end only after a (4) that
// needs this addition. The end of a launch is a sync, too: the next launch sees x, the cache and State.
//
// The same bits in every run. The plan depends on block, grid and position alone. Sums within a cluster are
// taken in the order of threads, warps and ranks. Only integers are combined in an order that changes:
// additions to words of x, tallies, and the maxima of a vote.

// 14. top-k and top-p =====================================================================================
// *top-k* restricts the draw to the top_k likeliest tokens, and *top-p* to the smallest set of likeliest
// tokens that has at least the probability top_p. Neither needs a sort. Call one token *likelier* than
// another if its logit is larger, or if the logits are equal and its id is smaller. Then each token can be
// tested by itself:
//     top-k keeps a token if fewer than top_k tokens are likelier
//     top-p keeps a token if the likelier tokens together have less than the probability top_p
// So the grid chooses in rounds:
//     (5)  vote     find the token with the largest noisy logit: the candidate
//     (6)  tally    count the tokens that are likelier than the candidate, and add up their probability
// A candidate that is kept is the next token. Otherwise the next vote is among the tokens that are likelier
// than the candidate.
//
// For example, tokens A to E have the probabilities 40, 25, 20, 10 and 5 %, and top_p is 0.7. Top-p keeps A,
// B and C: before C there are 65 %, before D 85 %. Say that the noisy logits have the order D, B, A, E, C.
// The first candidate is D. The tally finds 85 % and refuses D. The second vote is among A, B and C, and its
// candidate is B. The tally finds 40 %, so B is the next token. This is right: a refusal removes the
// candidate and all less likely tokens from the vote, and none of them is kept. Of the kept tokens, the one
// with the largest noisy logit wins. With top_p = 0.95, the first candidate is kept with a probability of
// 0.95 or more.

// The result of a tally. `probability` is that of the tokens above a boundary. The second member is their
// number, or, without top-k, the probability of all tokens, the whole.
struct Tally { unsigned long long probability, number_or_whole; };

// Is the candidate with the packed logit `bound` kept? top_p is a share of `whole`, the probability of all
// tokens or, with top-k, of the top_k likeliest. With both top-k and top-p, the first call for a token
// computes `whole`.
__device__ bool is_kept(unsigned long long bound, float largest, unsigned long long& whole) {
  const bool cut_k = s.settings.top_k < V, cut_p = s.settings.top_p < 1;
  if (s.settings.temperature == 0 || !(cut_k || cut_p)) return true;
  if (cut_k && cut_p && whole == 0) whole = top_k_probability(largest);
  const Tally likelier = tally(largest, bound, cut_k);
  if (!cut_k) whole = likelier.number_or_whole;
  const bool keeps_k = !cut_k || likelier.number_or_whole < s.settings.top_k;
  const bool keeps_p = !cut_p || likelier.probability < s.settings.top_p * whole;
  return keeps_k && keeps_p;
}

// Finds the probability of the top_k likeliest tokens by bisection. There are more than top_k tokens above
// the packed logit `low`, fewer above `high`, and each tally moves one of the two to the middle.
__device__ unsigned long long top_k_probability(float largest) {
  unsigned long long low = 0, high = pack(largest, 0);
  while (true) {
    const unsigned long long middle = low + (high - low) / 2;
    const Tally above = tally(largest, middle, true);
    if (above.number_or_whole == s.settings.top_k) return above.probability;
    (above.number_or_whole > s.settings.top_k ? low : high) = middle;
  }
}

// (6) TALLY
//   math    probability and number of the tokens whose packed logit is above `bound`; without `with_number`,
//           the probability of all tokens in place of the number
//   who     as for (5)
//   syncs   (f), (6), (g)
// Probabilities are relative to that of the likeliest token. They are integers, counted in steps of 2^-30, so
// that sums do not depend on the order of blocks. The two sums are kept in words with a count, as in chapter
// 8, so no release is needed. They are never cleared: thread 0 subtracts what they held before, tally_old.
// There are two sets of words, which take turns, so that no block adds to words that another block still
// reads.
__device__ Tally tally(float largest, unsigned long long bound, bool with_number) {
  unsigned long long above = 0, second = 0;
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int token = held_token(k);
    if (token == V) continue;
    const unsigned long long p =
        __float2ull_rz(expf((logits[k] - largest) / s.settings.temperature) * (1 << 30));
    const bool is_above = pack(logits[k], token) > bound;
    above += is_above ? p : 0;
    second += with_number ? is_above : p;
  }
  above = warp_sum(above), second = warp_sum(second);
  if (lane == 0) s.warp_result[warp] = {above, second};
  workers_sync();  // (f)
  if (tid == 0) {
    for (int from = 1; from < WARPS; from++) above += s.warp_result[from].x, second += s.warp_result[from].y;

    const int turn = s.tally_number++ % 2;
    long long* const words = &m.state->tally_words[turn].x;
    add_relaxed(words, above << COUNT_BITS | 1), add_relaxed(words + 1, second << COUNT_BITS | 1);
    longlong2& old = s.tally_old[turn];
    longlong2 now;
    const unsigned wanted = (unsigned)old.x + gridDim.x;  // both words have the same count
    const long long start = clock64();
    for (unsigned lack; (lack = lacking(now = load_relaxed(words), wanted));)  // (6)
      if (clock64() - start > PATIENCE) give_up(m.failure, SYNC_TALLY, s.layer, lack);
    s.grid_result = {((unsigned long long)now.x - old.x) >> COUNT_BITS,
                     ((unsigned long long)now.y - old.y) >> COUNT_BITS};
    old = now;
  }
  workers_sync();  // (g)
  return {s.grid_result.x, s.grid_result.y};
}

// 15. Other shapes ========================================================================================
//     pythia-               14m   31m   70m   160m   410m   1b     1.4b   2.8b   6.9b   12b
//     C                     128   256   512   768    1024   2048   2048   2560   4096   5120
//     TEAM                  16    32    64    96     128    256    256    320    256    320
//     MIN_WORKERS           256   256   256   384    256    256    256    256    256    256
//     TEAMS                 16    8     4     4      2      1      1      1      1      1
//     PIECES                1     1     1     1      1      1      1      1      2      2
//     ROWS                  8     8     8     8      8      8      8      8      4      4
//     RANKS                 8     8     8     4      4      8      4      2      2      2
//     SLOTS                 13    13    13    8      13     12     12     10     11     8
//
// Small models: teams. A row of pythia-70m has 512 columns, so 64 threads hold a row: a team. A block has at
// least MIN_WORKERS workers, here 256 in 4 teams, and each team takes different rows: a tile has 8 rows for
// each team, 32 in all, and row r belongs to team r mod 4. Every team has all of x, a y of its own, and a (b)
// and (c) of its own. At (3), all teams push their y, and the owner of the columns adds up RANKS * TEAMS
// parts, in the order of ranks and teams.
//
// Smallest: half warps. A row of pythia-14m has 128 columns, so a team is 16 threads (TEAM_LANES), and a warp
// is two teams. A team is within one warp, so it needs no (b) and (c): TEAM_WARPS == 1. In its clusters of 8,
// a rank has 12 rows of q, k, v and 4 output rows, but 16 teams. A team without any of these rows may read
// rank_peak_denom late, while a peer already overwrites it with results of the cluster's next head. This does
// no harm, because this team uses nothing that it reads.
//
// Largest: two pieces. From C = 4096 on, a thread owns PIECES = 2 pieces of 8 columns, so that a block has
// half as many threads and each can have twice as many registers. The pieces lie 8 * TEAM columns apart, so
// that neighbouring threads read neighbouring pieces. ROWS is 4, so that a slot does not grow.
//
// Clusters of 1, 4 and 8 change only the shares: QKV_ROWS, OUT_ROWS, OWN and the number of positions. With
// more heads than clusters, the loop over heads runs several times, and the first blocks get one head more.
//
// Two costs are not bytes, but make_plan counts them as bytes. Because of the softmax, using a cached
// position takes longer than reading it, so its bytes count 1.5 times (KV_COST / 2). In small models, the
// short stages of a head take time in which a block reads little. They count as ATTENTION_BYTES: 24 KiB in
// pythia-160m, 0 in 2.8b, where the producer goes on filling the ring.
//
// The compiler checks what the code takes for granted:
static_assert(C % 128 == 0, "a row is dealt out to half-warps, 16 bytes a lane: C must be a multiple of 128");
static_assert(NH * HS == C, "the heads together are as wide as the residual stream");
static_assert(WORKERS % 32 == 0 && WORKERS + 32 <= 1024, "whole warps, and at most 1024 threads in a block");
static_assert(TEAM % 32 == 0 || 32 % TEAM == 0,
              "a team is whole warps, or a warp whole teams: C / 8 (C / 16 from 4096 on) must divide so");
static_assert(TEAM_WARPS == 1 || TEAMS <= 14, "a team of several warps has a named barrier; a block has 16");
static_assert((ROWS & (ROWS - 1)) == 0 && ROWS <= TEAM_LANES && ROWS % HALF_TILES == 0,
        "reduce_rows folds a power of two of rows over a team's lanes, and a tile comes in equal halves");
static_assert(HS % (2 * RANKS) == 0 && HS % 8 == 0, "a head's rows divide evenly; lanes take 8 dimensions");
static_assert(OWN % 8 == 0, "a rank owns whole pieces of a row");
static_assert(HS <= WORKERS, "one thread for each dimension of a head merges the warps' attention");
static_assert(SLOTS >= 2 * HALF_TILES, "two tiles: one being read, one on its way; take fewer ROWS");

// 16. Arithmetic ==========================================================================================
// LayerNorm. The mean of squares minus the square of the mean would subtract two large numbers where the mean
// is large. So groups of values keep their mean and `squares`, the sum of squared distances from this mean.
// Groups are merged exactly (Chan, Golub, LeVeque 1979). Two lanes a and b with n values each:
//     mean    = (mean_a + mean_b) / 2
//     squares = squares_a + squares_b + (mean_a - mean_b)^2 * n / 2
// The 10 warps, with n values each, are merged at once: mean is the mean of the 10 means, and each warp adds
// squares_w + n * (mean_w - mean)^2.
//
// Sums of a tile. reduce_rows adds up 8 sums over the 32 lanes of a warp: lane l ends with the sum of row l %
// 8. It takes 9 shuffles and not 8 * 5, because at the distances 4, 2 and 1 two lanes swap half of their
// sums. Lane 0 keeps rows 0 to 3 at distance 4, rows 0 and 1 at distance 2, and row 0 at distance 1. At
// distance 1, two rows a and b are left, with the sums a0 and b0 in lane 0, a1 and b1 in lane 1:
//     lane 0 gives b0, gets a1, and keeps a0 + a1
//     lane 1 gives a1, gets b0, and keeps b0 + b1
// The steps at distance 8 and 16 add what other lanes have of the same row.
static __device__ float reduce_rows(float (&v)[ROWS], int lane) {
  for (int apart = ROWS / 2; apart >= 1; apart /= 2) {
    const bool upper = lane & apart;  // the lane with the higher number keeps the upper half of the rows
#pragma unroll
    for (int i = 0; i < apart; i++)
      v[i] = (upper ? v[i + apart] : v[i]) + __shfl_xor_sync(~0u, upper ? v[i] : v[i + apart], apart);
  }
  for (int apart = ROWS; apart < TEAM_LANES; apart *= 2) v[0] += __shfl_xor_sync(~0u, v[0], apart);
  return v[0];
}

// Words of x. The value is a multiple of 2^-22 = 2.4e-7. Above 2, this is no coarser than fp32. A number that
// is 65536 or more in magnitude, or not finite, makes the word NaN. Then the logits are NaN, the token is -1,
// and the host ends the text with an error. Does this happen with real checkpoints? In a checkpoint that
// works in PyTorch's fp16, which has no number above 65504, x stays below 65536. How close real checkpoints
// come was not measured.
static constexpr float FIXED_ONE = 1 << 22, FIXED_LIMIT = 1 << 16;
static constexpr long long FIXED_NAN = 1ll << 47, FIXED_EDGE = 1ll << 46;
static constexpr int COUNT_BITS = 9, LAP = 256, MOST_CLUSTERS = 254;

static __device__ long long addend(float v) {  // what to add to a word, so that its value grows by v
  return (fabsf(v) < FIXED_LIMIT ? __float2ll_rn(v * FIXED_ONE) : FIXED_NAN) * (1 << COUNT_BITS) + 1;
}
static __device__ float value_of(long long word) {
  const long long value = word >> COUNT_BITS;
  const bool fits = value > -FIXED_EDGE && value < FIXED_EDGE;
  return fits ? __ll2float_rn(value) * (1 / FIXED_ONE) : __int_as_float(0x7fffffff);  // else NaN
}
// 0 if both words are complete, otherwise not 0. If both words have the same count and the carrier has added,
// it is the number of missing additions.
static __device__ unsigned lacking(const longlong2& words, unsigned wanted) {
  return ((wanted - (unsigned)words.x) | (wanted - (unsigned)words.y)) % (1 << COUNT_BITS);
}

// Why a NaN stays. In place of a number that does not fit, addend adds FIXED_NAN = 2^47. value_of returns NaN
// for any value of 2^46 (FIXED_EDGE) or more in size.
//   - Other additions cannot hide one FIXED_NAN. At most 254 others, each below 65536 * 2^22 = 2^38 in size,
//     are together below 2^46.
//   - Several FIXED_NANs cannot cancel. In the 55 bits of the value, 256 of them would wrap around to 0, but
//     at most 255 additions come, of 254 clusters (MOST_CLUSTERS) and the carrier.
//   - A large sum of ordinary additions is read correctly up to 2^24. The next carrier adds it as one number,
//     65536 or more, so x becomes NaN in the next layer.
//
// Old counts. Before the carrier has added, an old word would need 256 more additions to look complete, but
// there are at most 254. (A cleared word needs at least one addition of each cluster and of the carrier, so
// it cannot look complete either.) After the carrier's addition, the count is at most 256 + 254 + 1 = 511,
// which 9 bits hold.

// Packed logits. The upper 32 bits are those of the logit, changed so that they compare like an unsigned
// integer: all are flipped for a negative number, only the sign for a positive one. NaN is above all, as in
// torch. The lower 32 bits are the token's id, flipped, because among equal logits the smaller id counts as
// likelier.
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
// bits, so 64 bits take two. In warp_sum, v has to be below 2^47: the sum of 32 numbers of 20 bits is below
// 2^25, and of 27 bits below 2^32.
static __device__ unsigned long long warp_max(unsigned long long v) {
  const uint32_t high = __reduce_max_sync(~0u, (uint32_t)(v >> 32));
  return (unsigned long long)high << 32 | __reduce_max_sync(~0u, v >> 32 == high ? (uint32_t)v : 0);
}
static __device__ unsigned long long warp_sum(unsigned long long v) {
  const uint32_t low = __reduce_add_sync(~0u, (uint32_t)v % (1 << 20));
  return ((unsigned long long)__reduce_add_sync(~0u, (uint32_t)(v >> 20)) << 20) + low;
}

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

// 17. Pace ================================================================================================
// Memory does not serve all processors alike. Some blocks get their rows early, and then wait at (4) for
// blocks that get theirs late. So each producer limits itself to an equal share of PACE, in bytes a ns: after
// a copy of b bytes it waits b * blocks / PACE ns. PACE is what memory can deliver by its clock and the width
// of its bus, 4814 bytes a ns on an H200. Without a pace, a token takes 1244 us instead of 1223, and a token
// of pythia-160m 83.6 instead of 82.1.
//
// A producer that has fallen behind is not allowed to catch up. With 0.3 us of catching up, a token takes 0.2
// % longer, for a reason that was not measured. There is one exception. global_ns() advances in steps of 32
// ns, so a wait may end up to 32 ns late. This much, CLOCK_NS, may be caught up. A wait of more
// than 1 ms can only mean that the clock was set back.
static constexpr int CLOCK_NS = 32;  // step of global_ns, the clock that all blocks share

static __device__ void keep_pace(unsigned long long& earliest_ns, uint32_t bytes) {
  unsigned long long now;
  while ((now = global_ns()) < earliest_ns && earliest_ns - now < 1'000'000) {}
  earliest_ns = max(earliest_ns, now - CLOCK_NS) + bytes * gridDim.x / PACE;
}

// 18. Patience ============================================================================================
// A wait that never ends would hang the host, too. So workers wait at (1) to (6) for 3 s at most, and the
// producer for 6 s, so that a worker, which is closer to the cause, reports first. The other waits have no
// limit: (0), (a) to (g), (F) for workers, and the second part of (4), where all threads read x. If workers
// of one block hang there, workers of other blocks report, most likely at (4) or (5). If no other block
// waits, a producer reports. It names (E) or (N) if it waits there. If it has copied everything, it waits for
// its workers (workers_done). Then it names (F), where workers most likely hang.
//
// The first thread that reaches its limit writes a Failure to host memory: the sync, its block, the layer,
// and a number. At (5) this is the number of blocks that have not voted, at (4) and (6) the result of
// lacking(), elsewhere the parity. Then the thread executes a *trap*, an instruction that ends the launch and
// all of the process's work on the GPU. The host turns the Failure into an error.
static constexpr long long PATIENCE = 6'000'000'000;  // clock cycles: 3.0 s at 1.98 GHz
enum SyncId {  // (1) to (6), then (F), (E) and (N): the numbers in Failure::sync
  SYNC_QKV = 1, SYNC_ATTENTION, SYNC_SUMS, SYNC_X, SYNC_VOTE, SYNC_TALLY, SYNC_FULL, SYNC_EMPTY, SYNC_TOKEN
};

static __device__ __noinline__ void give_up(Failure* failure, int sync, int layer, int number) {
  if (atomicCAS_system(&failure->sync, 0, sync) != 0)
    while (true) __nanosleep(1000);  // another thread is writing its report, and its trap ends this one, too
  failure->block = blockIdx.x;
  failure->layer = layer;
  failure->number = number;
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

// 19. Toolbox: instructions that CUDA C++ does not offer, or not in this form =============================
// asm("...") is an instruction of PTX, the GPU's assembly language, which calls a block a cta. %0, %1 ...
// stand for the operands after the colons: first the results, with "=", then the inputs; "r" has 32 bits, "l"
// 64, "f" is a float. volatile forbids the compiler to remove the instruction. "memory" forbids it to move
// reads and writes across the instruction.

// An address in shared memory, in the 32 bits that these instructions take.
static __device__ uint32_t smem(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

static __device__ uint32_t in_rank(const void* place, int rank) {
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
// Bulk copies reach memory by a different path (a "proxy") than loads do, and an acquire does not order them.
// After this fence, the thread's copies see all that the thread has acquired.
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
// "red" is an addition that returns nothing, so no thread waits for it. A thread may wait for the result of
// an atomicAdd.
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

// 20. Taps and marks ======================================================================================
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

// 21. Host side ===========================================================================================
// A block waits for all others at (4), (5) and (6). If two launches had half of the GPU each, both would wait
// for ever. So the launch is *cooperative*: the driver starts all blocks at once, or refuses.

// `__global__` marks the kernel. `__launch_bounds__` promises the size of a block, and one block a processor.
// `__grid_constant__` keeps m where the launch has put it. `extern __shared__` is the block's shared memory,
// whose size the launch sets. `stream` below is a queue of work for the GPU.
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
    return "no such range of layers: take 0 <= first < end <= L, for a token end = L, for several first = 0";
  const int blocks = clusters * RANKS;
  if (blocks * WORKERS < C / 2 || blocks < MIN_BLOCKS)
    return "too few blocks to carry x, or to keep all logits: launch more clusters";
  if (clusters > Worker::MOST_CLUSTERS || blocks >= 1 << Worker::COUNT_BITS ||
      (long long)V * blocks >= 1ll << 31)
    return "too many blocks for the counts of words, or for this vocabulary: launch fewer clusters";
  if (new_tokens > CTX) new_tokens = CTX;
  const Worker::Model& m = *reinterpret_cast<const Worker::Model*>(pointers);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configure(attributes, clusters, stream);
  CHECK(cudaLaunchKernelEx(&config, fused_block, m, first_layer, end_layer, new_tokens));
  return nullptr;
}

// 22. Exercises ===========================================================================================
// Edits worth trying, with what to expect of a token of 2.8b at T = 128 on an H200.
//
//   1. Clusters of 1 (python bench.py --ablate). Expect 27 % more, because one block has all rows of a head.
//      Which of (1), (2), (3) get shorter, which part of a layer longer?
//   2. build.py: 4 ROWS instead of 8. The block adds up sums of tiles twice as often. Expect no change in
//      2.8b, and 6 % more in 160m. With 16, the producer is at most one tile ahead. Expect two thirds more.
//   3. make_plan: filler = 0. A block with a head waits while the pushes for (1) and (2) travel. How much is
//      that for a token? Why do the bits of y change?
//   4. build.py: attention_kib = 96 (ATTENTION_BYTES, chapter 15). By their bytes, blocks with a head add to
//      x 1.4 us earlier, and the others 1.4 us later, but a token takes as long as before. Why does it not
//      lose 32 * 1.4 us? (What do blocks wait for at (4), by chapter 11?)
//   5. Leave out the call of wait_for_x. Expect 5 % more, because all threads poll. Now leave out the check
//      in read_residual instead. How often do the bits change, and why do some launches not end? (See
//      carry_x.)
//   6. dot_tile: leave out `flip ^= 1`, so that all tiles use the same warp_dots. Find the interleaving of
//      two warps that goes wrong, and count how often it does in the random orders of simulator.cpp
//      (test_block.py -k simulated_block).
