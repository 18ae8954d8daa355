// fused_block.cu: one CUDA kernel for all of Pythia's decode step, from the embedding to the next token.
//
// 0. One token, and what it costs =========================================================================
// To write one more token, a language model reads all of its weights once. This file does that whole step in
// one *kernel*, a function that all threads of a GPU run together. One call of the kernel is a *launch*. A
// launch makes up to 8 tokens in a row. Before the first launch, PyTorch reads the prompt (model.py) and
// leaves its keys and values in the cache.
//
// In PyTorch the step is these lines. The kernel computes the same in *stages*, S0 to S10.
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
//     T        tokens in the cache, and so the position of the new token     128 in all examples
//
// A *layer* is what Pythia's paper calls a transformer block, and the file is named after it. From here on, a
// *block* is a group of threads (chapter 2). The text explains pythia-2.8b on an H200. Chapter 13 says what
// is different in the other nine sizes.
//
// The budget. At batch size 1, each weight is used once for each token. So a layer takes at least the time in
// which memory delivers its bytes:
//     (4*C*C + 2*C*MLP) weights of 2 bytes         157.3 MB / 4.72 TB/s =   33.3 us a layer
//     keys and values of T tokens: 4*C*T bytes      1.31 MB / 4.72 TB/s =    0.3 us a layer
//     L layers, 2*V*C bytes of the LM head, biases 5.335 GB / 4.72 TB/s = 1130   us a token: the floor
// The 4.72 TB/s are measured: of several kernels that do nothing but read, the fastest reads at this rate
// from an H200. The kernel below takes 1203 us for a token, 6 % above the floor.
//
// Arithmetic is not the limit. Without GELU and without sums across threads the kernel computes nonsense, but
// its time for a token changes by less than 0.3 %. So tensor cores, which make arithmetic faster, would gain
// nothing. One goal explains nearly everything in this file: memory must never sit idle.
//
// How to read. Chapter 3, the layer loop, is the algorithm, and chapters 1 and 2 lead to it. Chapters 4 to 9
// each solve one problem that the loop leaves open. Chapter 10 divides the work among the blocks, and chapter
// 11 follows one layer through time. The rest is appendix.
//
// Each stage has a card above it: its *math*; *who* computes what; the *bytes* that a block moves; its
// *syncs*. A sync is a point where a thread waits for something that other threads do. Syncs between blocks
// have numbers, (0) to (6). Syncs inside a block have letters, such as (a).
//
// Times are microseconds (us) for one token of 2.8b, unless a sentence says otherwise. Versions and runs of
// the kernel differ, so compare only times within one sentence. Where a change was measured in an older
// version, the text gives per cent.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// 1. Two loops ============================================================================================
// All matrices of a layer can be stored as rows of C numbers. Rows of w_qkv and w_up are multiplied by x, so
// they have this length anyway. w_out and w_down are stored transposed: w_out has one row for each element of
// o, and w_down has one for each element of h. Then a layer needs only two inner loops besides attention. In
// plain C++, where half is a number in fp16:
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
// A hidden unit needs nothing but x, and its only result is an addition to y. So the MLP is 10240 jobs that
// can run anywhere, in any order. A head also needs x and also ends in additions to y, but between them it
// has a chain of steps:
//
//         .-> LN1 -> S2 dot rows of q, k, v -> S3 rotate -> S5 attend -> S6 merge -> S7 axpy output rows -.
//         |                                       '-> S4 append k, v to the cache                         |
//     x --+                                                                                               y
//         |                                                                                               |
//         '-> LN2 -> S8 hidden unit j: dot up row j, gelu, axpy down row j -------------------------------'
//                                                                                  S9: x = x + y + biases
//
// The next x needs every part of y. So once in a layer all blocks have to wait for one another, at sync (4).
// At least once in a token they also wait at (5), where they choose the next token together.

// 2. Who owns what ========================================================================================
// A GPU is many processors, 132 in an H200 (NVIDIA calls them multiprocessors). Each has 227 KiB of fast
// memory of its own, called *shared memory* because the threads on this processor share it. All processors
// read and write one large *global memory*. It holds the weights, the cache of keys and values, and x. CUDA
// groups threads like this:
//
//     thread    has its own variables, in registers
//     warp      32 threads that run mostly in step
//     block     352 threads in this kernel, 11 warps. The kernel runs 132 blocks, one on each processor,
//               because a block uses nearly all of the processor's shared memory
//     cluster   2 neighbouring blocks, which can write into each other's shared memory. The number of a
//               block in its cluster is its *rank*, 0 or 1
//     grid      all threads of a launch: 66 clusters, 132 blocks
//
// 320 threads of a block are *workers*, which compute. One thread is the *producer*. It does nothing but
// start copies of what its block will need, from global memory into a *ring* of slots in shared memory
// (chapter 5). The other 31 threads of the producer's warp exit immediately.
//
//     what                                    is divided among        in shares of
//     columns of every row, of x and of y     the workers of a block  8 columns, the same in all layers
//     heads of a layer                        clusters                1 for clusters 0..31, 0 for 32..65
//       rows of the head's q, k, v            ranks of its cluster    120 of 240
//       cached tokens of the head             ranks                   64 of 128
//       output rows of the head               ranks                   40 of 80
//     hidden units of a layer                 blocks                  34 or 35 for blocks with a head,
//                                                                     117 or 118 for the others
//     columns of the sum of a cluster's y     ranks                   1280 of 2560
//     rows of the LM head                     blocks                  381 or 382 of 50304
//
//     a row      |  columns 0..7  |  columns 8..15  |  columns 16..23  |  ...  |  columns 2552..2559  |
//                |    thread 0    |    thread 1     |     thread 2     |  ...  |      thread 319      |
//     dot        each thread multiplies its 8 columns of the row by its 8 of x; then 320 sums are added up
//     axpy       each thread adds its 8 columns of the row, times the factor, to its 8 of y; no thread needs
//                anything from another thread
//
// Eight columns of fp16 are 16 bytes, the widest load from shared memory. For the whole layer, each thread
// keeps in registers its 8 columns of the two normalized x, xn1 and xn2, and of y. More workers do not help:
// with 640 of them, two for the same 8 columns, a token takes 1383 us instead of 1202.
//
// Why does a head need two blocks? A layer has 4*C + 2*MLP = 30720 rows, so a fair share is 233 rows for each
// of the 132 blocks. A head alone has 4*HS = 320 rows: q, k, v and output. If one block did a whole head, it
// would be late, and all other blocks would wait for it at (4). With clusters of 1 block a token takes 1543
// us, with clusters of 2 blocks it takes 1202. In a cluster of 2 each block has 160 rows of the head, and
// hidden units fill the rest of its share.
//
// Why not larger clusters? In 2.8b, clusters of 4 blocks take 1205 us and clusters of 8 take 1190, 1 % less.
// But clusters of 4 and 8 leave about one processor in eleven unused, and other sizes lose: pythia-160m takes
// 83.1 us with clusters of 4 blocks and 93.4 us with 8. One rule serves all sizes: default_cluster in
// build.py chooses the smallest cluster in which a block's part of a head is no more than its fair share.

// 3. The layer loop =======================================================================================
// The loop below is what one worker does. A few sizes come first, with their values for 2.8b in brackets.
// Names in capitals that this file does not define, such as HIDDEN or ROWS, come from build.py, on the
// compiler's command line. `__device__` marks functions that run on the GPU, `__host__` functions that run on
// the CPU, and `constexpr` what the compiler computes. In 2.8b a worker owns one piece of 8 columns, and all
// workers of a block are one team, so PIECES and TEAMS are 1. Ignore both until chapter 13.

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int C = HIDDEN, NH = HEADS, HS = HEAD_SIZE, ROT = ROTARY, V = VOCAB, L = LAYERS, CTX = CONTEXT;
constexpr int K = CLUSTER;                      // blocks in a cluster [2]
constexpr int PIECES = C < 4096 ? 1 : 2;        // pieces of 8 columns that a worker owns [1]
constexpr int COLS = 8 * PIECES;                // columns that a worker owns [8]
constexpr int TEAM = C / COLS;                  // workers that hold one row together: a team [320]
constexpr int TEAMS = ceil_div(THREADS, TEAM);  // teams in a block [1]
constexpr int WORKERS = TEAM * TEAMS;           // threads of a block that compute [320]

typedef float Columns[COLS];                    // registers: one worker's columns of x, y or a LayerNorm
// A worker's columns of the gains and biases of a layer's two LayerNorms. CUDA's uint4 is any 16 bytes, here
// 8 numbers in fp16.
struct Norms { uint4 w1[PIECES], b1[PIECES], w2[PIECES], b2[PIECES]; };

struct Share {  // the rows of one matrix that one block gets; chapter 10 explains the fields
  int count, dealt, first_dealt, blocks, first_rest;
  // The number of the block's i-th row. Here i has to be the first row of a tile (8 rows, chapter 4).
  __device__ int at(int i) const;
};

struct Plan {  // what one block does for one token (chapter 10)
  int rank, cluster, clusters;
  Share units;                  // its hidden units, in every layer
  int filler;                   // hidden units before each of the waits (1) and (2): whole tiles, of 8
  int first_token, last_token;  // its cached tokens, for every head: first_token .. last_token - 1
};

struct Ring {  // the slot of the ring that a thread uses next (chapter 5)
  int slot = 0;
  uint32_t parity = 0;             // says which trip around the ring this is, an even or an odd one
  __device__ void advance();
};

struct Model;   // what is in global memory: defined after the loop
struct Shared;  // what is in a block's shared memory: defined after the loop

struct Worker {
  // Runs layers first_layer .. last_layer - 1 of `token` at `position`, chooses the next token, and repeats
  // this with the next token until `position` is `end`. With new_tokens = 0, for tests, it chooses no token.
  //
  // In short: for each token { for each layer {...} choose }. The code has one loop for both: the pass with
  // layer == L chooses the token. It shares S0 and S1 with the layers.
  //
  // All of x is in global memory, in two buffers. A layer reads x from x_now, and all clusters add their y to
  // x_next. Then both swap roles. `steps` counts layers over all launches, and its last bit says which buffer
  // is x_now. x_next is not cleared. Instead, one thread for each pair of columns, the *carrier*, adds x -
  // old, where old is what x_next still holds. So the old value cancels (chapter 8).
  //
  // `plan` is the block's plan in shared memory. Thread 0 writes a new one when a token has been chosen. A
  // longlong2 is two 64-bit integers.
  //
  // mark() is a stopwatch, tap() a probe for tests. In the shipped kernel both compile to nothing.
  __device__ void run(const Plan& plan, int first_layer, int last_layer, int new_tokens,
                      int token, int position, int end, unsigned steps, const longlong2& carried_words) {
    Columns x, xn1, xn2;  // this thread's columns, in registers
    long long *x_now = buffer(steps), *x_next = buffer(steps + 1);
    begin(first_layer, carried_words);

    for (int layer = first_layer; position < end;) {
      // S0. In layer 0, x is the row of `token` in embed_in. In later layers, wait until every cluster of the
      // grid has added to x, (4), and read it.
      read_x(layer, token, x_now, steps, x);
      if (layer == last_layer && new_tokens == 0) break;  // a launch that makes no token ends here

      // S1. Normalize x, once for both LayerNorms. Apply the gain and bias of LayerNorm 1, for the heads.
      normalize(x);
      affine(x, norms.w1, norms.b1, xn1);

      // S10. After the last layer, compute the logits and choose the next token: (5). The buffers do not swap
      // here, because layer 0 does not read x_now. It adds to the same x_next.
      if (layer == L) {
        token = next_token(xn1, position, end);
        position++, layer = 0;
        continue;
      }

      // S9, first part. It stands here because it needs only the old x: the carriers add x - old and the
      // output biases to x_next.
      carry(layer, token, x_next, steps);

      // S1. Apply the gain and bias of LayerNorm 2, for the hidden units.
      affine(x, norms.w2, norms.b2, xn2);

      // Clear y, which sums up what the block adds to this thread's columns.
      for (int i = 0; i < COLS; i++) {
        y[i] = 0;
        tap(TAP_XN1 + column(i), xn1[i]), tap(TAP_XN2 + column(i), xn2[i]);
      }
      mark(MARK_NORM, layer);

      int done = 0;  // hidden units of this layer that are done; units() advances it
      for (int h = plan.cluster; h < NH; h += plan.clusters) {  // this cluster's heads: one or none
        // S2. Compute this rank's rows of q, k, v. Send them to all ranks of the cluster.
        qkv_rows(xn1, h); mark(MARK_QKV, layer);

        // S8. Do some hidden units while q, k and v are on their way. Then wait for q, k and v: (1).
        units(xn2, done, min(done + plan.filler, plan.units.count));
        wait_for_qkv(); mark(MARK_1, layer);

        // S3, S4. Rotate q and k by the position. Append k and v to the cache.
        rotate_and_append(layer, h, position);

        // S5. Attend to this rank's share of the tokens. Send the result to the other ranks.
        attend(); mark(MARK_ATTEND, layer);

        // S8. Do some more hidden units while the results are on their way. Then wait for all results: (2).
        units(xn2, done, min(done + plan.filler, plan.units.count));
        wait_for_attention(); mark(MARK_2, layer);

        // S6. Merge the results of all ranks into o. S7. For each of this rank's dimensions d of the head,
        // add o[d] times output row d to y.
        out_rows(h); mark(MARK_OUT, layer);
      }

      // S8. Do the hidden units that are left.
      units(xn2, done, plan.units.count); mark(MARK_UNITS, layer);

      // S9, second part. Send each column of y to the rank that owns it. Wait for the other ranks' y: (3).
      // Add up the columns that this rank owns, and add the sums to x_next.
      cluster_reduce(); mark(MARK_3, layer);
      add_to_residual(x_next);

      // Start to load the gains and biases of the next layer, which do not depend on x.
      norms = load_norms(layer + 1); mark(MARK_ADDED, layer);

      // Swap the buffers. The next layer reads x_next, and adds to the buffer that this layer has read. For a
      // carrier, the words that it read in this layer, own_now, become the old words, own_next.
      long long* const x_last = x_now;
      x_now = x_next, x_next = x_last, own_next = own_now, steps++, layer++;
    }
    finish(x_next, token, position, steps);
  }

  // Declarations, in the order of the chapters that explain them. Skip them for now.
  // 4. dot tile and axpy tile
  __device__ uint4 weights(int slot_row, int p) const;
  __device__ float dot_tile(const Columns& in, int n, int skip, bool has_bias);
  __device__ void axpy_tile(float a, int n);
  // 5. The ring
  __device__ void wait_full() const;
  __device__ void release();
  // 6. LayerNorm and hidden units
  __device__ Norms load_norms(int layer) const;
  __device__ void normalize(Columns& x) const;
  __device__ void affine(const Columns& x, const uint4* gain, const uint4* bias, Columns& out) const;
  __device__ void units(const Columns& xn2, int& done, int end);
  // 7. A head on a cluster
  __device__ void cluster_gather(float* place, float value, bool valid, uint64_t* ready) const;
  __device__ void qkv_rows(const Columns& xn1, int h);
  __device__ void wait_for_qkv() const;
  __device__ void rotate_and_append(int layer, int h, int position) const;
  __device__ void attend();
  __device__ void push_attention() const;
  __device__ void wait_for_attention();
  __device__ void out_rows(int h);
  __device__ void cluster_reduce();
  // 8. x between layers
  __device__ long long* buffer(unsigned steps) const;
  __device__ void carry(int layer, int token, long long* x_next, unsigned steps) const;
  __device__ void add_to_residual(long long* x_next) const;
  __device__ void read_x(int layer, int token, const long long* x_now, unsigned steps, Columns& x);
  __device__ void wait_for_x(const long long* x_now, unsigned wanted) const;
  __device__ void read_residual(const long long* x_now, unsigned wanted, Columns& x);
  __device__ const half* embedding(int token) const;
  __device__ void read_embedding(int token, Columns& x) const;
  // 9. The LM head, and the next token
  __device__ int kept_token(int k) const;
  __device__ void lm_head(const Columns& in, int position);
  __device__ void vote(unsigned long long candidate);
  __device__ ulonglong2 tally(float largest, unsigned long long candidate, bool with_count);
  __device__ int choose();
  __device__ int next_token(const Columns& xn, int position, int end);
  // 10. The division of work, and the kernel
  __device__ void prepare(int at) const;
  __device__ void begin(int first_layer, const longlong2& carried_words);
  __device__ void finish(long long* x_next, int token, int position, unsigned steps) const;
  // 18. Taps and marks
  enum Tap { TAP_XN1 = 0, TAP_XN2 = C, TAP_Q = 2 * C, TAP_K = 3 * C, TAP_V = 4 * C, TAP_O = 5 * C,
             TAP_H = 6 * C };
  enum Mark { MARK_START, MARK_NORM, MARK_QKV, MARK_1, MARK_ATTEND, MARK_2, MARK_OUT, MARK_UNITS, MARK_3,
              MARK_ADDED, MARKS };
  __device__ void tap(int where, float value) const;
  __device__ void mark(Mark event, int layer) const;

  // Element i of a thread's Columns is column(i) of x. In 2.8b this is column 8 * tid + i.
  __device__ int column(int i) const { return (i / 8 * TEAM + team_thread) * 8 + i % 8; }

  const Model& m;                           // global memory
  Shared& s;                                // the block's shared memory
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int team = TEAMS == 1 ? 0 : tid / TEAM, team_thread = TEAMS == 1 ? tid : tid % TEAM;  // [0, tid]
  const int team_warp = team_thread / 32;   // [warp]
  const int row = lane % ROWS * TEAMS + team;  // row of a tile whose result this lane gets: chapter 4
  Ring ring;                                // chapter 5
  int flip = 0;                             // which of two arrays the next tile uses: chapter 4
  uint32_t head_parity = 0, sums_parity = 0;  // parity of (1) and (2); parity of (3): chapter 7
  Columns y;                                // what the block adds to this thread's columns of x
  const int carried = (gridDim.x - 1 - blockIdx.x) * WORKERS + tid;  // pair of columns it carries: chapter 8
  longlong2 own_now, own_next;              // the carrier's two words in x_now and in x_next: chapter 8
  Norms norms;                              // gains and biases of the LayerNorms that come next
  // MIN_BLOCKS: the fewest blocks that a launch may have.
  static constexpr int KEPT = ceil_div(V, MIN_BLOCKS * WORKERS);  // logits that a worker keeps: chapter 9
  float logits[KEPT], noise[KEPT];          // chapter 9
};

// For later, when you know the kernel. To add a stage:
//   - Change the loop above, and the same stage in emulator.py.
//   - If the stage reads rows, the producer has to copy them at the same point in its order (chapter 5).
//   - If some blocks do more of it than others, make_plan has to count its bytes (chapter 10).
//   - New shared memory needs a larger FIXED_BYTES.
//   - New weights go into Layer below and into Block in model.py, in the same order.

// ---- Memory layout: sizes --------------------------------------------------------------------------------
// The rest of this chapter is for reference. Chapter 4 continues the explanation. A *tile* is 8 rows that are
// multiplied together (chapter 4). It fills two *slots* of the ring (chapter 5).

constexpr int WARPS = WORKERS / 32;             // warps of workers [10]
constexpr int LANES = TEAM < 32 ? TEAM : 32;    // threads of a warp that belong to one team [32]
constexpr int TEAM_WARPS = TEAM / LANES;        // warps of a team [10]

constexpr int TILE_ROWS = ROWS * TEAMS;         // rows of a tile, ROWS for each team [8]
constexpr int HALF_TILES = 2;                   // slots that a tile takes
constexpr int HALF_TILE_ROWS = TILE_ROWS / HALF_TILES;      // [4]
constexpr int SLOT_BYTES = HALF_TILE_ROWS * C * 2;          // [20480]
// The copy of a tile's biases may begin up to 7 biases early (Producer::rows). So there is room for 8 more.
constexpr int TILE_BIASES = ceil_div(TILE_ROWS, 8) * 8 + 8;  // room for a tile's biases [16]

constexpr int QKV_ROWS = 3 * HS / K;            // rows of a head's q, k, v that one rank computes [120]
constexpr int OUT_ROWS = HS / K;                // output rows, and dimensions of o, that one rank has [40]
constexpr int OWN = C / K;                      // columns of the cluster's y that one rank adds up [1280]

// ---- Memory layout: global memory ------------------------------------------------------------------------

struct Layer {  // weights in fp16; no launch writes them. Every matrix is stored as rows of C numbers
  const half *ln1_w, *ln1_b, *ln2_w, *ln2_b;  // [C]
  const half *w_qkv, *b_qkv;                  // [NH][3][HS] rows, and as many biases
  const half *w_out, *b_out;                  // [NH][HS] rows, [C]
  const half *w_up, *b_up;                    // [MLP] rows, [MLP]
  const half *w_down, *b_down;                // [MLP] rows, [C]
};

struct alignas(16) Maxima { unsigned long long best, drawn; };  // two maxima over the grid: chapter 9
struct State {  // what one launch passes to the next one
  int token;           // the token to be read next; -1 if the last logits were not finite
  int position;        // tokens in the cache
  unsigned steps;      // layers computed so far; if odd, x is in the second buffer
  unsigned votes;      // votes of the grid so far: chapter 9
  unsigned counter;    // counts the blocks that have voted: chapter 9
  Maxima maxima[3];    // of this vote, the next vote and the vote before: chapter 9
  longlong2 tally[2];  // two sums over the grid, for top-k and top-p: chapter 9
};

struct Settings {  // how to draw tokens; the host writes it: chapter 9
  unsigned long long seed;
  double top_p;        // 1 keeps all tokens
  float temperature;   // 0 takes the likeliest token
  unsigned top_k;      // V keeps all tokens
};

struct Failure { int sync, block, layer, seen; };  // in host memory, see chapter 16

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
  float* taps;                   // chapter 18
  unsigned long long* timeline;  // chapter 18
};

__device__ half* cache_row(const Model& m, int layer, int kv, int head, int token) {  // kv: 0 key, 1 value
  return m.cache + (((size_t)(layer * 2 + kv) * NH + head) * CTX + token) * HS;
}

// ---- Memory layout: one block's shared memory, 232192 bytes ----------------------------------------------
// FIXED_BYTES is at least the size of everything but the ring. The ring gets the rest: 10 slots, 205 KB.
//     4 * (C + TEAMS * C + WARPS * HS)      x; sums; warp_o
//     25 * HS                               qkv, peer_o, q, k_new, v_new, and RoPE's angles
//     WARP_BYTES                            warp_top, warp_l and warp_votes; warp_dots and warp_stats
//     512                                   all small things
// A slot needs room for its rows, its biases and two mbarriers of 8 bytes, (F) and (E) of chapter 5.
constexpr int WARP_BYTES = 24 * WARPS + 8 * (ROWS + 1) * TEAMS * TEAM_WARPS;  // [960]
constexpr int FIXED_BYTES = 4 * (C + TEAMS * C + WARPS * HS) + 25 * HS + WARP_BYTES + 512;
constexpr int SLOTS = (SHARED_BYTES - FIXED_BYTES) / (SLOT_BYTES + 2 * TILE_BIASES + 16);  // [10]

// Come back to this list when a chapter uses a name from it. Addresses have to be multiples of 16 where the
// producer copies to, and where a thread loads 16 bytes at once. `alignas` makes them so.
struct alignas(128) Shared {                        // bytes       chapter, and what
  half ring[SLOTS][HALF_TILE_ROWS * C];             // 10 x 20480  5  rows of weights; or keys and values
  alignas(16) half bias[SLOTS][TILE_BIASES];        // 10 x 32     5  biases of the tile that begins in it
  alignas(16) float sums[K * TEAMS][OWN];           // 10240       7  y of all ranks, this rank's columns
  alignas(16) float x[C];                           // 10240       8  x, read once for all threads
  float qkv[3 * HS];                                // 960         7  q, k, v of a head, from all ranks
  float peer_o[K][OUT_ROWS], peer_top_l[K][2];      // 336         7  attention's results, from all ranks
  alignas(16) float q[HS];                          // 320         7  q, rotated and scaled
  alignas(16) half k_new[HS], v_new[HS];            // 320         7  the new token's k and v, as in the cache
  float warp_o[WARPS][HS], warp_top[WARPS],
      warp_l[WARPS];                                // 3280        7  attention's results, from every warp
  float warp_dots[2][TEAMS][ROWS][TEAM_WARPS];      // 640         4  a tile's dot products, from every warp
  float warp_stats[TEAMS][TEAM_WARPS][2];           // 80          6  LayerNorm's statistics, from every warp
  float rope_cos[ROT / 2], rope_sin[ROT / 2];       // 80          10 RoPE's angles at this position
  ulonglong2 warp_votes[WARPS], agreed;             // 176         9  sums or maxima: of warps, of the grid
  longlong2 tally_before[2];                        // 32          9  State::tally, when it was last used
  Settings settings;                                // 24          9
  float candidate;                                  // 4           9  the candidate's logit, if top-k, top-p
  unsigned votes, tallies;                          // 8           9  how many so far; only thread 0 uses them
  Plan plan;                                        // 44          10
  Share rows;                                       // 20          10 the block's rows of the LM head
  int layer;                                        // 4           16 the layer that a failure report names
  uint64_t full[SLOTS], empty[SLOTS];               // 160         5  (F), (E)
  uint64_t qkv_ready, attention_ready, sums_ready;  // 24          7  (1), (2), (3)
  uint64_t token_ready, workers_done;               // 16          9  (h); chapter 16: all workers are done
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the ring leaves too little memory: FIXED_BYTES is wrong");

// 4. dot tile and axpy tile ===============================================================================
// The problem. A dot product has parts in all 320 threads, and these parts have to be added up. Within a
// warp, one thread can read a register of another thread, which is called a *shuffle*. A thread's number in
// its warp is its *lane*. Adding up 32 lanes takes 5 shuffles, one after another: with the lane at distance
// 1, then 2, 4, 8 and 16. Then the 10 warps exchange their sums through shared memory, which takes a sync.
// All this is called a *reduction*. One reduction takes longer than memory needs to deliver one row.
//
// The answer. A *tile* of 8 rows shares one reduction. All workers first multiply their columns of 8 rows,
// and keep 8 sums in registers. Then they reduce all 8 sums together. With tiles of 2 rows a token takes 2028
// us, with 4 rows 1219, with 8 rows 1203. Tiles of 16 rows are too large, because only two of them fit into
// the ring: a token takes 68 % more time than with 8 rows.
//
// This chapter assumes that the next tile is already in shared memory.

// CUDA's types: half is a number in fp16, half2 is two of them, and uint4 is any 16 bytes, here 8 halfs.
__device__ const uint4& as16(const half* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ float2 widen2(const half* h) { return __half22float2(*reinterpret_cast<const half2*>(h)); }
// Converts 8 numbers from fp16 to fp32. Weights, k and v are fp16, but all products and sums are fp32.
__device__ void widen(const uint4& w, float* f) {
  const half* halfs = reinterpret_cast<const half*>(&w);
  for (int i = 0; i < 4; i++) {
    const float2 pair = widen2(halfs + 2 * i);
    f[2 * i] = pair.x; f[2 * i + 1] = pair.y;
  }
}

// The two loops of chapter 1, on 8 columns. fmaf(a, b, c) is a * b + c, rounded once.
__device__ float dot8(const uint4& w, const float* x, float sum) {
  float f[8]; widen(w, f);
  for (int i = 0; i < 8; i++) sum = fmaf(f[i], x[i], sum);
  return sum;
}
__device__ void axpy8(float a, const uint4& w, float* y) {
  float f[8]; widen(w, f);
  for (int i = 0; i < 8; i++) y[i] = fmaf(a, f[i], y[i]);
}

// Adds up 8 sums over the 32 lanes of a warp. If every lane kept all 8 sums in all 5 steps, this would take
// 40 shuffles. Instead, two lanes swap half of their sums in each step. Each adds what it gets to the half
// that it keeps, so the number of sums halves: 8, 4, 2, 1. Take the last of these steps as an example. Two
// rows, a and b, are left. Lane 0 has the sums a0 and b0 of these rows, and lane 1 has a1 and b1:
//     lane 0 gives b0, gets a1, and keeps a0 + a1
//     lane 1 gives a0, gets b1, and keeps b0 + b1
// After three steps, with lanes at distance 4, 2 and 1, a lane has a single row, summed over 8 lanes. Two
// more shuffles add the lanes at distance 8 and 16. This takes 4 + 2 + 1 + 2 = 9 shuffles, and lane l ends
// with row l % 8.
//
// __shfl_xor_sync(~0u, v, n) returns the v of the lane whose number is this lane's number xor n. `#pragma
// unroll` unrolls the loop. Only then can the compiler keep v[] in registers.
__device__ float reduce_rows(float (&v)[ROWS], int lane) {
  for (int apart = ROWS / 2; apart >= 1; apart /= 2) {
    const bool upper = lane & apart;  // the lane with the higher number keeps the upper half of the rows
#pragma unroll
    for (int i = 0; i < apart; i++)
      v[i] = (upper ? v[i + apart] : v[i]) + __shfl_xor_sync(~0u, upper ? v[i] : v[i + apart], apart);
  }
  for (int apart = ROWS; apart < LANES; apart *= 2) v[0] += __shfl_xor_sync(~0u, v[0], apart);
  return v[0];
}

// A barrier: waits until `threads` threads of the block have called it with the same id. CUDA's own
// __syncthreads would also wait for the producer, which must not stop.
__device__ void named_barrier(int id, int threads);
__device__ void workers_sync() { named_barrier(1, WORKERS); }
__device__ void team_sync(int team) { named_barrier(TEAMS == 1 ? 1 : 2 + team, TEAM); }

// Piece p of this thread's columns, in one row of the current slot.
__device__ uint4 Worker::weights(int slot_row, int p) const {
  return as16(&s.ring[ring.slot][slot_row * C + column(8 * p)]);
}

// DOT TILE. Multiplies the rows of the next tile by the vector `in`.
//   math    dot(row r, in) + bias[r], for the n rows of the tile
//   who     every worker multiplies its 8 columns; then lane l of every warp gets the result of row l % 8
//   bytes   n * C * 2 from shared memory, 41 KB for 8 rows
//   syncs   (F) (E) for each slot, see chapter 5; (c) once
// A tile arrives in two slots, 4 rows in each: a *half tile*. So the producer can fill the first slot again
// while this function reads the second one. With one slot for the whole tile, a token takes 0.3 % more time.
//
// At (c) every warp waits until all 10 warps have written their sums to shared memory. No second sync
// protects these sums from the next tile, because two arrays alternate, warp_dots[0] and warp_dots[1]:
//   1. Tile 1 writes array 0. All warps pass (c), and then read array 0.
//   2. Tile 2 writes array 1. A warp arrives at its (c) only after the warp has read array 0.
//   3. Tile 3 writes array 0 again, after (c) of tile 2. So all warps have read it.
//
// The last tile may have only n < 8 rows. The loop always multiplies all 4 rows of a slot. Where a row is
// missing, the slot has old bytes, and the result is not used. A test for each row would cost more, because
// the compiler could no longer issue the loads of all rows first.
//
// s.bias[slot][skip] is the bias of the tile's first row. `skip` is not always 0, because copies of biases
// begin at a multiple of 8 (chapter 5).
__device__ float Worker::dot_tile(const Columns& in, int n, int skip, bool has_bias) {
  float dots[ROWS] = {}, bias = 0;
  for (int half_tile = 0; half_tile < HALF_TILES; half_tile++) {
    if (half_tile * HALF_TILE_ROWS >= n) break;

    // Wait until the half tile is here. Then multiply this thread's columns of its rows.
    wait_full();  // (F)
    for (int i = 0; i < ROWS / HALF_TILES; i++) {
      const int r = half_tile * ROWS / HALF_TILES + i;
      for (int p = 0; p < PIECES; p++) dots[r] = dot8(weights(i * TEAMS + team, p), in + 8 * p, dots[r]);
    }
    if (half_tile == 0 && has_bias && row < n)
      bias = __half2float(s.bias[ring.slot][skip + row]);
    release();  // (E)
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

// AXPY TILE. Adds the rows of the next tile, each times its factor, to y.
//   math    y += factor[r] * row r, for the n rows of the tile
//   who     every worker, for its own columns of y
//   bytes   n * C * 2 from shared memory, 41 KB for 8 rows
//   syncs   (F) (E) for each half tile
// Lane l holds the factor of row l % 8 in its argument `a`. dot_tile leaves its results in just these lanes.
// A shuffle, __shfl_sync(~0u, a, r), returns lane r's factor. Missing rows, from n on, get the factor 0. That
// is not enough, because old bytes may be NaN, and 0 * NaN is NaN. So for a missing row the thread reads row
// 0 of the half tile.
__device__ void Worker::axpy_tile(float a, int n) {
  if (row >= n) a = 0;
#pragma unroll
  for (int half_tile = 0; half_tile < HALF_TILES; half_tile++) {
    if (half_tile * HALF_TILE_ROWS >= n) break;
    wait_full();  // (F)
    for (int i = 0; i < ROWS / HALF_TILES; i++) {
      const int r = half_tile * ROWS / HALF_TILES + i, slot_row = i * TEAMS + team;
      const float of_row = __shfl_sync(~0u, a, r, LANES);
      // The row itself, or row 0 of the half tile for a missing row.
      const int exists = half_tile * HALF_TILE_ROWS + slot_row < n ? slot_row : 0;
      for (int p = 0; p < PIECES; p++) axpy8(of_row, weights(exists, p), y + 8 * p);
    }
    release();  // (E)
  }
}

// 5. The ring =============================================================================================
// The problem. Memory answers a request only after some time, so many requests have to be on their way at any
// moment. If an answer takes 1 us, these are at least the bytes that memory delivers in 1 us. A processor's
// share of 4.72 TB/s is 35.8 KB in 1 us. If workers loaded weights themselves, 35.8 KB would need 28
// registers of each worker. And no loads would start while workers wait at (4).
//
// The answer. One thread, the producer, starts *bulk copies* from global into shared memory. One instruction
// copies up to 20 KB, and hardware does the rest. The copies go to a *ring* of 10 slots of 20 KB. The
// producer fills slots 0, 1, ... 9, 0, 1, ..., and the workers empty them in the same order. Weights do not
// depend on x, so the producer runs ahead as long as there is an empty slot. While workers wait at (4), it
// copies rows of the next layer. While workers wait at (5), it copies rows for the next token. (The producer
// also waits at (h), once in a token, until the previous token's k and v are in the cache. And it limits its
// own rate, chapter 15.)
//
// What this gains. The ring holds 205 KB, which is 5.7 us of reading, so shorter waits do not interrupt the
// reading. With 9, 8 and 7 slots instead of 10, a token takes 0.8, 1.8 and 2.7 % more time. With copies of 1
// KB it takes 87 % more.
//
// Each slot needs two syncs:
//   (F) the slot is full, so workers may read it. Without (F), they would multiply bytes of an earlier tile
//   (E) the slot is empty, so the producer may fill it. Without (E), it would overwrite rows still in use
// Both are *mbarriers*, variables in shared memory on which threads can wait:
//   1. An mbarrier counts phases 0, 1, 2, ... A phase is complete after the number of arrivals that was given
//      to barrier_init, and after all announced bytes have landed. Then the next phase begins.
//   2. barrier_arrive is an arrival. barrier_expect is an arrival that also announces bytes. The hardware
//      counts the bytes of a bulk copy when they land.
//   3. A phase is named by its *parity*, its number modulo 2. barrier_open(b, parity) says whether the phase
//      with this parity is still open. After each wait, a thread flips the parity that it waits for.
//   4. One bit is enough if phase n + 1 completes only after every waiting thread has seen phase n end.
//   5. A thread that has seen a phase complete can read all that was written before the phase's arrivals, and
//      all bytes that were announced.
//
// full[slot] needs 1 arrival, the producer's, and the bytes of its copies. empty[slot] needs 10 arrivals, one
// from each warp of workers. Two trips around the ring, for one slot:
//     producer   waits at empty for parity 1, which passes at once (see claim). Copies rows A into the slot
//     workers    wait at full for parity 0, the end of its phase 0. Read A. Arrivals end phase 0 of empty
//     producer   waits at empty for parity 0, the end of its phase 0. Copies rows B into the slot
//     workers    wait at full for parity 1, the end of its phase 1. Read B. Arrivals end phase 1 of empty
//
// Rule 4 holds for both:
//     full     Phase n + 1 needs a new copy. The producer starts this copy only after all warps have emptied
//              the slot, and so have seen the end of phase n.
//     empty    Only the producer waits here. Phase n + 1 needs all warps to read the slot again, and so a new
//              copy. The producer starts this copy only after it has seen the end of phase n.

__device__ void barrier_init(uint64_t* b, int arrivals);
__device__ void barrier_arrive(uint64_t* b);
__device__ void barrier_expect(uint64_t* b, uint32_t bytes);
__device__ bool barrier_open(uint64_t* b, uint32_t parity, bool by_peers = false);  // peers: chapter 7

__device__ void Ring::advance() {  // parity is 0 in the first trip around the ring, 1 in the second, 0 again
  if (++slot == SLOTS) { slot = 0; parity ^= 1; }
}

__device__ void Worker::wait_full() const {
  while (barrier_open(&s.full[ring.slot], ring.parity)) {}  // (F)
}

__device__ void Worker::release() {
  __syncwarp();  // (E) waits until all lanes of the warp have read
  if (lane == 0) barrier_arrive(&s.empty[ring.slot]);     // (E)
  ring.advance();
}

// A worker that waits for another block has a limit, PATIENCE, and the producer has a limit of 2 * PATIENCE.
// After this time, the launch ends with an error and does not hang (chapter 16). Workers at (F) have no
// limit, because a look at the clock in each of these many waits makes a token take 0.4 % more time.
constexpr long long PATIENCE = 6'000'000'000;  // clock cycles: 3.0 s at 1.98 GHz
enum SyncId {  // numbers in Failure::sync: 1 to 5 as in the text, 6 for (F), 9 for (6)
  SYNC_QKV = 1, SYNC_ATTENTION, SYNC_SUMS, SYNC_X, SYNC_VOTE, SYNC_FULL, SYNC_EMPTY, SYNC_TOKEN, SYNC_TALLY
};
__device__ void wait(const Model& m, Shared& s, uint64_t* barrier, uint32_t parity, SyncId sync);
__device__ void give_up(Failure* failure, int sync, int layer, int seen);  // reports, and ends the launch

constexpr int KV_TOKENS = SLOT_BYTES / (4 * HS);  // cached tokens in a slot: half k, half v [64]
constexpr int CLOCK_NS = 32;                 // step of global_ns, the clock that all blocks share
__device__ unsigned long long global_ns();
__device__ uint64_t read_once_policy();      // a hint to the cache for copied bytes: chapter 17
__device__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* full, uint64_t policy);
__device__ void order_copies();              // orders later copies after this thread's earlier loads

// RULE. A slot has no label that says what is in it. Only the order tells: the producer has to copy exactly
// the tiles that Worker::run uses, in the same order. So layers() below has the same loops as run().
//
// If the order is wrong, workers multiply wrong rows. The tests notice this, because they compare every stage
// with float64. If the number of tiles is wrong, workers or the producer wait in vain, and after some seconds
// the launch ends with an error about (F) or (E).
struct Producer {  // one thread of each block
  const Model& m;
  Shared& s;
  const uint64_t policy = read_once_policy();
  Ring ring;
  uint32_t token_parity = 0;             // parity of (h)
  unsigned long long earliest_ns = 0;    // no copy may start before this time

  // Waits until the next slot is empty and until it is time for the copy (chapter 15). Then announces the
  // copy's bytes. In the first trip around the ring, the slot is empty from the start, so (E) has to pass at
  // once. A new mbarrier is in phase 0. The producer waits for parity 1, which then means the phase before
  // phase 0, and that phase counts as complete.
  __device__ void claim(uint32_t bytes) {
    wait(m, s, &s.empty[ring.slot], ring.parity ^ 1, SYNC_EMPTY);  // (E)
    unsigned long long now;
    while ((now = global_ns()) < earliest_ns && earliest_ns - now < 1'000'000) {}
    earliest_ns = max(earliest_ns, now - CLOCK_NS) + bytes * gridDim.x / PACE;  // PACE: bytes a ns, grid
    barrier_expect(&s.full[ring.slot], bytes);  // (F)
  }
  __device__ void copy(void* to, const void* from, uint32_t bytes) {
    bulk_copy(to, from, bytes, &s.full[ring.slot], policy);
  }

  // Copies rows first .. last - 1 of a matrix, and their biases if there are any. The biases of a tile come
  // with its first slot. A copy has to start at a multiple of 16 bytes, which is 8 biases. So the copy of the
  // biases begins up to 7 biases early, and the workers skip these.
  __device__ void rows(const half* matrix, const half* bias, int first, int last) {
    for (int row = first; row < last; row += TILE_ROWS) {
      const int n = min(TILE_ROWS, last - row), skip = row % 8;
      for (int done = 0; done < n; done += HALF_TILE_ROWS) {
        const int bytes = min(HALF_TILE_ROWS, n - done) * C * 2;
        const int bias_bytes = bias && done == 0 ? ceil_div(skip + n, 8) * 16 : 0;
        claim(bytes + bias_bytes);
        copy(s.ring[ring.slot], matrix + (size_t)(row + done) * C, bytes);
        if (bias_bytes) copy(s.bias[ring.slot], bias + row - skip, bias_bytes);
        ring.advance();
      }
    }
  }

  // Copies hidden units: a tile of up rows, then the down rows of the same units, and so on.
  __device__ void units(const Layer& w, const Share& share, int& done, int end) {
    for (; done < end; done += TILE_ROWS) {
      const int unit = share.at(done), last = unit + min(TILE_ROWS, end - done);
      rows(w.w_up, w.b_up, unit, last);
      rows(w.w_down, nullptr, unit, last);
    }
  }

  // Copies keys and values of cached tokens first .. last - 1, 64 tokens a slot. The new token is not among
  // them, because its k and v are not in the cache yet. S5 takes these from shared memory.
  __device__ void cached_tokens(const half* k, const half* v, int first, int last) {
    for (int t = first; t < last; t += KV_TOKENS) {
      const int bytes = min(KV_TOKENS, last - t) * HS * 2;
      claim(2 * bytes);
      copy(s.ring[ring.slot], k + (size_t)t * HS, bytes);
      copy(s.ring[ring.slot] + KV_TOKENS * HS, v + (size_t)t * HS, bytes);
      ring.advance();
    }
  }

  // Copies what the layers of one token need. The producer has a plan of its own. It may already be at the
  // next token while the workers' plan is still for this one.
  __device__ void layers(const Plan& plan, int first_layer, int last_layer, bool is_first_token) {
    for (int layer = first_layer; layer < last_layer; layer++) {
      const Layer& w = m.layers[layer];
      int done = 0;
      for (int h = plan.cluster; h < NH; h += plan.clusters) {
        const int qkv = h * 3 * HS + plan.rank * QKV_ROWS, out = h * HS + plan.rank * OUT_ROWS;
        rows(w.w_qkv, w.b_qkv, qkv, qkv + QKV_ROWS);                      // S2
        units(w, plan.units, done, min(done + plan.filler, plan.units.count));  // S8

        // Of all copies, only those of keys and values depend on earlier tokens. So the producer waits ahead
        // of the first of these copies until the workers have finished the previous token: (h). Then it runs
        // ahead again.
        if (!is_first_token && layer == 0 && h == plan.cluster) {
          wait(m, s, &s.token_ready, token_parity, SYNC_TOKEN);           // (h)
          token_parity ^= 1;
          order_copies();
        }
        cached_tokens(cache_row(m, layer, 0, h, 0), cache_row(m, layer, 1, h, 0),
                      plan.first_token, plan.last_token);                 // S5
        units(w, plan.units, done, min(done + plan.filler, plan.units.count));  // S8
        rows(w.w_out, nullptr, out, out + OUT_ROWS);                      // S7
      }
      units(w, plan.units, done, plan.units.count);                       // S8
    }
  }
  __device__ void run(int first_layer, int last_layer, int first, int end, bool with_lm_head);  // chapter 10
};

// 6. LayerNorm and hidden units: the MLP is complete ======================================================

// Loads 16 bytes that no launch writes. The compiler cannot move this load. It would move a plain load down
// to its first use, after the next sync, but the load should run during that sync.
__device__ uint4 load16(const half* p);

// Loads this thread's columns of the gains and biases of a layer's two LayerNorms. Layer L stands for the
// final LayerNorm. The loop calls this function before the wait for x, so that the loads run during the wait.
__device__ Norms Worker::load_norms(int layer) const {
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
//   syncs   (b) makes every warp wait for the statistics of all warps
//
// The usual formula for the variance, E[x^2] - E[x]^2, subtracts two large numbers if the mean is large. So a
// thread first computes the mean of its 8 values, and then adds up the squared distances to this mean. Two
// groups a and b of n values each can be merged exactly (Chan, Golub, LeVeque 1979):
//     mean    = (mean_a + mean_b) / 2
//     squares = squares_a + squares_b + (mean_a - mean_b)^2 * n / 2
// First the lanes of a warp are merged, in pairs. Then every thread merges the results of the 10 warps, which
// are in warp_stats. No sync is needed before the next layer writes warp_stats again, because all workers
// pass at least one more barrier together in between.
constexpr float LN_EPS = 1e-5f;

__device__ void Worker::normalize(Columns& x) const {
  // Mean and squares of this thread's columns.
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

__device__ void Worker::affine(const Columns& x, const uint4* gain, const uint4* bias, Columns& out) const {
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
// Units need nothing but x, so they also fill waits. The layer loop does some of them while q, k and v are on
// their way to the other rank, and some more during the exchange of attention's results. Pythia is trained
// with gelu(a) = a / 2 * (1 + erf(a / sqrt 2)). The approximation by tanh, common in other models, differs
// from it by up to 5e-4.
__device__ void Worker::units(const Columns& xn2, int& done, int end) {
  for (; done < end; done += TILE_ROWS) {
    const int unit = s.plan.units.at(done), n = min(TILE_ROWS, end - done);
    const float a = dot_tile(xn2, n, unit % 8, true);
    const float hidden = 0.5f * a * (1 + erff(a * 0.70710678f));
    if (row < n) tap(TAP_H + unit + row, hidden);
    axpy_tile(hidden, n);
  }
}

// 7. A head on a cluster ==================================================================================
// The problem. The two blocks of a cluster share a head. Each computes 120 of the 240 rows of q, k and v, but
// both need all of q for attention. Each attends to half of the tokens, but o needs both halves. At the end
// each has a y, and x needs the sum of both. So the cluster exchanges data three times in a layer.
//
// The answer is a *push*: a store into the shared memory of another block of the cluster. When the data
// lands, the hardware counts its bytes on an mbarrier of the receiving block. The sender goes on at once. The
// receiver waits on its own mbarrier until all expected bytes have landed. Two alternatives are slower. A
// read from the other block is a round trip. A plain store needs a barrier of both blocks, which tells the
// receiver that the data has arrived.
//
// An *inbox* is an array into which the blocks of a cluster, the *peers*, push. Each rank also pushes to its
// own inboxes, so that all parts are handled alike.
//
//     sync  inbox                what each rank pushes             to which rank           without the sync
//     (1)   qkv                  its 120 rows of q, k, v           all                     stale q, k or v
//     (2)   peer_o, peer_top_l   attention over its 64 tokens      owner of the dimension  tokens are lost
//     (3)   sums                 its y                             owner of the column     x lacks peers' y
//
// The first exchange is a ClusterGather: every rank gets all parts. Each of the other two is a ClusterReduce:
// each rank gets all parts of what it owns, and adds them up. (These names are from the ClusterFusion paper,
// arXiv 2508.18850.)
//
// An inbox needs no signal that says it is free, because the exchanges come in a fixed order. For qkv, for
// example:
//   1. Every thread of this block reads q, k and v, and arrives at (d), a sync of the block in S3.
//   2. After (d), this block pushes its attention results to the peer.
//   3. The peer waits for these results at (2).
//   4. Later, in the next layer, the peer pushes into this block's qkv again.
// Chapter 12 has the other inboxes, and an example with times.

// The address of `place` in the shared memory of another rank. A plain pointer means the block's own memory.
__device__ uint32_t peer(const void* place, int rank);
__device__ void push(uint32_t to, float v, uint32_t barrier);
__device__ void push4(uint32_t to, const float* v, uint32_t barrier);  // 16 bytes at once

// CLUSTERGATHER of the results of one dot tile. Every warp has all 8 results four times, in lanes 0 to 7, 8
// to 15, 16 to 23 and 24 to 31. Only warp 0 pushes: lanes 0 to 7 to rank 0, and lanes 8 to 15 to rank 1.
__device__ void Worker::cluster_gather(float* place, float value, bool valid, uint64_t* ready) const {
  if (!valid || team_warp > 0) return;
  for (int r = lane % LANES / ROWS; r < K; r += LANES / ROWS)
    push(peer(place, r), value, peer(ready, r));  // (1)
}

// S2 QKV
//   math    q, k, v of head h = its 3*HS rows times xn1, plus biases
//   who     rank r computes QKV_ROWS rows, from row r * QKV_ROWS on
//   bytes   3 * HS * C * 2 / K, 614 KB
//   syncs   (F) (E) for each half tile; (c) for each tile; (1) later, after some hidden units
// The results of a tile are pushed before the next tile begins. So at (1) only the last pushes may still be
// on their way.
__device__ void Worker::qkv_rows(const Columns& xn1, int h) {
  // Expect q, k and v from all ranks: 960 bytes.
  if (tid == 0) barrier_expect(&s.qkv_ready, sizeof(s.qkv));  // (1)

  // Compute 8 rows at a time, and push each to all ranks.
  const int first = s.plan.rank * QKV_ROWS;
  for (int i = 0; i < QKV_ROWS; i += TILE_ROWS) {
    const int n = min(TILE_ROWS, QKV_ROWS - i);
    const float value = dot_tile(xn1, n, (h * 3 * HS + first + i) % 8, true);
    cluster_gather(&s.qkv[first + i + row], value, row < n, &s.qkv_ready);
  }
}

__device__ void Worker::wait_for_qkv() const {
  wait(m, s, &s.qkv_ready, head_parity, SYNC_QKV);  // (1)
}

// S3 ROPE, S4 APPEND
//   math    (a, b) <- (a cos - b sin, b cos + a sin) for dimensions i and i + ROT/2 of q and k, i < ROT/2
//   who     one thread for each of the 3*HS values, in every rank; the last rank writes k and v to the cache
//   bytes   4 * HS to the cache
//   syncs   (d) makes all warps wait until q is rotated and k and v are stored; qkv is then no longer read
// Every rank rotates for itself, because results from another rank would need one more sync. S5 uses k and v
// as they are in the cache, rounded to fp16. So this token sees the same k and v as all later tokens.
__device__ void Worker::rotate_and_append(int layer, int h, int position) const {
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
      tap(TAP_Q + h * HS + d, value);
    } else {
      (which == 1 ? s.k_new : s.v_new)[d] = __float2half_rn(value);
      if (s.plan.rank == K - 1) cache_row(m, layer, which - 1, h, position)[d] = __float2half_rn(value);
      tap((which == 1 ? TAP_K : TAP_V) + h * HS + d, value);
    }
  }
  workers_sync();  // (d)
}

// S5 ATTEND. The softmax takes tokens a few at a time ("online softmax") and works with powers of 2:
//   1. A set of tokens with scores score_t has three results: top = max score_t, the sum l of
//      2^(score_t - top), and the sum o of 2^(score_t - top) * v_t. The attention output of the set is o / l.
//   2. To merge two sets, take the larger top. Multiply each set's l and o by 2^(its top - larger top). Then
//      add both l and both o.
//   3. The GPU computes 2^x in one instruction, but not e^x. So S3 has multiplied q by log2(e).
//
//   math    score_t = dot(q, k_t); then top, l, o of this rank's tokens
//   who     rank r: tokens first_token .. last_token - 1. The last rank also takes the new token, because no
//           rank has fewer cached tokens. In a warp, 16 lanes share a token. Of these 16 lanes, 10 have 8 of
//           the 80 dimensions each, and 6 have none
//   bytes   4 * HS * T / K, 20 KB; with T = 2048, 328 KB, which takes 9.2 us
//   syncs   (F) (E) for each slot; (e) makes push_attention wait for the results of all warps; (2) later
// Sets are merged three times: sets of lanes here, sets of warps in push_attention, sets of ranks in S6.
constexpr int TOKEN_LANES = HS <= 32 ? 4 : HS <= 64 ? 8 : HS <= 128 ? 16 : 32;  // lanes for a token [16]
constexpr int WARP_TOKENS = 32 / TOKEN_LANES;     // tokens that a warp takes at once [2]

__device__ void Worker::attend() {
  // Expect results from all ranks.
  if (tid == 0) barrier_expect(&s.attention_ready, sizeof(s.peer_o) + sizeof(s.peer_top_l));  // (2)

  // This lane has dimensions d .. d + 7 of one token at a time. In a slot it takes token 2 * warp + group,
  // and then every 20th token.
  const int d = lane % TOKEN_LANES * 8, group = lane / TOKEN_LANES;
  const bool has_d = d < HS;
  float q[8], o[8] = {}, top = -1e30f, l = 0;  // results of the empty set
  for (int i = 0; i < 8; i++) q[i] = has_d ? s.q[d + i] : 0.f;

  // The last warp of the last rank starts with the new token.
  if (s.plan.rank == K - 1 && warp == WARPS - 1) {
    float score = has_d ? dot8(as16(s.k_new + d), q, 0) : 0.f;
    for (int apart = 1; apart < TOKEN_LANES; apart *= 2) score += __shfl_xor_sync(~0u, score, apart);
    if (group == 0) {
      top = score; l = 1;
      if (has_d) widen(as16(s.v_new + d), o);
    }
  }

  // For each slot of keys and values:
  constexpr int STRIDE = WARPS * WARP_TOKENS, BATCH = ceil_div(KV_TOKENS, STRIDE);  // a lane's tokens [4]
  const int last_token = s.plan.last_token;
  for (int t0 = s.plan.first_token; t0 < s.plan.last_token; t0 += KV_TOKENS) {
    const int n = min(KV_TOKENS, last_token - t0);
    wait_full();  // (F)
    const half *k = s.ring[ring.slot] + d, *v = k + KV_TOKENS * HS;
    const int base = warp * WARP_TOKENS + group;

    // Compute the scores of up to 4 tokens, and the largest of them. The first loop has only loads and
    // products, the second loop has the shuffles. In a single loop, each load would wait for the shuffles of
    // the token before. With T = 2000, a token would then take 2.1 % more time.
    float score[BATCH], higher = top;
    for (int u = 0; u < BATCH; u++) {
      const int t = base + u * STRIDE;
      score[u] = t < n && has_d ? dot8(as16(k + t * HS), q, 0) : 0.f;
    }
    for (int u = 0; u < BATCH; u++) {
      for (int apart = 1; apart < TOKEN_LANES; apart *= 2)
        score[u] += __shfl_xor_sync(~0u, score[u], apart);
      if (base + u * STRIDE < n) higher = fmaxf(higher, score[u]);
    }

    // Merge: shrink the results so far to the new top, and add these tokens.
    const float shrink = exp2f(top - higher);
    top = higher; l *= shrink;
    for (int i = 0; i < 8; i++) o[i] *= shrink;
    for (int u = 0; u < BATCH; u++) {
      const int t = base + u * STRIDE;
      if (t < n) {  // later rows hold old bytes, perhaps NaN
        const float e = exp2f(score[u] - top);
        l += e;
        if (has_d) axpy8(e, as16(v + t * HS), o);
      }
    }
    release();  // (E)
  }

  // Merge lanes that hold the same dimensions, but of different tokens.
  for (int apart = TOKEN_LANES; apart < 32; apart *= 2) {
    const float higher = fmaxf(top, __shfl_xor_sync(~0u, top, apart)), shrink = exp2f(top - higher);
    top = higher;
    l *= shrink; l += __shfl_xor_sync(~0u, l, apart);
    for (int i = 0; i < 8; i++) { o[i] *= shrink; o[i] += __shfl_xor_sync(~0u, o[i], apart); }
  }

  // Leave the warp's results in shared memory. Then merge the warps, a thread for each dimension.
  if (group == 0 && has_d)
    for (int i = 0; i < 8; i++) s.warp_o[warp][d + i] = o[i];
  if (lane == 0) s.warp_top[warp] = top, s.warp_l[warp] = l;
  workers_sync();  // (e)
  if (tid < HS) push_attention();
}

// CLUSTERREDUCE of o, first half: pushes. Thread d merges o[d] of the 10 warps, and pushes it to the rank
// that owns dimension d. The block's top and l go to all ranks.
__device__ void Worker::push_attention() const {
  float top = s.warp_top[0], l = 0, o = 0;
  for (int from = 1; from < WARPS; from++) top = fmaxf(top, s.warp_top[from]);
  for (int from = 0; from < WARPS; from++) {
    const float shrink = exp2f(s.warp_top[from] - top);
    l = fmaf(shrink, s.warp_l[from], l);
    o = fmaf(shrink, s.warp_o[from][tid], o);
  }
  const int owner = tid / OUT_ROWS;
  push(peer(&s.peer_o[s.plan.rank][tid % OUT_ROWS], owner), o, peer(&s.attention_ready, owner));  // (2)
  if (tid < K) {
    push(peer(&s.peer_top_l[s.plan.rank][0], tid), top, peer(&s.attention_ready, tid));           // (2)
    push(peer(&s.peer_top_l[s.plan.rank][1], tid), l, peer(&s.attention_ready, tid));             // (2)
  }
}

__device__ void Worker::wait_for_attention() {
  wait(m, s, &s.attention_ready, head_parity, SYNC_ATTENTION);  // (2)
  head_parity ^= 1;
}

// S6 MERGE, S7 OUT ROWS. The second half of the CLUSTERREDUCE of o, and output rows
//   math    o = sum_r 2^(top_r - top) o_r / sum_r 2^(top_r - top) l_r; then y += o[d] * output row d
//   who     rank r: OUT_ROWS dimensions, from r * OUT_ROWS on. Every warp merges all of them for itself, in
//           each tile one dimension a lane
//   bytes   HS * C * 2 / K, 205 KB
//   syncs   (F) (E) for each half tile
// Results are added in the order of ranks, no matter which arrives first. So the bits are the same in every
// run.
__device__ void Worker::out_rows(int h) {
  // The weight of each rank, and the common denominator.
  float top = s.peer_top_l[0][0], weight[K], l = 0;
  for (int r = 1; r < K; r++) top = fmaxf(top, s.peer_top_l[r][0]);
  for (int r = 0; r < K; r++) {
    weight[r] = exp2f(s.peer_top_l[r][0] - top);
    l = fmaf(weight[r], s.peer_top_l[r][1], l);
  }

  // For each tile, merge o for this lane's row. Then add all rows of the tile, each times its o, to y.
  for (int i = 0; i < OUT_ROWS; i += TILE_ROWS) {
    const int n = min(TILE_ROWS, OUT_ROWS - i);
    float o = 0;
    if (row < n) {
      for (int r = 0; r < K; r++) o = fmaf(weight[r], s.peer_o[r][i + row], o);
      o /= l;
      tap(TAP_O + h * HS + s.plan.rank * OUT_ROWS + i + row, o);
    }
    axpy_tile(o, n);
  }
}

// S9 SUM, first half: CLUSTERREDUCE of y
//   math    sums[r][c] = y of rank r, for the columns c that this rank owns
//   who     every thread pushes its 8 columns to the rank that owns them
//   bytes   4 * C, 10 KB to the shared memories of the cluster
//   syncs   (3)
// Why does the cluster add up first? All clusters add to the same words of x. Additions to one word queue up,
// so fewer additions are better. Without this step a token takes 2.9 % more time. With pushes of 4 bytes, and
// not 16, it takes 1221 us instead of 1202.
__device__ void Worker::cluster_reduce() {
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

// 8. x between layers =====================================================================================
// The problem. 66 clusters add their sums to x, and then all 132 blocks read x. The usual way is to add
// floating-point numbers in a cleared buffer, and to count in a separate counter the blocks that are done.
// This has three costs:
//   - Every floating-point addition rounds, so the last bits of a sum depend on the order of additions. This
//     order changes from run to run, and so the same prompt could give a different text.
//   - A block may increment the counter only after its additions have arrived. While memory is busy, waiting
//     for their arrival takes about 1 us.
//   - The buffer has to be cleared before the next layer's additions, and all blocks have to wait for that.
//
// The answer to all three is a 64-bit *word* for each column of x. It holds a value and a count:
//
//     bits 63 .. 9    the value, an integer in units of 2^-22. Sums of integers do not depend on the order
//     bits 8 .. 0     the count of additions to this word
//
// All processors reach global memory through one cache, L2, and L2 can add. A thread sends it an address and
// a number, and goes on. Such an addition is *atomic*: it changes value and count in one step. When the count
// shows that every cluster has added, the word is *complete*. A reader that finds a smaller count reads the
// word again. No block waits for its own additions, and no separate counter is needed. With a separate
// counter, a token takes 1233 us instead of 1203.
//
// CUDA has three kinds of such accesses:
//   relaxed   the access is atomic, in L2. It says nothing about other data
//   release   an addition that becomes visible only after all earlier writes of its thread. After a sync of
//             the block, this includes what the block's other threads wrote before that sync
//   acquire   a load. If it sees the result of a release, then later loads see all writes before that release
// At (4) relaxed is enough, because the data is its own flag: the count in a word proves that the word's
// value is complete. At (5) the flag is a counter, separate from the data, so (5) needs a release and an
// acquire.

__device__ longlong2 load_relaxed(const long long* p);     // loads two words
__device__ void add_relaxed(long long* p, long long v);    // does not wait for the addition

// A number that is added has to be below 65536 in magnitude. If it is larger, infinite or NaN, the word
// becomes NaN (chapter 14). Then x and the logits become NaN, the token is -1, and the host ends the text
// with an error. Does this happen with real checkpoints? PyTorch's fp16 arithmetic overflows at 65504, so in
// a checkpoint that works in fp16, x stays below 65536. How close real checkpoints come was not measured.
constexpr float FIXED_ONE = 1 << 22, FIXED_LIMIT = 1 << 16;
constexpr long long FIXED_NAN = 1ll << 47, FIXED_EDGE = 1ll << 46;
constexpr int COUNT_BITS = 9, LAP = 256, MOST_CLUSTERS = 254;  // chapter 14 explains 254

__device__ long long to_word(float v) {  // what to add to a word, so that its value grows by v
  return (fabsf(v) < FIXED_LIMIT ? __float2ll_rn(v * FIXED_ONE) : FIXED_NAN) * (1 << COUNT_BITS) + 1;
}
__device__ float from_word(long long word) {
  const long long value = word >> COUNT_BITS;
  const bool fits = value > -FIXED_EDGE && value < FIXED_EDGE;
  return fits ? __ll2float_rn(value) * (1 / FIXED_ONE) : __int_as_float(0x7fffffff);  // else NaN
}
// Returns 0 if both words have the wanted count. Otherwise the result is not 0. If both words lack n
// additions, the result is n, because n | n = n.
__device__ unsigned lacking(const longlong2& words, unsigned wanted) {
  return ((wanted - (unsigned)words.x) | (wanted - (unsigned)words.y)) % (1 << COUNT_BITS);
}

// Which thread clears a buffer? None does. There are two buffers, and they alternate:
//
//                    buffer 0                             buffer 1
//     layer l        holds x, which blocks read           holds an older x; blocks add to it
//     layer l + 1    holds an older x; blocks add to it   holds x, which blocks read
//
// For each column, one thread of the grid is the *carrier* of the word. It adds x - old, where old is the
// value that the buffer still holds. The old value cancels, in whatever order the additions arrive. For
// example, the buffer holds 5, x is 8, and two clusters add 1 and 2:
//     5 + (8 - 5) + 1 + 2  =  11  =  8 + 1 + 2
//
// The count needs the same care. Here a word gets 3 additions in each round, so its old count is 3. If the
// new round also ended at 3, the old word would look complete. So this round counts from 256 (LAP), and the
// next round in this buffer counts from 0 again. The carrier sets the start: its addition also raises the
// count by 256 - 3. The word is complete at 256 + 3 = 259:
//                           value   count
//     old word              5       3
//     a cluster adds 1      6       4       before the carrier, the count is 3, 4 or 5
//     the carrier adds      9       258     value + 8 - 5; count + 1 for this addition, + 256, - 3
//     a cluster adds 2      11      259     complete
//
// Can a fast block add to a buffer that a slow block still reads? No, because of this order:
//   1. In layer l, the slow block reads buffer 0. Then it adds to buffer 1.
//   2. Buffer 1 is complete only after all blocks have added to it, including the slow block. This is (4).
//   3. In layer l + 1, the fast block passes this (4), and only then adds to buffer 0.

// Where the count begins in the buffer that holds x after `steps` layers: at 0 or at 256.
__device__ int first_count(unsigned steps) { return steps / 2 % 2 * LAP; }

__device__ long long* Worker::buffer(unsigned steps) const { return m.residual + steps % 2 * C; }

// S9 SUM, the carrier's part
//   math    x_next += x + output biases - old
//   who     one thread for each pair of columns, in the last blocks of the grid, 128 to 131. They have no
//           head. In small models, where a head takes the longest time, they would otherwise wait
//   bytes   8 * C for the whole grid, 20 KB to L2
//   syncs   none
//   own_now    the two words of x_now that this thread carries, as read in this layer
//   own_next   the same two words of x_next, as read one layer ago, when that buffer was x_now
// Before the first layer of a launch, begin() sets both. In layer 0, x is the token's embedding. Differences
// are computed unsigned, because they may wrap around.
__device__ void Worker::carry(int layer, int token, long long* x_next, unsigned steps) const {
  const int c = 2 * carried;
  if (c >= C) return;
  const Layer& w = m.layers[layer];
  const int count = first_count(steps + 1);
  const float2 out = widen2(w.b_out + c), down = widen2(w.b_down + c),
               x = layer == 0 ? widen2(embedding(token) + c)
                              : make_float2(from_word(own_now.x), from_word(own_now.y));
  add_relaxed(x_next + c, to_word(x.x + out.x + down.x) + count - (unsigned long long)own_next.x);
  add_relaxed(x_next + c + 1, to_word(x.y + out.y + down.y) + count - (unsigned long long)own_next.y);
}

// S9 SUM, second half
//   math    x_next += sum_r sums[r]
//   who     rank r adds the OWN columns from r * OWN on; thread i takes every 320th of them, from the i-th on
//   bytes   8 * C for a cluster, 20 KB to L2
//   syncs   none; cluster_reduce has passed (3)
// The sums of the ranks are still fp32, so they are added in the order of ranks. The 32 additions of a warp
// are 256 bytes side by side, which L2 takes as two requests.
__device__ void Worker::add_to_residual(long long* x_next) const {
  for (int c = tid; c < OWN; c += WORKERS) {
    float sum = 0;
#pragma unroll 8
    for (int from = 0; from < K * TEAMS; from++) sum += s.sums[from][c];
    add_relaxed(x_next + s.plan.rank * OWN + c, to_word(sum));
  }
}

// S0 READ X
//   math    x = the values of all words, once they are complete; in layer 0, a row of embed_in
//   who     each thread reads 4 pairs of columns and puts them into shared memory. Then it takes its own 8
//   bytes   8 * C, 20 KB from L2
//   syncs   (4) thread 0 polls one pair of columns until it is complete, and (g) makes the block wait for
//           thread 0. Then each thread reads its 4 pairs until they are complete, (4) again. (a) makes all
//           threads wait until all columns are in shared memory
// Why does x go through shared memory? Neighbouring threads read neighbouring pairs, so a load of a warp is
// 512 bytes side by side. If each thread read its own 8 columns, the same load would be spread over 2048
// bytes. With several teams in a block (chapter 13), this also saves reads, because a word that several
// threads need is read by one thread alone.
constexpr int PAIRS = ceil_div(C / 2, WORKERS);  // [4]

__device__ void Worker::read_x(int layer, int token, const long long* x_now, unsigned steps, Columns& x) {
  if (tid == 0) s.layer = layer;
  if (layer == 0) read_embedding(token, x);
  else {
    const unsigned wanted = s.plan.clusters + 1 + first_count(steps);  // 66 clusters and the carrier
    wait_for_x(x_now, wanted);
    mark(MARK_START, layer);
    read_residual(x_now, wanted, x);
  }
}

// If all threads read x again and again, they slow down the additions that they wait for: a token takes 1257
// us instead of 1202. So at first only thread 0 polls, and only one pair of words. This is the last pair of
// its rank's columns, which clusters add last. Without (g) the results would be the same, but all threads
// would poll. If a block hangs, it never adds its columns. Thread 0 of every block with the same rank polls a
// pair of these columns, so it reaches its limit, and the launch ends with an error.
__device__ void Worker::wait_for_x(const long long* x_now, unsigned wanted) const {
  if (tid == 0) {
    const long long start = clock64();
    for (unsigned lack; (lack = lacking(load_relaxed(x_now + (s.plan.rank + 1) * OWN - 2), wanted));)  // (4)
      if (clock64() - start > PATIENCE) give_up(m.failure, SYNC_X, s.layer, lack);
  }
  workers_sync();  // (g)
}

// When the polled pair is complete, most other pairs are complete, too. Every thread still checks the 4 pairs
// that it reads, and reads them again until all are complete.
__device__ void Worker::read_residual(const long long* x_now, unsigned wanted, Columns& x) {
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

// A token of -1 means that the logits were not finite. The launch then goes on with row 0 of embed_in, and
// the host ends the text at the -1.
__device__ const half* Worker::embedding(int token) const {
  return m.embed_in + (size_t)min(max(token, 0), V - 1) * C;
}
__device__ void Worker::read_embedding(int token, Columns& x) const {
  for (int p = 0; p < PIECES; p++) widen(load16(embedding(token) + column(8 * p)), x + 8 * p);
}

// 9. The LM head, and the next token ======================================================================
// The problem. The LM head is one more matrix, V rows of C. A block multiplies 381 or 382 of the 50304 rows,
// and each row gives the *logit* of one token of the vocabulary. From the logits, all blocks have to choose
// the same next token. At temperature 0 this is the token with the largest logit, a maximum over the grid. At
// other temperatures the token is drawn at random, with the probabilities p = softmax(logits / temperature).
// *top-k* restricts the draw to the top_k likeliest tokens, and *top-p* to the fewest likeliest tokens that
// have the probability top_p together. Taken literally, a draw needs a sum over all logits, a sort, and sums
// along the sorted order. But the logits are spread over 132 blocks.
//
// The answer: a draw is an argmax. Give each token i an alarm clock, which rings after the time
//     E_i * exp(-logit_i / temperature)
// where each E_i is an independent random number, exponentially distributed with mean 1. Then clock i is the
// first to ring with exactly the probability p_i. Take the logarithm of the time, times -temperature:
//     key_i = logit_i - temperature * log(E_i)
// The first clock to ring has the largest key. So a draw is the argmax of logits with noise added to them
// (the Gumbel-max trick). Temperature 0 is the case without noise, so one path of code serves both.
//
// The noise comes from Philox, a function that scrambles (seed, position, token) into 32 random bits. Philox
// keeps no state, so each thread can compute the noise of its own tokens at any time. The text then depends
// neither on the size of the grid nor on the number of tokens that a launch makes. Sampler in model.py
// computes the same noise.
//
// How do top-k and top-p work without a sort? Call one token *likelier* than another if its logit is larger,
// or if the logits are equal and its id is smaller. Then each token can be tested by itself:
//     top-k keeps a token if fewer than top_k tokens are likelier
//     top-p keeps a token if the likelier tokens together have less than the probability top_p
// So the grid chooses in rounds:
//     (5)  vote     find the token with the largest key: the *candidate*
//     (6)  tally    count the tokens that are likelier than the candidate, and add up their probability
//          If top-k and top-p keep the candidate, it is the next token. Otherwise, the next round considers
//          only the tokens that are likelier than the candidate
// Every kept token is likelier than a refused candidate. So all kept tokens stay in the vote, with the same
// noise, until one of them wins it. This winner has the largest key of all kept tokens, so it is a draw from
// the kept tokens. Every refusal leaves fewer tokens, and the likeliest one is always kept, so the rounds
// end. With top_p = 0.95, the first candidate is kept with a probability of 0.95 or more.
//
// With top-k and top-p together, top_p is a share of the probability of the top_k likeliest tokens. For
// example, top_k = 3 and top_p = 0.7, and a vocabulary of five tokens:
//     token                           A       B       C       D       E
//     probability                     40 %    25 %    20 %    10 %    5 %
//     how many tokens are likelier    0       1       2       3       4       top-k keeps A, B and C: 85 %
//     probability of the likelier     0 %     40 %    65 %    85 %    95 %    top-p keeps those below 59.5 %
// The limit of top-p is 0.7 * 85 % = 59.5 %, so A and B are kept. (top-p alone would have the limit 70 %, and
// keep C.) The test therefore needs the 85 % first. A tally of the tokens that are likelier than D would give
// it, but no logits are sorted, so D is not known to be the fourth. The grid searches for a boundary between
// C and D by bisection. Each step is a tally: does it count more than 3 tokens above the boundary, fewer, or
// 3?
//
// Continue the example. Noise makes C the candidate of the first vote. The next tallies search the boundary,
// and find 3 tokens with 85 % above it. Then a tally for C counts 2 likelier tokens with 65 %. 2 is less than
// 3, but 65 % is not less than 59.5 %, so C is refused. The second vote is among A and B. Say that B wins. A
// tally for B counts 1 likelier token with 40 %, so B is kept: it is the next token.

__device__ void arrive_release(unsigned* counter);               // adds 1 to a counter in global memory
__device__ unsigned load_acquire(const unsigned* counter);
__device__ float load_relaxed(const float* p);
__device__ float log_exponential(unsigned long long seed, uint32_t position, uint32_t token);  // log(E)

// The *order* of a token is a 64-bit number. A likelier token has a larger order, so a maximum of orders is
// an argmax. The upper 32 bits are made of the logit. The bits of a logit compare like those of an unsigned
// integer after one change: flip all bits of a negative number, and set the sign bit of a positive one. NaN
// is above all other logits, as in torch. The lower 32 bits are the token's id, flipped, so that the smaller
// id is larger. token_of and logit_of take an order apart again. The order of a key is made in the same way.
//
// Three names of this chapter's code have other meanings elsewhere. Here a variable `rank` is the order of a
// token, not a block of a cluster. `candidate` as an argument or in choose() is the order of the candidate's
// logit, or 0 if there is no candidate yet, and s.candidate is that logit itself. s.agreed and s.warp_votes
// hold maxima in a vote, and sums in a tally.
__device__ unsigned long long order_of(float logit, int token) {
  const uint32_t bits = __float_as_uint(logit + 0.f);  // -0 becomes 0, its equal
  const uint32_t order = logit != logit ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
  return (unsigned long long)order << 32 | ~(uint32_t)token;
}
__device__ int token_of(unsigned long long rank) { return (int)~(uint32_t)rank; }
__device__ float logit_of(unsigned long long rank) {
  const uint32_t order = rank >> 32;
  return __int_as_float(order >> 31 ? order & ~(1u << 31) : ~order);
}

// The largest v of a warp's 32 lanes, and the sum of all of them. CUDA has one instruction for each, but only
// for 32 bits, so two of them are combined here. In warp_sum, the upper parts of 32 values have to add up to
// less than 2^32, so each v has to be below 2^47.
__device__ unsigned long long warp_max(unsigned long long v) {
  const uint32_t high = __reduce_max_sync(~0u, (uint32_t)(v >> 32));
  return (unsigned long long)high << 32 | __reduce_max_sync(~0u, v >> 32 == high ? (uint32_t)v : 0);
}
__device__ unsigned long long warp_sum(unsigned long long v) {
  const uint32_t low = __reduce_add_sync(~0u, (uint32_t)v % (1 << 20));
  return ((unsigned long long)__reduce_add_sync(~0u, (uint32_t)(v >> 20)) << 20) + low;
}

// Returns the id of the token whose logit this thread keeps in logits[k], or V if it keeps none there. After
// a dot tile every warp has the results of all 8 rows, but one thread is enough to keep a result. So the 320
// threads form 40 GROUPS of 8 lanes, and group g keeps the results of the block's tiles g and g + 40. A
// thread has KEPT = 3 places for logits, so that a grid of half as many blocks (MIN_BLOCKS) can still keep
// all of them.
constexpr int GROUPS = TEAM / ROWS;
__device__ int Worker::kept_token(int k) const {
  const int i = (k * GROUPS + team_thread / ROWS) * TILE_ROWS;
  return i + row < s.rows.count ? s.rows.at(i) + row : V;
}

// S10 LM HEAD
//   math    logits = rows . LNf(x); noise = -temperature * log(E)
//   who     each block, for the rows in s.rows; one thread keeps the logit of a row
//   bytes   2 * V * C / 132, 1.95 MB, 55 us
//   syncs   (F) (E) for each half tile; (c) for each tile. read_x has passed (4)
// The noise does not depend on the logits, so it can be made at any time. Half way through the loop is a good
// time. In this loop workers are faster than memory, so the ring is nearly empty. While the workers make
// noise, the ring fills, and no copy has to stop.
__device__ void Worker::lm_head(const Columns& in, int position) {
  const int count = s.rows.count;
  for (int k = 0; k < KEPT; k++) noise[k] = 0;
  for (int i = 0; i < count; i += TILE_ROWS) {
    const float logit = dot_tile(in, min(TILE_ROWS, count - i), 0, false);
#pragma unroll
    for (int k = 0; k < KEPT; k++)
      if (i == (k * GROUPS + team_thread / ROWS) * TILE_ROWS) logits[k] = logit;
    if (i == count / 2 / TILE_ROWS * TILE_ROWS && s.settings.temperature > 0)
#pragma unroll
      for (int k = 0; k < KEPT; k++)
        if (kept_token(k) < V)
          noise[k] = -s.settings.temperature * log_exponential(s.settings.seed, position, kept_token(k));
  }
#pragma unroll
  for (int k = 0; k < KEPT; k++)
    if (kept_token(k) < V) m.logits[kept_token(k)] = logits[k];
}

// (5) VOTE
//   math    s.agreed = {largest order of a logit, largest order of a key}, over the tokens that are likelier
//           than `candidate` (over all tokens, if `candidate` is 0). With top-k or top-p, s.candidate = the
//           logit of the token with the largest key
//   who     each thread for the logits that it keeps; then warps; then thread 0 for the block; then L2 for
//           the grid
//   syncs   (f) thread 0 waits for all warps; (5); (g) all threads wait for thread 0
// All blocks write to the same two maxima, in any order. A word of x counts its additions, but a maximum does
// not. So a separate counter counts the blocks. After (f), thread 0 first gives the block's maxima to the
// grid, and then adds 1 to the counter with a release. A thread that sees this 1 by an acquire also sees the
// maxima, and everything that the block wrote before (f): its logits, and its k and v of the new token. The
// counter is never reset. Vote n is complete when the counter has reached n * blocks. The sign of the
// difference tells this, and it stays right when the counter overflows.
//
// The maxima have to be 0 before a vote. There are three pairs of them, which take turns. Follow one pair:
//     vote n - 2    all blocks use the pair
//     vote n - 1    each block arrives at (5) only after it has read the pair
//     vote n        thread 0 of block 0 has passed (5) of vote n - 1. It clears the pair, then arrives at (5)
//     vote n + 1    all blocks use the pair again. They have passed (5) of vote n, so it is clear
__device__ void Worker::vote(unsigned long long candidate) {
  if (blockIdx.x == 0 && tid == 0) m.state->maxima[(s.votes + 1) % 3] = {0, 0};

  // Take the maxima of this thread, of its warp, and of its block.
  unsigned long long best = 0, drawn = 0;
#pragma unroll
  for (int k = 0; k < KEPT; k++) {
    const int token = kept_token(k);
    const unsigned long long rank = token < V ? order_of(logits[k], token) : 0;
    if (rank <= candidate) continue;
    best = max(best, rank);
    drawn = max(drawn, order_of(logits[k] + noise[k], token));
  }
  best = warp_max(best), drawn = warp_max(drawn);
  if (lane == 0) s.warp_votes[warp] = {best, drawn};
  workers_sync();  // (f)
  if (tid == 0) {
    for (int from = 1; from < WARPS; from++)
      best = max(best, s.warp_votes[from].x), drawn = max(drawn, s.warp_votes[from].y);

    // Give the block's maxima to the grid, and wait until all blocks have done so.
    State& state = *m.state;
    Maxima& maxima = state.maxima[s.votes % 3];
    atomicMax(&maxima.best, best), atomicMax(&maxima.drawn, drawn);
    const unsigned target = ++s.votes * gridDim.x;
    arrive_release(&state.counter);  // (5)
    const long long start = clock64();
    for (unsigned seen; (int)((seen = load_acquire(&state.counter)) - target) < 0;)  // (5)
      if (clock64() - start > PATIENCE) give_up(m.failure, SYNC_VOTE, s.layer, target - seen);

    // Give the grid's maxima to the block.
    const longlong2 found = load_relaxed((const long long*)&maxima);
    s.agreed = {(unsigned long long)found.x, (unsigned long long)found.y};
    const bool cut = s.settings.top_k < V || s.settings.top_p < 1;
    if (cut) s.candidate = load_relaxed(m.logits + token_of(found.y));
  }
  workers_sync();  // (g)
}

// (6) TALLY
//   math    s.agreed = {probability, number} of the tokens that are likelier than `candidate`. Without
//           `with_count`, the second result is the probability of all tokens instead
//   who     as for (5)
//   syncs   (f), (6), (g)
// A probability is an integer here, in units of 1 / 2^30 of the likeliest token's probability. So the sums do
// not depend on the order of the blocks. A sum can count its additions, as a word of x does (chapter 8), so
// no counter with a release is needed. A pair of such words holds the two results. The pair is never cleared.
// Instead, thread 0 keeps in tally_before what the pair held when it was last used, and subtracts that. Two
// pairs take turns, so that no block adds to a pair that another block still reads:
//     tally n        all blocks use the first pair
//     tally n + 1    each block adds to the second pair only after it has read the first
//     tally n + 2    each block adds to the first pair again. It has passed (6) of tally n + 1, for which all
//                    blocks had to add, so all blocks have read the first pair
__device__ ulonglong2 Worker::tally(float largest, unsigned long long candidate, bool with_count) {
  unsigned long long before = 0, other = 0;
#pragma unroll
  for (int k = 0; k < KEPT; k++) {
    const int token = kept_token(k);
    if (token == V) continue;
    const unsigned long long mass =
        __float2ull_rz(expf((logits[k] - largest) / s.settings.temperature) * (1 << 30));
    const bool is_before = order_of(logits[k], token) > candidate;
    before += is_before ? mass : 0;
    other += with_count ? is_before : mass;
  }
  before = warp_sum(before), other = warp_sum(other);
  if (lane == 0) s.warp_votes[warp] = {before, other};
  workers_sync();  // (f)
  if (tid == 0) {
    for (int from = 1; from < WARPS; from++) before += s.warp_votes[from].x, other += s.warp_votes[from].y;

    // Add to both words, and wait until each has had an addition from every block.
    const int turn = s.tallies++ % 2;
    long long* const words = &m.state->tally[turn].x;
    add_relaxed(words, before << COUNT_BITS | 1), add_relaxed(words + 1, other << COUNT_BITS | 1);
    longlong2& old = s.tally_before[turn];
    longlong2 now;
    const unsigned wanted = (unsigned)old.x + gridDim.x;  // both words have the same count
    const long long start = clock64();
    for (unsigned lack; (lack = lacking(now = load_relaxed(words), wanted));)  // (6)
      if (clock64() - start > PATIENCE) give_up(m.failure, SYNC_TALLY, s.layer, lack);
    s.agreed = {(unsigned long long)(now.x - old.x) >> COUNT_BITS,
                (unsigned long long)(now.y - old.y) >> COUNT_BITS};
    old = now;
  }
  workers_sync();  // (g)
  return s.agreed;
}

// Returns the next token: of all tokens that top-k and top-p keep, the one with the largest key. Returns -1
// if the largest logit is not finite.
__device__ int Worker::choose() {
  const unsigned top_k = s.settings.top_k;
  const double top_p = s.settings.top_p;
  const bool cut_k = top_k < V, cut_p = top_p < 1;
  bool bisect = cut_k && cut_p;
  unsigned long long candidate = 0, low = 0, high = 0, mass = 0;
  float largest = 0;
  while (true) {
    // Vote for a candidate, in the first round among all tokens.
    vote(candidate);
    const int token = token_of(s.agreed.y);
    if (candidate == 0) {
      high = s.agreed.x, largest = logit_of(high);
      if (!(fabsf(largest) <= 3.4028235e38f)) return -1;
      if (s.settings.temperature == 0 || !(cut_k || cut_p)) return token;
    }
    candidate = order_of(s.candidate, token);

    // If top-k and top-p are both set, the first round searches between the orders low and high, until
    // exactly top_k tokens are above `middle`. Their probability is `mass`. After that, and in all other
    // cases, tally the tokens that are likelier than the candidate. found.x is their probability. found.y is
    // their number with top-k, and the probability of all tokens without it.
    ulonglong2 found;
    while (true) {
      const unsigned long long middle = low + (high - low) / 2;
      found = tally(largest, bisect ? middle : candidate, cut_k);
      if (!bisect) break;
      if (found.y == top_k) mass = found.x, bisect = false;
      else (found.y > top_k ? low : high) = middle;
    }

    // Test the candidate. If it is refused, the next vote is among the tokens that are likelier than it.
    if ((!cut_k || found.y < top_k) && (!cut_p || found.x < top_p * (cut_k ? mass : found.y))) return token;
  }
}

// Computes the logits, chooses the token, and prepares what the next token needs. The choice adds nothing to
// x, so run() does not swap the buffers here. Layer 0 of the next token takes the embedding instead of x_now,
// and adds to x_next. The carrier's words stay right: own_now is what x_now holds, as read in this pass.
__device__ int Worker::next_token(const Columns& xn, int position, int end) {
  // Prepare plan and angles of the next token. Thread 0 may overwrite s.plan now, because no thread uses this
  // token's plan and angles after (a) in read_x, and all threads have passed this (a). `plan` in run() refers
  // to s.plan, so the next token's layers find the new plan there.
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
// The problem. All blocks wait for the slowest one at (4), and in 2.8b the time of a block is proportional to
// the bytes that it reads. So all blocks should read the same number of bytes. A head costs each block of its
// cluster H bytes, and a hidden unit costs 4 * C bytes. A number n of the blocks have a head. Each of these
// takes u units, and each of the others takes r units:
//     H + 4*C * u = 4*C * r                       all blocks read the same number of bytes
//     n * u + (blocks - n) * r = MLP              all units are dealt out
// For 2.8b, H is the bytes of 83 units, and n is 64. The solution is u = 34.8 and r = 117.8. The 34
// clusters without a head do nothing but hidden units.
//
// Which units does a block get? Memory is faster when all blocks read near one another. So a block does not
// get one long run of units. Tiles of units are dealt out like cards: the first tile to the first block, the
// next tile to the next block, and so on, for as many rounds as are complete. The units that remain are split
// into one short run for each block. For example, each of the 68 blocks without a head gets 14 tiles of 8
// units, and a run of 5 or 6 units. Dealt out like this, a token takes 0.6 % less time, and one of
// pythia-1.4b 2 % less. Rows of the LM head are dealt out in the same way.
//
// Two costs are not bytes, but make_plan counts them as bytes:
//   - Softmax makes a cached token slower to use than to read, so its bytes count 1.5 times (KV_WEIGHT / 2).
//     With T = 2000, this makes a token take 3 % less time.
//   - In small models, the short steps of a head take time in which a block reads little. make_plan counts
//     this time as if the block had read ATTENTION_BYTES more: 24 KiB in pythia-160m. In 2.8b these are 0,
//     because there the producer fills the ring during these steps.
constexpr int KV_WEIGHT = 3;
static_assert(64ll * (8ll * HS * C + 2ll * KV_WEIGHT * HS * CTX + ATTENTION_BYTES) < 1ll << 31,
              "make_plan counts in 32 bits");

__device__ int Share::at(int i) const {
  return i < dealt ? first_dealt + i * blocks : first_rest + i - dealt;
}

// Returns the share of block `index` of `blocks` in n rows from `first` on. The share has end - begin rows.
// The first `dealt` of them come in whole tiles, and the others are one run, from first_rest on:
//     first_rest = first
//                  + dealt * blocks             the dealt tiles of all blocks
//                  + begin - dealt * index      the runs of the blocks with a smaller index
__device__ Share deal(int first, int n, int index, int blocks) {
  const int begin = n * index / blocks, end = n * (index + 1) / blocks;  // a run, if no tiles were dealt out
  const int dealt = n / blocks / TILE_ROWS * TILE_ROWS;
  return {end - begin, dealt, first + index * TILE_ROWS, blocks, first + begin + dealt * (blocks - index)};
}

__device__ __noinline__ Plan make_plan(int block, int blocks, int position) {
  Plan p;
  p.rank = block % K; p.cluster = block / K; p.clusters = blocks / K;
  const int heads = NH / p.clusters, busy = NH % p.clusters * K;  // the first `busy` blocks have one more

  // Solve the equation in *grains*: 1 / 256 of a hidden unit, or C / 64 bytes. So 32 bits are enough for all
  // numbers. Division of 64 bits is slow on a GPU.
  const int head_bytes = (8 * HS * C + 2 * KV_WEIGHT * HS * position) / K + ATTENTION_BYTES;
  const int head_grains = 64 * head_bytes / C, fair_grains = (256 * MLP + head_grains * NH * K) / blocks;
  const int busy_grains = max(fair_grains - (heads + 1) * head_grains, 0);  // u, in grains
  const int busy_units = busy_grains * busy / 256;
  const bool is_busy = block < busy;
  p.units = is_busy ? deal(0, busy_units, block, busy)
                    : deal(busy_units, MLP - busy_units, block - busy, blocks - busy);

  // When to do the units: `filler` units during (1) and during (2) of every head, and the rest at the end.
  // filler is a number of whole tiles, because units() goes on in whole tiles and would step past its end.
  const int shares = 2 * (heads + is_busy) + 1;
  p.filler = ceil_div(ceil_div(p.units.count, shares), TILE_ROWS) * TILE_ROWS;

  // Split the cached tokens among the ranks.
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

__device__ void Worker::prepare(int at) const {  // for the token at position `at`
  if (tid == 0) s.plan = make_plan(blockIdx.x, gridDim.x, at);
  load_rope(m, s, at, WORKERS);
}

// All that the producer does: for each token, it copies the rows of the layers and of the LM head. It copies
// rows for a token that has not been chosen yet. This works because only the row of embed_in depends on the
// token, and the workers read that row themselves.
__device__ void Producer::run(int first_layer, int last_layer, int first, int end, bool with_lm_head) {
  for (int position = first; position < end; position++) {
    const Plan plan = make_plan(blockIdx.x, gridDim.x, position);
    layers(plan, first_layer, last_layer, position == first);
    if (with_lm_head)
      for (int i = 0; i < s.rows.count; i += TILE_ROWS)
        rows(m.embed_out, nullptr, s.rows.at(i), s.rows.at(i) + min(TILE_ROWS, s.rows.count - i));
  }
  wait(m, s, &s.workers_done, 0, SYNC_FULL);  // stays until all workers are done: chapter 16
}

// The number of the pair of words that this thread carries, the same as Worker::carried.
__device__ int carried_pair() { return (gridDim.x - 1 - blockIdx.x) * WORKERS + threadIdx.x; }

// Before its first layer, a carrier needs the old words of both buffers (chapter 8). The words of x_now come
// from the kernel below, which has loaded them. The last launch has cleared x_next, so its old words are 0.
// They must not be loaded, because a faster block may already have added to them.
__device__ void Worker::begin(int first_layer, const longlong2& carried_words) {
  own_now = carried_words;
  own_next = {0, 0};  // cleared by the last launch
  norms = load_norms(first_layer);
}

// Clears x_next for the next launch, and writes State. This is safe. This block has seen that x_now is
// complete, so every block has added to x_now. A block adds to x_now only after it has read x_next for the
// last time. Each block reads State even earlier, at its start.
__device__ void Worker::finish(long long* x_next, int token, int position, unsigned steps) const {
  if (lane == 0) barrier_arrive(&s.workers_done);
  if (2 * carried < C) x_next[2 * carried] = x_next[2 * carried + 1] = 0;
  if (blockIdx.x == 0 && tid == 0) {
    State& state = *m.state;
    state.token = token, state.position = position, state.steps = steps, state.votes = s.votes;
  }
}

__device__ void barriers_exist();  // makes initialised mbarriers known to peers and to bulk copies
__device__ void cluster_sync();    // waits until all threads of all blocks of the cluster are here

// The kernel: the function that every thread of the grid runs. threadIdx.x is the number of the thread in its
// block, blockIdx.x the number of the block, gridDim.x the number of blocks. __launch_bounds__ says that a
// processor runs one block of 352 threads, so that the compiler can use all registers for them.
// __grid_constant__ says that the threads share one copy of the parameter. `raw` is the block's shared
// memory, whose size the launch sets.
//   new_tokens    make up to this many tokens, fewer if the cache becomes full. If it is 0, only layers
//                 first_layer to last_layer - 1 run, without the LM head
__global__ void __launch_bounds__(WORKERS + 32, 1)
fused_block(const __grid_constant__ Model m, const int first_layer, const int last_layer,
            const int new_tokens) {
  extern __shared__ __align__(128) uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const State& state = *m.state;
  const int token = state.token, position = state.position;
  const unsigned steps = state.steps;

  // If the cache is full, all blocks leave, and nothing changes.
  const int end = min(position + max(new_tokens, 1), CTX);
  if (position >= end) return;

  // Set up what the block shares.
  if (threadIdx.x == 0) {
    s.plan = make_plan(blockIdx.x, gridDim.x, position);
    s.rows = deal(0, V, blockIdx.x, gridDim.x);
    s.settings = *m.settings;
    s.tally_before[0] = state.tally[0], s.tally_before[1] = state.tally[1];
    s.votes = state.votes, s.tallies = 0;
    for (int i = 0; i < SLOTS; i++) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], WARPS);
    barrier_init(&s.qkv_ready, 1), barrier_init(&s.attention_ready, 1), barrier_init(&s.sums_ready, 1);
    barrier_init(&s.token_ready, 1), barrier_init(&s.workers_done, WARPS);
    barriers_exist();
  }
  load_rope(m, s, position, WORKERS + 32);

  // Load the old words of x_now that this thread carries. This has to happen before any block adds to x_now:
  //   1. Each thread loads its words here, and then passes (0).
  //   2. Each block adds to x_next in its first layer, which begins after its own (0).
  //   3. A block passes the next (4) only when every block has added to x_next.
  //   4. After this (4), the block adds to x_now. By then, all loads of step 1 are done.
  longlong2 carried_words = {0, 0};
  if (threadIdx.x < WORKERS && 2 * carried_pair() < C)
    carried_words = load_relaxed(m.residual + steps % 2 * C + 2 * carried_pair());

  // (0) A push must not go to a block that has not begun, or to an mbarrier that is not initialised. So the
  // blocks of a cluster wait for each other.
  cluster_sync();  // (0)

  // The first thread of the last warp is the producer. The other 31 threads of this warp have no work.
  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS) Producer{m, s}.run(first_layer, last_layer, position, end, new_tokens > 0);
    return;
  }

  // All other threads are workers.
  Worker{m, s}.run(s.plan, first_layer, last_layer, new_tokens, token, position, end, steps, carried_words);
}

// 11. A layer in time =====================================================================================
// This table follows thread 0 of block 11 through one layer. Block 11 is rank 1 of cluster 5. A line ends at
// the mark in its first column (chapter 18). The columns of numbers, all rounded, are:
//     KB       what the block reads
//     share    how many us these bytes take at 35.8 KB a us, a block's share of the memory's rate
//     took     how many us the line took, as a mean over the layers of the record in results/
// S2 takes less than its share, because the ring is already full when S2 begins. Block 11 reads a little less
// than the mean block, whose bytes take 33.6 us.
//
//  mark        thread 0 of block 11                                          KB  share  took  waits for
//  NORM        S0: reads columns 2i, 2i + 1 of x for i = 0, 320, 640, 960                 2.3  L2, (a)
//              S1: normalizes columns 0..7, which it has from here on                          (b)
//  QKV         S2: rows 1320..1439: head 5, k from dimension 40 on, and v    615   17.2  13.2  memory
//  1           S8: units 88..95, 600..607; (1)                               164    4.6   4.3  memory
//  ATTEND      S3: rotates q[0] with q[10]; S4: threads 80..239 append k, v               1.7  (d)
//              S5: takes dimensions 0..7 of tokens 64, 84, 104, 124           20    0.6        (e)
//              S5: merges o[0] of 10 warps, and pushes it to rank 0
//  2           S8: units 1112..1119, 1624..1631; (2)                         164    4.6   3.6  memory
//  OUT, UNITS  S6, S7: output rows 440..479; S8: units 2078..2080            236    6.6   6.9  memory
//  3           S9: pushes y[0..7] to rank 0; (3)                                          0.7  peer's sums
//  ADDED       S9: adds columns 1280, 1600, 1920, 2240 of the sum to x                    0.4  L2
//  START       (4): polls columns 2558 and 2559 of x                                      2.9  other blocks
//  a layer                                                                  1198   33.5  36.0
//
// A layer takes 2.5 us longer than its bytes need. Nearly all of this time is lost between two layers. From
// the last unit of a layer to the end of the next S2 pass 19.5 us, 2.3 us more than the bytes of S2 need. In
// the first 6.3 of these us, which are S9, (4), S0 and S1, the workers free no slot. The ring fills in 5.7
// us, so memory pauses for 0.6 us. The other 1.7 us are not explained. The 2.9 us at (4) have three parts:
// 1.0 us until the last block of the grid has added, 1.6 us until the first block sees a complete x, and 0.3
// us until block 11 sees it.
//
// Follow one number: hidden unit 602 of block 11, in layer 0 of a launch's first token.
//  1. Its up row lies in global memory: w_up + 602 * C, 5120 bytes.
//  2. Unit 602 belongs to the block's second tile of units, 600..607. Before this tile, the producer of block
//     11 has copied 34 half tiles: 30 for S2, and 4 for the first tile of units. These are three rounds of
//     the ring and 4 slots, so rows 600..603 go to slot 4. The producer waits until slot 4 is empty, (E),
//     announces 20480 bytes of rows and 16 of biases at full[4], and starts two copies: to ring[4] and to
//     bias[4].
//  3. When all bytes have landed, (F) lets the workers go on. Thread 0 reads columns 0..7 of row 602 from
//     ring[4], multiplies them with its xn2[0..7], and adds the products up in dots[2]. Threads 1 to 319 do
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

// 12. Why it is safe ======================================================================================
// Inboxes. A peer must not overwrite an inbox that its owner has not read yet. Events come in this order:
//     1. The owner reads the inbox.
//     2. The owner sends its next message.
//     3. The peer waits for this message.
//     4. The peer pushes into the inbox again.
// Three kinds of inboxes follow this rule:
//
//     inbox                  is read in  the owner's next message                    the peer waits for it at
//     qkv                    S3          its top, l, o of this head, after (d)       (2)
//     peer_o, peer_top_l     S6          q, k, v of the next head, or its y          (1), or (3)
//     sums                   S9          its additions to x                          (4)
//
// For example, the inbox qkv of rank 1 of cluster 5 in two layers. Times are us since layer 0 began, by the
// table of chapter 11.
//     2.3 .. 15.5   Both ranks do S2, and push their rows into this inbox.
//     19.8          Rank 1 passes (1) with parity 0: all 960 bytes have landed.
//     < 21.5        Rank 1 reads the inbox in S3. After (d), all its threads have read it.
//     21.5          Rank 1 pushes its top, l and o to rank 0.
//     25.1          Rank 0 passes (2), which needs this push.
//     38.3          Rank 0 begins S2 of layer 1, and pushes into the inbox again. This is safe.
//     55.8          Rank 1 passes (1) with parity 1.
//
// Buffers of x. A block must not add to a buffer that another block still reads.
//     1. Each block reads x from one buffer.
//     2. Then it adds to the other buffer.
//     3. It passes the next (4), for which every block has to do step 2.
//     4. Then it adds to the first buffer. All blocks have read it in step 1.
// In the first layer of a launch there is no step 3. There, blocks add to the buffer that the last launch has
// cleared, and no block reads it before the next (4).
//
// Parity. One bit is enough if phase n + 1 of an mbarrier cannot complete until every waiting thread has seen
// the end of phase n. What does phase n + 1 need?
//     full, empty   See chapter 5.
//     (1)           This block's own push of q, k and v of the next head. The push comes after (d) of this
//                   head, and every warp arrives at (d) only after it has passed (1).
//     (2)           This block's own push of top, l and o of the next head. The push comes after (d) of that
//                   head, and every warp arrives at that (d) only after it has passed (2) of this head.
//     (3)           This block's own push of y of the next layer. The push comes after (a) of that layer or
//                   of the choice, and every warp arrives at that (a) only after it has passed (3).
//     (h)           The end of the next token. The workers cannot finish that token without rows that the
//                   producer copies after it has passed (h). No other thread waits at (h).
//
// Exit. A block must not end while a push to it or from it is on its way.
//     1. The last pushes of a token are those of y in its last layer.
//     2. The receiver waits for them at (3), and then adds to x.
//     3. The sender passes a (4) that needs this addition.
//     4. Both blocks end after this (4).
//
// The end of a launch is a sync, too: the next launch sees x, the cache and State.
// All this is an argument, not a proof in the terms of PTX's memory model.
//
// The same bits in every run. The plan depends on block, grid and position alone. Sums within a cluster are
// taken in the order of threads, warps and ranks. Only integers come in any order: additions to words of x,
// tallies, and the orders that a vote takes the maximum of.
//
// All syncs, and what happens without them. `python test_block.py -k simulated_sync` leaves out one sync at a
// time. Then the result changes, or the launch does not end. One call is an exception: without the (g) that
// follows (4), the result is right, but the kernel is slower.
//
//     sync  who waits, and for what                                 without it
//     (0)   a cluster's threads: all its blocks have set up         a push into a block that has not begun
//     (1)   a rank: q, k and v from all ranks                       attention with stale q, k or v
//     (2)   a rank: top, l, o from all ranks                        a rank's tokens are forgotten
//     (3)   a rank: y from all ranks                                x lacks what a peer adds
//     (4)   all blocks: x is complete                               LayerNorm of an unfinished x
//     (5)   all blocks: all have voted, k and v are cached          a token chosen from some of the logits
//     (6)   all blocks: the tally is complete                       a candidate tested by some of the logits
//     (F)   workers: a slot is full                                 arithmetic with bytes of an earlier tile
//     (E)   the producer: a slot is empty                           bytes overwritten while in use
//     (a)   workers: all of x is in s.x                             columns of an older x
//     (b)   a team: warp_stats of all its warps                     a mean of stale values
//     (c)   a team: warp_dots of all its warps                      stale dot products
//     (d)   workers: q, k_new, v_new are written, qkv is read       attention with a half-rotated q
//     (e)   push_attention: the results of all warps                a merge with results of an earlier head
//     (f)   thread 0: its block has written all that (5), (6) need  a block takes part before it is done
//     (g)   workers: thread 0 has passed (4), (5) or (6)            a result of (5) or (6) used too early
//     (h)   the producer: thread 0 has passed (5)                   copies of k and v that are not cached yet

// 13. Other shapes ========================================================================================
// Small models: teams. The threads that hold one row are a *team*. A row of pythia-70m has 512 columns, so a
// team is 64 threads. A block has at least THREADS = 256 workers, which are 4 teams here. Each team takes
// different rows: a tile has 8 rows for each team, 32 in all, and row r belongs to team r mod 4. Every team
// has all of x, a y of its own, and a (b) and (c) of its own, by a named barrier with the team's number. At
// (3), all teams push their y to the owner of the columns. The owner adds up K * TEAMS parts, in the order of
// ranks and teams.
// Are the inboxes peer_o and peer_top_l still safe? In pythia-14m with clusters of 4, a rank has 8 output
// rows but 16 teams, so 8 teams have no output row. Such a team may still read peer_top_l while a peer
// overwrites it. This does no harm, because the team uses nothing that it reads. A team with output rows also
// has rows of q, k, v. It reads the inboxes before it sends its next row of q, k, v, and the peer waits for
// that row before it pushes again.
//
// Smallest: half warps. A row of pythia-14m has 128 columns, so a team is 16 threads (LANES), and a warp is
// two teams. Then (b) and (c) are not needed, because a team is within one warp: TEAM_WARPS == 1.
//
// Largest: two pieces. From C = 4096 on, a team with 8 columns for each thread would have 512 threads or
// more. In these models a thread owns PIECES = 2 pieces of 8 columns instead, so the team has half as many
// threads, and each thread can have twice as many registers. The two pieces lie 8 * TEAM columns apart, so
// that neighbouring threads still read neighbouring pieces. ROWS is 4, so that a slot does not grow.
//
// Clusters of 1, 4 and 8. Only the shares change: QKV_ROWS, OUT_ROWS, OWN and the number of tokens. In
// clusters of 1, a block pushes to itself.
//
// More heads than clusters. The loop over h runs several times, and make_plan gives the first blocks one head
// more than the others.
//
// The compiler checks what the code takes for granted. (Its fourth check says: TEAM must be a multiple of 32,
// or 32 a multiple of TEAM.)
static_assert(C % 128 == 0, "a row is dealt out to half-warps, 16 bytes a lane: C must be a multiple of 128");
static_assert(NH * HS == C, "the heads together are as wide as the residual stream");
static_assert(WORKERS % 32 == 0 && WORKERS + 32 <= 1024, "whole warps, and at most 1024 threads in a block");
static_assert(TEAM % 32 == 0 || 32 % TEAM == 0,
              "a team is whole warps, or a warp whole teams: C / 8 (C / 16 from 4096 on) must divide so");
static_assert(TEAM_WARPS == 1 || TEAMS <= 14, "a team of several warps has a named barrier; a block has 16");
static_assert((ROWS & (ROWS - 1)) == 0 && ROWS <= LANES && ROWS % HALF_TILES == 0,
        "reduce_rows folds a power of two of rows over a team's lanes, and a tile comes in equal halves");
static_assert(HS % (2 * K) == 0 && HS % 8 == 0, "ranks share a head's rows evenly; lanes take 8 dimensions");
static_assert(OWN % 8 == 0, "a rank owns whole pieces of a row");
static_assert(HS <= WORKERS, "one thread for each dimension of a head merges the warps' attention");
static_assert(SLOTS >= 2 * HALF_TILES, "two tiles: one being read, one on its way; take fewer ROWS");

// 14. Arithmetic of words =================================================================================
// Resolution. The value of a word is a multiple of 2^-22 = 2.4e-7. Above 2, this is no coarser than fp32.
//
// NaN. If a number is infinite, NaN, or 65536 or more in size, to_word adds FIXED_NAN = 2^47 to the value
// instead. from_word returns NaN if the value is FIXED_EDGE = 2^46 or more in size.
//   - Can other additions hide one FIXED_NAN? No. There are at most 254 others, each below 65536 * 2^22 =
//     2^38 in size, so together they are below 2^46.
//   - Can several FIXED_NANs cancel? The value has 55 bits, so 256 times 2^47 would wrap around to 0. But at
//     most 255 additions come: those of 254 clusters (MOST_CLUSTERS), and the carrier's. Their 255 * 2^47
//     wraps around to -2^47, which is NaN. This is the first reason for 254.
//   - What about a large sum of ordinary additions? It is read correctly up to 2^24. The next carrier adds it
//     as one number, 65536 or more, so x becomes NaN in the next layer.
//
// Old counts. Before its carrier has added, a word has its old count plus the additions of at most 254
// clusters. The word would look complete if its count were 256 above the old one, and 254 additions cannot
// reach that. After the carrier's addition, the count is the true one. It is at most 256 + 254 + 1 = 511, the
// largest number of 9 bits. This is the second reason for 254.

// Noise. Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) takes a counter of 128 bits and a key of 64 bits,
// and returns four numbers of 32 bits, which are called words, too. It has ten rounds. Each round multiplies
// two of the four words by constants, and combines the halves of the products with the other words and the
// key. Here the seed is Philox's key, and (token / 4, position) is the counter, so the four words serve four
// tokens. A word of Philox makes u = (word + 0.5) / 2^32, above 0 and up to 1 after rounding, and E =
// -log1p(-u). A small u gives a small E and so a large sum of logit and noise, and the token with the largest
// sum wins. So a small u has to keep its digits. If E were written as -log(1 - u), a small u would lose them.
__device__ __noinline__ float log_exponential(unsigned long long seed, uint32_t position, uint32_t token) {
  uint32_t count[4] = {token / 4, position, 0, 0}, key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
#pragma unroll 1
  for (int i = 0; i < 10; i++) {
    const unsigned long long a = 0xD2511F53ull * count[0], b = 0xCD9E8D57ull * count[2];
    count[0] = (uint32_t)(b >> 32) ^ count[1] ^ key[0], count[1] = (uint32_t)b;
    count[2] = (uint32_t)(a >> 32) ^ count[3] ^ key[1], count[3] = (uint32_t)a;
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  const uint32_t word = token & 2 ? (token & 1 ? count[3] : count[2]) : (token & 1 ? count[1] : count[0]);
  return logf(-log1pf(-fmaf(__uint2float_rn(word), 0x1p-32f, 0x1p-33f)));
}

// 15. Pace ================================================================================================
// Memory does not serve all processors alike. Some blocks get their rows early, and then wait at (4) for
// blocks that get theirs late. So each producer limits itself to an equal share of PACE, the bytes that all
// blocks together may ask for in a ns. After a copy of b bytes, a producer waits b * blocks / PACE ns before
// the next one. In 2.8b, PACE is what the memory delivers by its clock and the width of its bus, on an H200
// 4814 bytes a ns. Without a pace, a token takes 1223 us instead of 1202, and one of pythia-1b 9 % longer.
//
// A producer that falls behind does not catch up, because memory would not serve the blocks that catch up
// equally, either. When a producer may catch up by 0.3 us, a token takes 0.2 % longer. But the clock advances
// only every 32 ns, so a producer may notice up to 32 ns late that its wait is over. This delay is the
// clock's and not the memory's, so claim() makes up for it: it subtracts CLOCK_NS. A wait of more than 1 ms
// can only mean that the clock was set back, so claim() does not wait then. The GPU has another clock, which
// counts cycles. Cycles get longer when the power limit slows the GPU down, and a pace that is counted in
// cycles makes a token take 2.6 % longer.

// 16. Patience ============================================================================================
// The problem. If a wait never ends, because of a mistake in this file or a fault of the machine, all blocks
// wait for ever, and the host waits with them. So waits at (1) to (6) have a limit of 3 s. The producer's own
// waits, at (E), at (h) and for the end of the workers, have a limit of 6 s. The first thread that reaches
// its limit writes a report to host memory: a SyncId (chapter 5), its block, the layer, and a number. At (5),
// this is the number of blocks that have not voted. At (4) and (6), it is the number of additions that a word
// lacks, if both words of the pair lack the same number. Elsewhere it is the parity. Then the thread executes
// a trap. This ends the launch and all of the process's work on the GPU (its CUDA context), and the host
// turns the report into an error.
//
// The producer's limit is longer so that a worker, which is closer to the cause, reports first. At (F)
// workers have no limit. If they hang there, the producer, which waits for all workers before it exits,
// reaches its limit and reports (F).

// __noinline__ keeps this rare code out of the loops.
__device__ __noinline__ void give_up(Failure* failure, int sync, int layer, int seen) {
  if (atomicCAS_system(&failure->sync, 0, sync) != 0)
    while (true) __nanosleep(1000);  // another thread is writing its report, and its trap ends this one, too
  failure->block = blockIdx.x;
  failure->layer = layer;
  failure->seen = seen;
  __threadfence_system();  // the report is written before the trap
  __trap();
}

__device__ void wait(const Model& m, Shared& s, uint64_t* barrier, uint32_t parity, SyncId sync) {
  const bool by_peers = sync <= SYNC_SUMS;
  if (!barrier_open(barrier, parity, by_peers)) return;
  const long long patience = by_peers ? PATIENCE : 2 * PATIENCE, start = clock64();
  while (barrier_open(barrier, parity, by_peers))
    if (clock64() - start > patience) give_up(m.failure, sync, s.layer, parity);
}

// 17. Toolbox: one function for each instruction that CUDA C++ does not offer =============================
// asm("...") is an instruction of PTX, the GPU's assembly language. %0, %1 ... stand for the operands after
// the colons: first the results, then the inputs. "r" is an operand of 32 bits, "l" one of 64 bits, "=" a
// result. volatile forbids the compiler to remove the instruction. "memory" forbids it to move reads and
// writes from one side of the instruction to the other; otherwise data could be read before it has landed.
// PTX calls a block a cta.

// These instructions take an address in shared memory as 32 bits, not as a pointer of 64 bits.
__device__ uint32_t smem(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ uint32_t peer(const void* place, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem(place)), "r"(rank));
  return address;
}
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

__device__ void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(smem(b)), "r"(arrivals) : "memory");
}
__device__ void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(smem(b)) : "memory");
}
// A phase that expects bytes needs this kind of arrival. A plain arrival could complete the phase before the
// bytes have landed. Bytes may land before this call, because the phase still waits for the arrival.
__device__ void barrier_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(smem(b)), "r"(bytes) : "memory");
}
// Sleeps for a while if the phase is open. The acquire holds only for the thread that calls this function, so
// every thread that reads the data has to call it. Data from a peer needs an acquire for the cluster, which
// empties the processor's own cache (L1, in front of L2). All other waits are for data of the same block, and
// leave L1 as it is.
#define TRY_WAIT(scope) "{\n.reg .pred p;\n" \
    "mbarrier.try_wait.parity.acquire." scope ".shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 0, 1, p;\n}"
__device__ bool barrier_open(uint64_t* b, uint32_t parity, bool by_peers) {
  uint32_t open;
  if (by_peers) asm volatile(TRY_WAIT("cluster") : "=r"(open) : "r"(smem(b)), "r"(parity) : "memory");
  else asm volatile(TRY_WAIT("cta") : "=r"(open) : "r"(smem(b)), "r"(parity) : "memory");
  return open;
}
// Without this, a peer or a bulk copy could use an mbarrier before it is initialised.
__device__ void barriers_exist() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ void named_barrier(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// Weights are read once in a token, but x is read by all blocks. So copies mark their bytes as the first ones
// that L2 may replace. Without this mark, a token takes 1212 us instead of 1202.
__device__ uint64_t read_once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// NVIDIA's name for the hardware that copies is TMA. Addresses and sizes are multiples of 16 bytes.
__device__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* full, uint64_t policy) {
  asm volatile(
  "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      :: "r"(smem(to)), "l"(from), "r"(bytes), "r"(smem(full)), "l"(policy) : "memory");
}
// Bulk copies reach memory on another path (a "proxy") than loads, and an acquire does not order them. After
// this fence, the thread's copies see all that the thread has acquired.
__device__ void order_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

// A plain load could find an old x in the processor's own L1 cache. This load goes to L2, where the additions
// are made, and gets value and count of a word at the same moment.
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
// "red" is an addition that returns nothing, so no thread waits for it. An atomicAdd may make its caller
// wait.
__device__ void add_relaxed(long long* p, long long v) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" :: "l"(p), "l"(v));
}
__device__ void arrive_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(counter) : "memory");
}
__device__ unsigned load_acquire(const unsigned* counter) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
  return v;
}

// .nc loads bytes that nothing writes during the launch.
__device__ uint4 load16(const half* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

__device__ unsigned long long global_ns() {
  unsigned long long t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t;
}

// 18. Taps and marks ======================================================================================
// Compiler options add them. The shipped kernel has neither.
//   -DTAPS       stages write what they compute to Model::taps. The bits of y stay the same. A new tap needs
//                room in Fused.taps in build.py, and a name in test_block.py's STAGES
//   -DTIMELINE   thread 0 of every block writes the time, in ns, at each mark of a layer
__device__ void Worker::tap(int where, float value) const {
#ifdef TAPS
  m.taps[where] = value;
#endif
}

__device__ void Worker::mark(Mark event, int layer) const {
#ifdef TIMELINE  // [blocks][L + 1][MARKS]
  if (tid == 0) m.timeline[((size_t)blockIdx.x * (L + 1) + layer) * MARKS + event] = global_ns();
#endif
}

// 19. Host side ===========================================================================================
// A block waits for all others at (4), (5) and (6). If two launches had half of the GPU each, both would wait
// for ever. So the launch is *cooperative*: with this attribute, the driver starts all blocks at once, or
// refuses.

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

// 20. Binding: plain C, called through Python's ctypes ====================================================
// A function returns NULL, or a text that says what went wrong. CUDA remembers an error until
// cudaGetLastError is called. CHECK calls it, so that a later call does not report the same error again.
#define CHECK(call) \
  do { const cudaError_t e = (call); if (e) return cudaGetLastError(), cudaGetErrorString(e); } while (0)

// Counts the clusters that the GPU holds at once. The query accepts only the first attribute, the cluster's
// size.
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
                                    int last_layer, int new_tokens, void* stream) {
  if (first_layer < 0 || first_layer >= last_layer || last_layer > L || new_tokens < 0 ||
      (new_tokens > 0 && last_layer < L) || (new_tokens > 1 && first_layer > 0))
    return "no such range of layers: take 0 <= first < last <= L; several tokens need all layers";
  const int blocks = clusters * K;
  if (blocks * WORKERS < C / 2 || blocks < MIN_BLOCKS)
    return "too few blocks to carry x, or to keep all logits: launch more clusters";
  if (blocks >= 1 << COUNT_BITS || (long long)V * blocks >= 1ll << 31)
    return "too many blocks for the counts of a tally, or for this vocabulary: launch fewer clusters";
  if (new_tokens > CTX) new_tokens = CTX;
  const Model& m = *reinterpret_cast<const Model*>(pointers);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configure(attributes, clusters, stream);
  CHECK(cudaLaunchKernelEx(&config, fused_block, m, first_layer, last_layer, new_tokens));
  return nullptr;
}

// 21. Exercises ===========================================================================================
// Edits worth trying, with what to expect of a token of 2.8b at T = 128 on an H200.
//
// 1. Clusters of 1 and of 4 (python bench.py --ablate). Expect clusters of 1 to take 28 % longer, because one
//    block has all rows of a head. Expect clusters of 4 to take as long as clusters of 2, although fewer
//    blocks fit on the GPU. Which of (1), (2), (3) takes longer?
// 2. build.py: 4 and 16 ROWS instead of 8. With 4, the block adds up sums of tiles twice as often. Expect a
//    token to take 1.3 % longer. With 16, the ring has 4 slots of 40 KB, which are two tiles, so the producer
//    is at most one tile ahead. Expect a token to take two thirds longer.
// 3. make_plan: filler = 0. The bits of y change, because every thread adds in another order. A block with a
//    head takes longer by the time in which the pushes for (1) and (2) travel. How much is that for a token?
// 4. build.py: attention_kib = 96. By their bytes, blocks with a head add to x 1.4 us earlier, and the others
//    1.3 us later. A token still takes as long as before. Why does it not lose 32 * 1.3 us? (What do blocks
//    wait for at (4), by chapter 11?) At T = 2000, expect 2 % more. Then pace = 2**20, which means no pace:
//    expect 2 % more in 2.8b, and 9 % in pythia-1b.
// 5. Leave out the call of wait_for_x. The bits stay the same, because every thread checks what it reads.
//    Expect a token to take 5 % longer, because all threads poll. Now leave out the check in read_residual
//    instead. How often do the bits change, and why do some launches not end? (See carry.)
// 6. dot_tile: leave out `flip ^= 1`, so that all tiles use the same warp_dots. Find the interleaving of two
//    warps that goes wrong. Count how often it does, on a GPU, or in the random orders of simulator.cpp
//    (test_block.py -k simulated_block).
