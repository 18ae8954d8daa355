// fused_block.cu: one decode step of Pythia in one kernel launch.
//
// A launch runs a range of transformer blocks for one token: LayerNorm, QKV, RoPE, attention over the key/value cache,
// output projection, second LayerNorm, MLP, residual. A range of one is the block that the tests look at; the whole
// stack, with embedding, final LayerNorm, LM head and argmax around it, is what generate.py --fused runs. In PyTorch:
//
//     x = embed_in[token]                                                    # [C]
//     for block in blocks:
//         xn1, xn2 = layer_norm(x, ln1_w, ln1_b), layer_norm(x, ln2_w, ln2_b)   # S1
//         q, k, v = (w_qkv @ xn1 + b_qkv).view(NH, 3, HS).unbind(1)          # S2
//         q, k = rope(q, position), rope(k, position)                        # S3
//         cache_k[:, position], cache_v[:, position] = k, v                  # S4
//         p = softmax(q . cache_k[:, :position + 1] / sqrt(HS))              # S5
//         o = p @ cache_v[:, :position + 1]                                  # S5, S6   [NH, HS]
//         h = gelu(w_up @ xn2 + b_up)                                        # S8       [F]
//         x = x + o.flatten() @ w_out + b_out + h @ w_down + b_down          # S7, S8, S9
//     logits = embed_out @ layer_norm(x, lnf_w, lnf_b);  token = logits.argmax()   # S10
//
// Symbols, with their sizes for pythia-2.8b: C hidden size 2560, NH heads 32, HS head size 80, F MLP width 10240,
// V vocabulary 50304, L blocks 32, T cached tokens up to 2048, K thread blocks in a cluster 2.
//
// Why it is fast: at batch 1 every weight is used once a token, so the floor is bytes / bandwidth. A block of 2.8b is
// (4*C*C + 2*C*F) * 2 bytes = 157 MB, 34.3 us at the 4.58 TB/s that an H200 can read. Everything below serves one aim:
// the memory never waits for the arithmetic, and the arithmetic is never twice in the same place.
//
// How to read: chapter 1 is the picture, 2 the syncs, 3 and 4 the sizes and places. Then jump to chapter 8, the kernel,
// some 60 lines that name every stage, and read the stages (7) as you meet them. Chapter 5 can be taken on trust.
//
// References: ClusterFusion (arXiv 2508.18850) and ClusterFusion++ (arXiv 2604.23553) for fusing a block with cluster
// collectives; Pythia (arXiv 2304.01373); RoPE (arXiv 2104.09864); online softmax (arXiv 1805.02867) and its merge of
// partial results (FlashAttention, arXiv 2205.14135); the CUDA programming guide on clusters; PTX ISA 8.x for chapter 5.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// ------------------------------------------------------------------------------------------------------------------
// 1. The picture
// ------------------------------------------------------------------------------------------------------------------
//
// Every matrix is stored as rows of C, so the whole model is two inner loops: dot(row, x) and y += a * row.
//
//           S1 LN1 --> S2 q,k,v rows --(1)--> S3 rope --> S5 attend --(2)--> S6 merge --> S7 out rows --.
//         /                                     \--> S4 append k, v                                      \
//  x[C] -+                                                                                                S9 --(3)--(4)--> x[C]
//         \                                                                                              /
//           S1 LN2 --> S8 hidden unit j: dot(up row j), GELU, y += h_j * down row j ---------------------'
//
//  (1) (2) (3) are cluster syncs, (4) is the grid barrier, the only one in a block.
//
// Who owns what:
//
//  grid      one thread block on every multiprocessor, for the whole launch; x is in global memory, x[C]
//  cluster   K blocks that can write into each other's shared memory: a team for one head; head h belongs to cluster
//            h mod (number of clusters). Clusters without a head take more hidden units instead.
//  rank      a block of the cluster: 1/K of the head's q, k, v rows, 1/K of its cached tokens, 1/K of its output rows,
//            a range of hidden units (its own, no other block's), and C/K columns of the cluster's sum
//  team      C/8 threads (C/16 where C >= 4096) that hold one row of C between them; small models have several teams,
//            each with rows of its own
//  thread    the same 8 columns (16 bytes of fp16) of every row, of x and of y, from the first block to the last
//
//      row of C:   | thread 0 | thread 1 | thread 2 | ...                        | thread C/8-1 |
//      dot         each thread multiplies its 8 columns; the team adds up        (one team sync a tile)
//      axpy        each thread adds to its own 8 columns of y, in registers      (no sync at all)
//
//  producer  one more warp, of which one lane does nothing but start copies: weights do not depend on activations, so it
//            runs ahead of the arithmetic, across stages and blocks, as far as the ring in shared memory has room.
//
// ------------------------------------------------------------------------------------------------------------------
// 2. The syncs. The ids stand at every sync in the code.
// ------------------------------------------------------------------------------------------------------------------
//
//  id   scope     publishes                        to                          without it
//  (0)  cluster   barriers exist                   peers that will push        a push lands on garbage
//  (1)  cluster   q, k, v of a head                every rank of the cluster   attention with a stale q, k or v
//  (2)  cluster   m, l, o of a rank's tokens       the rank that owns that     some ranks' tokens are forgotten
//                                                  slice of o
//  (3)  cluster   a rank's partial sums of y       the rank that owns those    x lacks a block's contribution
//                                                  columns
//  (4)  grid      x of the next block              everybody                   LayerNorm of an unfinished x
//  (F)  block     a stage of the ring is full      workers                     arithmetic on bytes still on their way
//  (E)  block     a stage of the ring is empty     producer                    bytes overwritten while being read
//  (a)  block     x, read once, shared             teams                       some columns are the previous block's
//  (b)  team      statistics of LayerNorm          its threads                 each warp has its own mean
//  (c)  team      warps' parts of dot products     its threads                 dot products lack warps
//  (d)  block     rotated q, rounded k and v       all warps                   attention with half-rotated q
//  (e)  block     warps' m, l, o                   one thread a dimension      a merge of the last head's leftovers
//  (f)  block     nothing: all have read (d), (e)  the next head's writers     the next head overwrites them
//  (g)  block     all sums are on their way        the thread that arrives     (4) counts a block that is not done
//  (h)  block     (4) has been passed              all threads                 the others run ahead of (4)
//
// (1), (2), (3), (F) are mbarriers that count bytes: whoever waits is released by the data itself. Buffers filled
// through (1), (2), (3) are safe to reuse without another sync, because between two fills of one buffer every peer
// passes a later sync that its reader has contributed to: (1) of a head follows its readers' part in (2) of the last
// head, (2) follows (1), and (3) follows (4).

// ------------------------------------------------------------------------------------------------------------------
// 3. Configuration: build.py gives the shape and five choices as -D constants, the rest follows
// ------------------------------------------------------------------------------------------------------------------

constexpr int C = HIDDEN, NH = HEADS, HS = HEAD_SIZE, ROT = ROTARY, F = MLP, V = VOCAB, L = LAYERS, CTX = CONTEXT;
constexpr int K = CLUSTER;
constexpr int R = ROWS;
constexpr float LN_EPS = 1e-5f;
#ifndef MUTANT
#define MUTANT 0  // tests build the kernel with one thing broken (see test_block.py) and must notice
#endif

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int PIECES = C < 4096 ? 1 : 2;              // 16-byte pieces of a row that one thread owns
constexpr int COLS = 8 * PIECES;                      // columns that one thread owns
constexpr int TEAM = C / COLS;                        // threads that hold one row
constexpr int TEAMS = ceil_div(THREADS, TEAM);        // teams in a block
constexpr int WORKERS = TEAM * TEAMS;                 // threads that compute; the producer's warp comes on top
constexpr int WARPS = WORKERS / 32;
constexpr int LANES = TEAM < 32 ? TEAM : 32;          // lanes of a warp that belong to the same team
constexpr int TEAM_WARPS = TEAM / LANES;              // warps of a team (1 where a team is half a warp)
constexpr int TILE_ROWS = R * TEAMS;                  // rows in a tile: R for each team
constexpr int TILE_BYTES = TILE_ROWS * C * 2;
constexpr int BIAS_HALFS = ceil_div(TILE_ROWS, 8) * 8 + 8;  // a tile's biases, copied from the aligned 8 before
constexpr int QKV_ROWS = 3 * HS / K;                  // a rank's share of the rows of one head's q, k, v
constexpr int OUT_ROWS = HS / K;                      // and of its output rows: the slice of o it owns
constexpr int OWN = C / K;                            // columns of x that a rank sums for its cluster
constexpr int KV_TOKENS = TILE_BYTES / (4 * HS);      // cached tokens in a tile: their k in one half, v in the other
constexpr int TOKEN_LANES = HS <= 32 ? 4 : HS <= 64 ? 8 : HS <= 128 ? 16 : 32;  // lanes that share a cached token
constexpr int WARP_TOKENS = 32 / TOKEN_LANES;         // tokens that a warp works on at once
constexpr int FIXED_BYTES = 4 * (C + TEAMS * C + WARPS * HS) + 8192;            // shared memory beside the ring
constexpr int STAGES_THAT_FIT = (SHARED_BYTES - FIXED_BYTES) / (TILE_BYTES + 2 * BIAS_HALFS + 16);
constexpr int STAGES = STAGES_THAT_FIT < 32 ? STAGES_THAT_FIT : 32;             // tiles in the ring

static_assert(C % 128 == 0, "a row is dealt out in 16-byte pieces to whole half-warps: C must be a multiple of 128");
static_assert(NH * HS == C, "the heads together are as wide as the residual stream");
static_assert(WORKERS % 32 == 0 && WORKERS + 32 <= 1024, "workers are whole warps, and a block has 1024 threads at most");
static_assert((R & (R - 1)) == 0 && R <= LANES, "reduce_rows folds a power of two of rows over a team's lanes");
static_assert(HS % (2 * K) == 0 && HS % 8 == 0, "ranks share a head's rows evenly, lanes its dimensions by 8");
static_assert(OWN % 8 == 0, "a rank owns whole pieces of a row");
static_assert(HS <= WORKERS, "one thread for each dimension of a head merges the warps' attention");
static_assert(STAGES >= 3, "three tiles: one being read, two on their way; take fewer ROWS");

// ------------------------------------------------------------------------------------------------------------------
// 4. Memory map
// ------------------------------------------------------------------------------------------------------------------

typedef float Columns[COLS];  // what a thread owns of x, y, LN(x): columns 8*i.. of every piece; in registers, fp32

struct Layer {  // one block's weights: fp16, read only; the matrices are rows of C (see model.py)
  const half *ln1_w, *ln1_b, *ln2_w, *ln2_b;      // [C]
  const half *w_qkv, *b_qkv;                      // [NH][3][HS] rows, and as many biases
  const half *w_out, *b_out;                      // [NH][HS] rows, [C]
  const half *w_up, *b_up;                        // [F] rows, [F]
  const half *w_down, *b_down;                    // [F] rows, [C]
};

struct State {  // global memory, kept between launches; written by the last block to finish (and by the host)
  int token;                // read by the next launch; the argmax of this one
  int position;             // tokens in the cache
  unsigned rotation;        // which of the three residual buffers holds x
  unsigned arrivals;        // what `counter` has reached when no launch runs
  unsigned counter;         // (4): one arrival a block and barrier, never reset
  unsigned finished;        // blocks that are done with this launch
  unsigned long long best;  // largest logit so far, with its token; see S10
};

struct Failure { int sync, block, layer, seen; };  // host memory: what a launch waited for when it gave up

struct Model {  // the kernel's one parameter: pointers only, the same for every launch
  Layer layers[L];
  const half *embed_in, *lnf_w, *lnf_b, *embed_out;  // [V] rows, [C], [C], [V] rows
  const float *rope_cos, *rope_sin;                  // [CTX][ROT/2]
  half* cache;                                       // [L][2][NH][CTX][HS] keys and values; one row a launch is written
  long long* residual;                               // [3][C] fixed point: x now, x next (sums arrive), next but one (zero)
  float* logits;                                     // [V]
  int* history;                                      // [CTX] the token chosen at each position
  State* state;
  Failure* failure;
  float* taps;                                       // -DTAPS: what the stages compute, for the tests
  unsigned long long* timeline;                      // -DTIMELINE: when they do, ns
};

// Who does what in this launch; depends on block, grid and position alone, so every run divides the work alike.
struct Plan {
  int rank, cluster, clusters;
  int first_unit, last_unit;    // hidden units of this block, in every layer
  int filler;                   // of these, how many to do while (1), and again while (2), is on its way
  int first_token, last_token;  // cached tokens of this rank, for every head
  int first_row, last_row;      // LM-head rows of this block
};

struct alignas(128) Shared {                         // one block's shared memory; bytes for 2.8b
  half ring[STAGES][TILE_ROWS * C];                  // 10 x 20480  tiles of weights, or of k and v; producer -> workers
  alignas(16) half bias[STAGES][BIAS_HALFS];         // 10 x 32     the tiles' biases, where rows have one
  alignas(16) float sums[K * TEAMS][OWN];            // 10240       (3) inbox: one row from each team of the cluster
  alignas(16) float x[C];                            // 10240       (a) x, between its reading and S1
  float qkv[3 * HS];                                 // 960         (1) inbox: q, k, v of a head
  float slice_o[K][OUT_ROWS], slice_ml[K][2];        // 336         (2) inbox: o, m, l of each rank's tokens
  alignas(16) float q[HS];                           // 320         (d) rotated q, times the softmax scale
  alignas(16) half k_new[HS], v_new[HS];             // 320         (d) the new token's k and v, as the cache holds them
  float part_o[WARPS][HS], part_m[WARPS], part_l[WARPS];  // 3280   (e) attention over one warp's tokens
  float dots[2][TEAMS][R][TEAM_WARPS];               // 320         (c) two, so that tile i+1 can be written while i is read
  float stats[2][TEAMS][TEAM_WARPS][2];              // 160         (b) mean and squares of one warp's columns
  float rope_cos[ROT / 2], rope_sin[ROT / 2];        // 80          of this position, for the whole launch
  Plan plan;                                         // 48          this block's share
  unsigned rotation, arrivals;                       // 8           of State, as they were when the launch started
  int layer;                                         // 4           where we are, for the report of a failure
  uint64_t full[STAGES], empty[STAGES];              // 160         (F), (E)
  uint64_t qkv_ready, slice_ready, sums_ready;       // 24          (1), (2), (3)
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the ring leaves too little shared memory: FIXED_BYTES is wrong");

enum SyncId { SYNC_QKV = 1, SYNC_SLICE, SYNC_SUMS, SYNC_GRID, SYNC_FULL, SYNC_EMPTY };  // in Failure::sync

#ifdef TAPS  // offsets into Model::taps
enum { TAP_XN1 = 0, TAP_XN2 = TAP_XN1 + C, TAP_Q = TAP_XN2 + C, TAP_K = TAP_Q + C, TAP_V = TAP_K + C,
       TAP_O = TAP_V + C, TAP_H = TAP_O + C };
#define TAP(where, value) (m.taps[where] = (value))
#else
#define TAP(where, value) ((void)0)
#endif

enum Mark { MARK_START, MARK_NORM, MARK_QKV, MARK_1, MARK_ATTEND, MARK_2, MARK_OUT, MARK_UNITS, MARK_3, MARK_ADDED, MARKS };
#ifdef TIMELINE  // [blocks][L + 1][MARKS]
#define MARK(event) do { if (threadIdx.x == 0) \
    m.timeline[((size_t)blockIdx.x * (L + 1) + layer) * MARKS + (event)] = global_ns(); } while (0)
#else
#define MARK(event) ((void)0)
#endif

// ------------------------------------------------------------------------------------------------------------------
// 5. Toolbox: one function for each PTX instruction that CUDA C++ has no word for. No asm after this chapter.
// ------------------------------------------------------------------------------------------------------------------

// Shared-memory addresses as the instructions below want them: 32 bits, in this block's window.
__device__ uint32_t smem(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// threadIdx.x once more: addresses computed from it are computed where they stand, and not kept in registers from block
// to block, of which the two largest shapes have none to spare.
__device__ int thread_again() {
  int t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  return t;
}

// The same place in the shared memory of another rank of the cluster (or of our own).
__device__ uint32_t peer(const void* place, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem(place)), "r"(rank));
  return address;
}

// Push: a store into a peer's shared memory that also counts its bytes on the peer's barrier, so that the data
// announces itself. A pull would cost a round trip; a plain store would need a barrier of all threads after it.
__device__ void push(uint32_t to, float v, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               :: "r"(to), "r"(__float_as_uint(v)), "r"(barrier) : "memory");
}
__device__ void push4(uint32_t to, const float* v, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
               :: "r"(to), "r"(__float_as_uint(v[0])), "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])),
                  "r"(__float_as_uint(v[3])), "r"(barrier) : "memory");
}

// An mbarrier's phase completes when all its arrivals have come and all expected bytes have landed; it then starts the
// next phase by itself. Waiting is for the parity (0, 1, 0, ...) of a phase.
__device__ void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(smem(b)), "r"(arrivals) : "memory");
}
__device__ void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(smem(b)) : "memory");
}
__device__ void barrier_expect(uint64_t* b, uint32_t bytes) {  // arrives, and expects bytes on top
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(smem(b)), "r"(bytes) : "memory");
}
__device__ bool barrier_passed(uint64_t* b, uint32_t parity) {  // acquires at cluster scope: peers' pushes are visible
  uint32_t passed;
  asm volatile("{\n.reg .pred p;\n"
               "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
               "selp.u32 %0, 1, 0, p;\n}" : "=r"(passed) : "r"(smem(b)), "r"(parity) : "memory");
  return passed;
}
__device__ void barriers_exist() {  // before a peer or the copy engine may use the barriers initialised so far
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Bulk asynchronous copy, global to shared: one thread starts it, the copy engine (TMA) does it, `full` counts its bytes.
// Both addresses and the size are multiples of 16. The policy tells L2 that nobody will read these bytes again soon.
__device__ uint64_t read_once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* full, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               :: "r"(smem(to)), "l"(from), "r"(bytes), "r"(smem(full)), "l"(policy) : "memory");
}

// Global memory that other blocks write during the launch. Relaxed: no order with anything else, but never a stale L1.
__device__ longlong2 load_relaxed(const long long* p) {
  longlong2 v;
  asm volatile("ld.relaxed.gpu.global.v2.s64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p));
  return v;
}
__device__ void add_relaxed(long long* p, long long v) {  // no result comes back, so nobody waits for it
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" :: "l"(p), "l"(v));
}
__device__ void arrive_release(unsigned* counter) {  // everything this block has written or added becomes visible first
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(counter) : "memory");
}
__device__ unsigned load_acquire(const unsigned* counter) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
  return v;
}

// Weights that bypass the ring: 16 bytes through the read-only path, started where it stands in the code.
__device__ uint4 load16(const half* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// A barrier of the first `threads` threads that call it with this id; __syncthreads would include the producer.
__device__ void named_barrier(int id, int threads) { asm volatile("barrier.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
__device__ void workers_sync() { named_barrier(1, WORKERS); }
__device__ void team_sync(int team) { named_barrier(TEAMS == 1 ? 1 : 2 + team, TEAM); }

__device__ unsigned long long global_ns() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// Every wait in this file ends: past PATIENCE the first to lose it writes down what it waited for, in host memory that
// outlives the launch, and the trap ends all blocks. The CUDA context is lost with it; other processes are not.
constexpr long long PATIENCE = 6'000'000'000;  // clock cycles, 3 s at 1.98 GHz

__device__ __noinline__ void give_up(Failure* failure, int sync, int layer, int seen) {
  if (atomicCAS_system(&failure->sync, 0, sync) == 0) {
    failure->block = blockIdx.x;
    failure->layer = layer;
    failure->seen = seen;
  }
  __threadfence_system();
  __trap();
}

__device__ void wait(const Model& m, Shared& s, uint64_t* barrier, uint32_t parity, SyncId sync) {
  if (barrier_passed(barrier, parity)) return;
  const long long start = clock64();
  while (!barrier_passed(barrier, parity))
    if (clock64() - start > PATIENCE) give_up(m.failure, sync, s.layer, parity);
}

// ------------------------------------------------------------------------------------------------------------------
// 6. Arithmetic: the two inner loops, and sums that do not depend on order
// ------------------------------------------------------------------------------------------------------------------

__device__ void widen(const uint4& w, float* f) {  // 16 bytes, 8 fp16 -> 8 fp32
  const half2* h = reinterpret_cast<const half2*>(&w);
  for (int i = 0; i < 4; i++) {
    const float2 pair = __half22float2(h[i]);
    f[2 * i] = pair.x;
    f[2 * i + 1] = pair.y;
  }
}

__device__ float dot8(const uint4& w, const float* x, float sum) {
  float f[8];
  widen(w, f);
  for (int i = 0; i < 8; i++) sum = fmaf(f[i], x[i], sum);
  return sum;
}

__device__ void axpy8(float a, const uint4& w, float* y) {
  float f[8];
  widen(w, f);
  for (int i = 0; i < 8; i++) y[i] = fmaf(a, f[i], y[i]);
}

// Adds up R values over the lanes of a team in a warp, all R at once: in each of the first log2(R) steps a lane gives
// half of its values away and keeps the other half, so R = 4 takes 6 shuffles, not 20. Lane l returns row l % R.
// All 32 lanes must be here.
__device__ float reduce_rows(float (&v)[R], int lane) {
#pragma unroll
  for (int w = R / 2; w >= 1; w /= 2) {
    const bool upper = lane & w;
#pragma unroll
    for (int i = 0; i < w; i++)
      v[i] = (upper ? v[i + w] : v[i]) + __shfl_xor_sync(~0u, upper ? v[i] : v[i + w], w);
  }
#pragma unroll
  for (int w = R; w < LANES; w *= 2) v[0] += __shfl_xor_sync(~0u, v[0], w);
  return v[0];
}

// The clusters add to x in whatever order they finish. Floating-point sums would differ in their last bits from run to
// run; integer sums do not depend on order. So x between blocks is 64-bit fixed point, with 2^-24 = 6e-8 as its unit:
// finer than fp32 above 1, and 8000 times finer than fp16 there. What does not fit (65536 and up: more than
// fp16 holds, infinities, NaN) adds a number so large that no sum of others hides it, and reads back as NaN.
constexpr float FIXED_ONE = 16777216.f, FIXED_LIMIT = 65536.f;
constexpr long long FIXED_NAN = 1ll << 54, FIXED_EDGE = 1ll << 53;

__device__ long long to_fixed(float v) { return fabsf(v) < FIXED_LIMIT ? __float2ll_rn(v * FIXED_ONE) : FIXED_NAN; }
__device__ float from_fixed(long long q) {
  return q > -FIXED_EDGE && q < FIXED_EDGE ? __ll2float_rn(q) * (1 / FIXED_ONE) : __int_as_float(0x7fffffff);
}

// ------------------------------------------------------------------------------------------------------------------
// 7. The stages
// ------------------------------------------------------------------------------------------------------------------

// Balance by bytes: a head costs the blocks of its cluster its rows and its cached tokens; hidden units fill up what
// the heads leave, so that every block streams the same. ATTENTION_BYTES is what a block could have streamed in the
// time that the head's chain of small steps takes; build.py has its measured value. `long long`, since F * F overflows.
__host__ __device__ Plan make_plan(int block, int blocks, int position) {
  Plan p;
  p.rank = block % K;
  p.cluster = block / K;
  p.clusters = blocks / K;
  const int heads = NH / p.clusters, busy = NH % p.clusters * K;  // the first `busy` blocks have one head more
  const long long unit_bytes = 4 * C, scale = 256;                // of two rows; costs are in 1/256 units
  const long long head_bytes = (8ll * HS * C + 4ll * HS * position) / K + ATTENTION_BYTES;
  const long long head_cost = scale * head_bytes / unit_bytes;
  const long long fair = (scale * F + head_cost * NH * K) / blocks;
  const long long room = fair - (heads + 1) * head_cost;
  const long long of_busy = busy && room > 0 ? room : 0;
  const long long of_rest = busy == blocks ? 0 : (scale * F - of_busy * busy) / (blocks - busy);
  const long long all = of_busy * busy + of_rest * (blocks - busy);
  const long long before = block < busy ? of_busy * block : of_busy * busy + of_rest * (block - busy);
  p.first_unit = F * before / all;
  p.last_unit = F * (before + (block < busy ? of_busy : of_rest)) / all;
  const int parts = 2 * (heads + (block < busy)) + 1;
  p.filler = ceil_div(ceil_div(p.last_unit - p.first_unit, parts), TILE_ROWS) * TILE_ROWS;
  const int tokens = ceil_div(position, K);
  p.first_token = tokens * p.rank < position ? tokens * p.rank : position;
  p.last_token = p.first_token + tokens < position ? p.first_token + tokens : position;
  p.first_row = (long long)V * block / blocks;
  p.last_row = (long long)V * (block + 1) / blocks;
  return p;
}

struct Ring {  // a place in the ring: the next stage, and the parity of the phase it is in
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ half* cache_row(const Model& m, int layer, int kv, int head, int token) {
  return m.cache + (((size_t)(layer * 2 + kv) * NH + head) * CTX + token) * HS;
}

// ---- The producer ------------------------------------------------------------------------------------------------
// One lane that walks through the same work as the workers, tile by tile, and starts the copies. It waits only for room
// in the ring, never for an activation: while the workers stand at (4), up to STAGES tiles of what comes after land.

struct Producer {
  const Model& m;
  Shared& s;
  const uint64_t policy = read_once_policy();
  Ring ring;

  __device__ void claim(uint32_t bytes) {
    wait(m, s, &s.empty[ring.stage], ring.parity ^ 1, SYNC_EMPTY);  // (E) the first lap finds every stage empty
    barrier_expect(&s.full[ring.stage], bytes);
  }
  __device__ void copy(void* to, const void* from, uint32_t bytes) {
    bulk_copy(to, from, bytes, &s.full[ring.stage], policy);
  }
  __device__ void rows(const half* w, const half* bias, int first, int last) {
    for (int row = first; row < last; row += TILE_ROWS) {
      const int n = min(TILE_ROWS, last - row), skip = row % 8;  // biases are copied from a multiple of 16 bytes on
      const int bias_bytes = bias ? ceil_div(skip + n, 8) * 16 : 0;
      claim(n * C * 2 + bias_bytes);
      copy(s.ring[ring.stage], w + (size_t)row * C, n * C * 2);
      if (bias) copy(s.bias[ring.stage], bias + row - skip, bias_bytes);
      ring.next();
    }
  }
  __device__ void units(const Layer& w, int first, int last) {
    for (int j = first; j < last; j += TILE_ROWS) {
      rows(w.w_up, w.b_up, j, min(j + TILE_ROWS, last));
      rows(w.w_down, nullptr, j, min(j + TILE_ROWS, last));
    }
  }
  __device__ void tokens(const half* k, const half* v, int first, int last) {
    for (int t = first; t < last; t += KV_TOKENS) {
      const int bytes = min(KV_TOKENS, last - t) * HS * 2;
      claim(2 * bytes);
      copy(s.ring[ring.stage], k + (size_t)t * HS, bytes);
      copy(s.ring[ring.stage] + KV_TOKENS * HS, v + (size_t)t * HS, bytes);
      ring.next();
    }
  }
  __device__ void run(const Plan& plan, int first_layer, int last_layer, bool lm_head) {
    for (int layer = first_layer; layer < last_layer; layer++) {
      const Layer& w = m.layers[layer];
      int unit = plan.first_unit;
      for (int h = plan.cluster; h < NH; h += plan.clusters) {
        const int qkv = h * 3 * HS + plan.rank * QKV_ROWS, out = h * HS + plan.rank * OUT_ROWS;
        rows(w.w_qkv, w.b_qkv, qkv, qkv + QKV_ROWS);
        units(w, unit, min(unit + plan.filler, plan.last_unit));
        unit = min(unit + plan.filler, plan.last_unit);
        tokens(cache_row(m, layer, 0, h, 0), cache_row(m, layer, 1, h, 0), plan.first_token, plan.last_token);
        units(w, unit, min(unit + plan.filler, plan.last_unit));
        unit = min(unit + plan.filler, plan.last_unit);
        rows(w.w_out, nullptr, out, out + OUT_ROWS);
      }
      units(w, unit, plan.last_unit);
    }
    if (lm_head) rows(m.embed_out, nullptr, plan.first_row, plan.last_row);
  }
};

// ---- The workers -------------------------------------------------------------------------------------------------

struct Norms { uint4 w1[PIECES], b1[PIECES], w2[PIECES], b2[PIECES]; };  // gains and biases of a thread's columns, fp16

struct Worker {  // one thread's view
  const Model& m;
  Shared& s;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int team = TEAMS == 1 ? 0 : tid / TEAM, piece = TEAMS == 1 ? tid : tid % TEAM, team_warp = piece / 32;
  const int row = lane % R * TEAMS + team;  // which row of a tile this lane finishes, of the R of its team
  Ring ring;
  int flip = 0;                             // which half of `dots` and `stats` is next
  uint32_t head_parity = 0, sums_parity = 0;
  Columns y;

  // Column of element i of what a thread owns: consecutive threads, consecutive 16 bytes, so no bank conflicts.
  __device__ int column(int i) const { return (i / 8 * TEAM + piece) * 8 + i % 8; }
  __device__ int column_again(int p) const { return (p * TEAM + thread_again() % TEAM) * 8; }  // column(8 * p)
  __device__ uint4 weights(int tile_row, int p) const {
    return *reinterpret_cast<const uint4*>(&s.ring[ring.stage][tile_row * C + column(8 * p)]);
  }
  __device__ void wait_full() { wait(m, s, &s.full[ring.stage], ring.parity, SYNC_FULL); }  // (F)
  __device__ void release() {                                                               // (E)
    __syncwarp();
    if (lane == 0) barrier_arrive(&s.empty[ring.stage]);
    ring.next();
  }

  // dot: the next tile's rows times x, plus bias. Team t has rows t, t + TEAMS, ...; every warp of a team returns in
  // lane l the finished row `row`. n rows are valid; the biases start `skip` places into the tile's.
  __device__ float dot_tile(const Columns& x, int n, int skip, bool has_bias) {
    wait_full();
    float sums[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
      sums[r] = 0;
      if (r * TEAMS + team < n)
        for (int p = 0; p < PIECES; p++) sums[r] = dot8(weights(r * TEAMS + team, p), x + 8 * p, sums[r]);
    }
    const float bias = has_bias && row < n && MUTANT != 7 ? __half2float(s.bias[ring.stage][skip + row]) : 0.f;
    release();
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

  // axpy: y += a * row for the next tile's rows; lane l holds a of row `row`.
  __device__ void axpy_tile(float a, int n) {
    wait_full();
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float of_row = __shfl_sync(~0u, a, r, LANES);
      if (r * TEAMS + team < n)
        for (int p = 0; p < PIECES; p++) axpy8(of_row, weights(r * TEAMS + team, p), y + 8 * p);
    }
    release();
  }

  // S0 READ X   math: x from fixed point   owner: all threads, 2 columns at a time; then every team has all of them
  // reads 8 * C bytes from L2, the same for all blocks: 20 KB of 2.8b   ends with (a)
  __device__ void read_residual(const long long* x_now, Columns& x) {
    constexpr int PAIRS = ceil_div(C / 2, WORKERS);
    longlong2 q[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS; i++)  // all loads start before the first is used: one trip to L2, not PAIRS of them
      if (tid + i * WORKERS < C / 2) q[i] = load_relaxed(x_now + 2 * (tid + i * WORKERS));
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
      if (tid + i * WORKERS < C / 2)
        *reinterpret_cast<float2*>(&s.x[2 * (tid + i * WORKERS)]) = make_float2(from_fixed(q[i].x), from_fixed(q[i].y));
    workers_sync();  // (a)
    for (int i = 0; i < COLS; i++) x[i] = s.x[column(i)];
  }

  __device__ void read_embedding(int token, Columns& x) const {
    for (int p = 0; p < PIECES; p++) widen(load16(m.embed_in + (size_t)token * C + column(8 * p)), x + 8 * p);
  }

  // Started before (4), so that they have arrived when x has. Layer L stands for the final LayerNorm.
  __device__ Norms load_norms(int layer) const {
    const Layer& w = m.layers[min(layer, L - 1)];
    Norms n;
    for (int p = 0; p < PIECES; p++) {
      const int c = column_again(p);
      n.w1[p] = load16((layer < L ? w.ln1_w : m.lnf_w) + c);
      n.b1[p] = load16((layer < L ? w.ln1_b : m.lnf_b) + c);
      n.w2[p] = load16(w.ln2_w + c);
      n.b2[p] = load16(w.ln2_b + c);
    }
    return n;
  }

  // S1 LAYERNORM   math: x <- (x - mean) / sqrt(var + eps), once for both norms   owner: every team, for itself
  // The variance is around the true mean (two passes) within a thread; groups of n values each then merge exactly:
  // mean = (mean_a + mean_b) / 2, squares = squares_a + squares_b + (mean_a - mean_b)^2 * n / 2 (Chan et al. 1979).
  // E[x^2] - E[x]^2 would cancel where the mean is large.   contains (b)
  __device__ void normalize(Columns& x) {
    float mean = 0, squares = 0, n = COLS;
    for (int i = 0; i < COLS; i++) mean += x[i];
    mean /= n;
    for (int i = 0; i < COLS; i++) squares += (x[i] - mean) * (x[i] - mean);
#pragma unroll
    for (int w = 1; w < LANES; w *= 2) {
      const float other = __shfl_xor_sync(~0u, mean, w);
      squares += __shfl_xor_sync(~0u, squares, w) + (other - mean) * (other - mean) * (0.5f * n);
      mean = 0.5f * (mean + other);
      n *= 2;
    }
    if (TEAM_WARPS > 1) {
      float(&part)[TEAM_WARPS][2] = s.stats[flip][team];
      if (lane == 0) part[team_warp][0] = mean, part[team_warp][1] = squares;
      team_sync(team);  // (b)
      mean = squares = 0;
      for (int w = 0; w < TEAM_WARPS; w++) mean += part[w][0];
      mean /= TEAM_WARPS;
      for (int w = 0; w < TEAM_WARPS; w++) squares += part[w][1] + n * (part[w][0] - mean) * (part[w][0] - mean);
      flip ^= 1;
    }
    const float scale = rsqrtf(squares / C + LN_EPS);
    for (int i = 0; i < COLS; i++) x[i] = (x[i] - mean) * scale;
  }

  __device__ void affine(const Columns& x, const uint4 (&gain)[PIECES], const uint4 (&bias)[PIECES], Columns& out) const {
    for (int p = 0; p < PIECES; p++) {
      float g[8], b[8];
      widen(gain[p], g);
      widen(bias[p], b);
      for (int i = 0; i < 8; i++) out[8 * p + i] = fmaf(x[8 * p + i], g[i], b[i]);
    }
  }

  // ClusterGather: every rank gets every rank's values. The lane that finished a row pushes it into the same place of
  // all K inboxes; lanes l, l + R, ... hold the same row, so each takes another rank.
  __device__ void cluster_gather(float* place, float value, bool valid, uint64_t* ready) const {
    if (!valid || team_warp > 0) return;
    for (int r = lane % LANES / R; r < K; r += LANES / R) push(peer(place, r), value, peer(ready, r));
  }

  // S2 QKV   math: [q k v] of head h = rows @ xn1 + b   owner: rank r has rows r*QKV_ROWS.. of the head's 3*HS
  // reads 3 * HS * C * 2 bytes a head, 1.2 MB of 2.8b   ends with (1), waited for after some hidden units
  __device__ void qkv_rows(const Columns& xn1, int h) {
    if (tid == 0) barrier_expect(&s.qkv_ready, sizeof(s.qkv));
    const int first = s.plan.rank * QKV_ROWS;
    for (int i = 0; i < QKV_ROWS; i += TILE_ROWS) {
      const int n = min(TILE_ROWS, QKV_ROWS - i);
      const float value = dot_tile(xn1, n, (h * 3 * HS + first + i) % 8, true);
      cluster_gather(&s.qkv[first + i + row], value, row < n, &s.qkv_ready);
    }
  }

  // S3 ROPE, S4 APPEND   math: (a, b) -> (a cos - b sin, b cos + a sin) for dimensions i, i + ROT/2 of q and k
  // owner: one thread a dimension, the same in every rank; the last rank writes the cache   ends with (d)
  // k and v are rounded to fp16 before they are used, so that this token is seen now as it will be seen later.
  __device__ void rotate_and_append(int layer, int h, int position) {
    for (int i = tid; i < 3 * HS; i += WORKERS) {
      const int which = i / HS, d = i % HS;  // 0 q, 1 k, 2 v
      const float* v = s.qkv + which * HS;
      float value = v[d];
      if (which < 2 && d < ROT) {
        const int pair = d % (ROT / 2);
        const float other = (d < ROT / 2) != (MUTANT == 3) ? -v[(d + ROT / 2) % ROT] : v[(d + ROT / 2) % ROT];
        value = fmaf(value, s.rope_cos[pair], other * s.rope_sin[pair]);
      }
      if (which == 0) {
        s.q[d] = value * (rsqrtf((float)HS) * 1.44269504f);  // log2(e): the softmax below is in powers of 2
        TAP(TAP_Q + h * HS + d, value);
      } else {
        (which == 1 ? s.k_new : s.v_new)[d] = __float2half_rn(value);
        if (s.plan.rank == K - 1) cache_row(m, layer, which - 1, h, position)[d] = __float2half_rn(value);
        TAP((which == 1 ? TAP_K : TAP_V) + h * HS + d, value);
      }
    }
    workers_sync();  // (d)
  }

  // S5 ATTEND   math: o = sum_t 2^(s_t - m) v_t, l = sum_t 2^(s_t - m), m = max_t s_t, s_t = q . k_t   (online softmax)
  // owner: TOKEN_LANES lanes a token, 8 dimensions a lane; tokens go round over the warps; the last warp of the last rank
  // adds the new token   reads 4 * HS bytes a token   contains (e), ends with (2), waited for after some hidden units
  __device__ void attend() {
    const int d = lane % TOKEN_LANES * 8, sub = lane / TOKEN_LANES;
    const bool has_d = d < HS;  // a head of 80 uses 10 lanes of 16
    float q[8], o[8] = {}, mx = -1e30f, l = 0;
    for (int i = 0; i < 8; i++) q[i] = has_d ? s.q[d + i] : 0.f;

    if (s.plan.rank == K - 1 && warp == WARPS - 1) {
      float score = has_d ? dot8(*reinterpret_cast<const uint4*>(s.k_new + d), q, 0) : 0.f;
#pragma unroll
      for (int w = 1; w < TOKEN_LANES; w *= 2) score += __shfl_xor_sync(~0u, score, w);
      if (sub == 0) {
        mx = score;
        l = 1;
        if (has_d) widen(*reinterpret_cast<const uint4*>(s.v_new + d), o);
      }
    }

    constexpr int BATCH = 4, STRIDE = WARPS * WARP_TOKENS;  // four tokens a lane at once: one rescaling for all four
    const int last_token = MUTANT == 5 ? s.plan.last_token / KV_TOKENS * KV_TOKENS : s.plan.last_token;
    for (int t0 = s.plan.first_token; t0 < s.plan.last_token; t0 += KV_TOKENS) {
      const int n = min(KV_TOKENS, last_token - t0);
      wait_full();
      const half *k = s.ring[ring.stage] + d, *v = k + KV_TOKENS * HS;
      for (int base = warp * WARP_TOKENS + sub; base - sub < n; base += BATCH * STRIDE) {
        float score[BATCH], top = mx;
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
          const int t = base + u * STRIDE;
          score[u] = t < n && has_d ? dot8(*reinterpret_cast<const uint4*>(k + t * HS), q, 0) : 0.f;
        }
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
#pragma unroll
          for (int w = 1; w < TOKEN_LANES; w *= 2) score[u] += __shfl_xor_sync(~0u, score[u], w);
          if (base + u * STRIDE < n) top = fmaxf(top, score[u]);
        }
        const float shrink = exp2f(mx - top);
        mx = top;
        l *= shrink;
        for (int i = 0; i < 8; i++) o[i] *= shrink;
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
          const int t = base + u * STRIDE;
          if (t < n) {  // rows past n hold whatever the stage held before: not even 0 times them is safe
            const float e = exp2f(score[u] - top);
            l += e;
            if (has_d) axpy8(e, *reinterpret_cast<const uint4*>(v + t * HS), o);
          }
        }
      }
      release();
    }

#pragma unroll
    for (int w = TOKEN_LANES; w < 32; w *= 2) {  // merge the lanes that hold the same dimensions of other tokens
      const float top = fmaxf(mx, __shfl_xor_sync(~0u, mx, w)), shrink = exp2f(mx - top);
      mx = top;
      l *= shrink;
      l += __shfl_xor_sync(~0u, l, w);
      for (int i = 0; i < 8; i++) {
        o[i] *= shrink;
        o[i] += __shfl_xor_sync(~0u, o[i], w);
      }
    }
    if (sub == 0 && has_d)
      for (int i = 0; i < 8; i++) s.part_o[warp][d + i] = o[i];
    if (lane == 0) s.part_m[warp] = mx, s.part_l[warp] = l;
    workers_sync();  // (e)
    if (tid < HS) push_slice();
  }

  // ClusterReduce, first half: thread d merges the warps' o[d], and pushes it to the rank that owns d; m and l go to all.
  __device__ void push_slice() const {
    float top = s.part_m[0], l = 0, o = 0;
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, s.part_m[w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float shrink = exp2f(s.part_m[w] - top);
      l = fmaf(shrink, s.part_l[w], l);
      o = fmaf(shrink, s.part_o[w][tid], o);
    }
    const int owner = tid / OUT_ROWS;
    push(peer(&s.slice_o[s.plan.rank][tid % OUT_ROWS], owner), o, peer(&s.slice_ready, owner));
    if (tid < K) {
      push(peer(&s.slice_ml[s.plan.rank][0], tid), top, peer(&s.slice_ready, tid));
      push(peer(&s.slice_ml[s.plan.rank][1], tid), l, peer(&s.slice_ready, tid));
    }
  }

  // S6 MERGE, S7 OUT ROWS   math: o = sum_r 2^(m_r - m) o_r / sum_r 2^(m_r - m) l_r, then y += o[d] * row d
  // owner: rank r has dimensions r*OUT_ROWS.. of the head, merged in the order of the ranks (ClusterReduce, second half)
  // reads HS * C * 2 bytes a head, 0.4 MB of 2.8b
  __device__ void out_rows(int h) {
    float top = s.slice_ml[0][0], weight[K], l = 0;
    for (int r = 1; r < K; r++) top = fmaxf(top, s.slice_ml[r][0]);
    for (int r = 0; r < K; r++) {
      weight[r] = MUTANT == 1 && r == K - 1 ? 0.f : exp2f(s.slice_ml[r][0] - top);
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

  // S8 HIDDEN UNITS   math: h_j = gelu(up row j . xn2 + b_j), y += h_j * down row j   owner: this block alone
  // GELU is the exact one, h/2 (1 + erf(h / sqrt 2)), as Pythia was trained   reads 4 * C bytes a unit, 10 KB of 2.8b
  __device__ void units(const Columns& xn2, int first, int last) {
    for (int j = first; j < last; j += TILE_ROWS) {
      const int n = min(TILE_ROWS, last - j);
      const float a = dot_tile(xn2, n, j % 8, true);
      const float bend = MUTANT == 6 ? tanhf(0.79788456f * (a + 0.044715f * a * a * a)) : erff(a * 0.70710678f);
      const float hidden = 0.5f * a * (1 + bend);
      if (row < n) TAP(TAP_H + j + row, hidden);
      axpy_tile(hidden, n);
    }
  }

  // S9 SUM   ClusterReduce of y: every team pushes its partial y to the ranks that own the columns; the owner adds the
  // parts in the order of ranks and teams, so that the bits are the same every time   ends with (3)
  __device__ void cluster_reduce() {
    if (tid == 0) barrier_expect(&s.sums_ready, sizeof(s.sums));
    for (int p = 0; p < PIECES; p++) {
      const int c = column_again(p), owner = c / OWN;
      const uint32_t place = peer(&s.sums[s.plan.rank * TEAMS + team][c % OWN], owner), ready = peer(&s.sums_ready, owner);
      push4(place, y + 8 * p, ready);
      push4(place + 16, y + 8 * p + 4, ready);
    }
    wait(m, s, &s.sums_ready, sums_parity, SYNC_SUMS);  // (3)
    sums_parity ^= 1;
  }

  // The cluster's sum joins x: thread i adds column i, so that a warp's 32 additions are 256 bytes side by side.
  __device__ void add_to_residual(long long* x_next) const {
    for (int c = thread_again(); c < OWN; c += WORKERS) {
      float sum = 0;
#pragma unroll 8
      for (int part = 0; part < K * TEAMS; part++)
        if (MUTANT != 4 || part > 0) sum += s.sums[part][c];
      add_relaxed(x_next + s.plan.rank * OWN + c, to_fixed(sum));
    }
  }

  // (4) One counter, one arrival a block, one thread a block that polls; the counter only ever grows.
  __device__ void grid_barrier(unsigned target) const {
    workers_sync();  // (g)
    if (tid == 0) {
      unsigned* counter = &m.state->counter;
      arrive_release(counter);
      const long long start = clock64();
      for (unsigned seen; MUTANT != 8 && (int)((seen = load_acquire(counter)) - target) < 0;)
        if (clock64() - start > PATIENCE) give_up(m.failure, SYNC_GRID, s.layer, target - seen);
    }
    workers_sync();  // (h)
  }

  // S10 LM HEAD   math: logits = rows @ LNf(x), token = argmax   owner: a range of rows a block   reads V * C * 2 bytes
  // (logit, token) are packed into 64 bits whose order as an integer is that of the logit, then of the smaller token;
  // NaN counts as the largest, as in torch. The largest of all does not depend on the order of arrival.
  __device__ void lm_head(const Columns& x) {
    unsigned long long best = 0;
    for (int first = s.plan.first_row; first < s.plan.last_row; first += TILE_ROWS) {
      const int n = min(TILE_ROWS, s.plan.last_row - first), token = first + row;
      const float logit = dot_tile(x, n, 0, false);
      if (row < n) {
        if (team_warp == 0 && lane % LANES < R) m.logits[token] = logit;
        const uint32_t bits = __float_as_uint(logit);
        const uint32_t order = logit != logit ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
        best = max(best, (unsigned long long)order << 32 | ~(uint32_t)token);
      }
    }
#pragma unroll
    for (int w = 16; w >= 1; w /= 2) best = max(best, __shfl_xor_sync(~0u, best, w));
    if (lane == 0) atomicMax(&m.state->best, best);
  }
};

// ------------------------------------------------------------------------------------------------------------------
// 8. The kernel
// ------------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(WORKERS + 32, 1)
fused_block(const __grid_constant__ Model m, const int first_layer, const int last_layer, const int lm_head) {
  extern __shared__ uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  State& state = *m.state;
  const int position = state.position, token = max(state.token, 0);
  if (position >= CTX) return;  // no row left in the cache: all blocks leave, and nothing changes

  if (threadIdx.x == 0) {
    s.plan = make_plan(blockIdx.x, gridDim.x, position);
    s.rotation = state.rotation, s.arrivals = state.arrivals;
    for (int i = 0; i < STAGES; i++) barrier_init(&s.full[i], 1), barrier_init(&s.empty[i], WARPS);
    barrier_init(&s.qkv_ready, 1), barrier_init(&s.slice_ready, 1), barrier_init(&s.sums_ready, 1);
    barriers_exist();
  }
  for (int i = threadIdx.x; i < ROT / 2; i += WORKERS + 32) {
    s.rope_cos[i] = m.rope_cos[position * (ROT / 2) + i];
    s.rope_sin[i] = m.rope_sin[position * (ROT / 2) + i];
  }
  cluster_sync();  // (0)

  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS) Producer{m, s}.run(s.plan, first_layer, last_layer, lm_head);
    return;
  }

  const Plan& plan = s.plan;
  Worker w{m, s};
  Columns x, xn1, xn2;
  Norms norms = w.load_norms(first_layer);
  if (first_layer == 0) w.read_embedding(token, x);
  else w.read_residual(m.residual + s.rotation % 3 * C, x);

  for (int layer = first_layer; layer < last_layer; layer++) {
    const int step = layer - first_layer;
    long long* x_next = m.residual + (s.rotation + step + 1) % 3 * C;
    long long* x_clear = m.residual + (s.rotation + step + 2) % 3 * C;  // all have read it: they have passed (4) since
    if (w.tid == 0) s.layer = layer;
    for (int c = (gridDim.x - 1 - blockIdx.x) * WORKERS + w.tid; c < C; c += gridDim.x * WORKERS) x_clear[c] = 0;

    const bool carries_x = blockIdx.x == gridDim.x - 1 && w.team == 0;  // x and the biases enter the sum once
    for (int i = 0; i < COLS; i++) w.y[i] = carries_x ? x[i] : 0.f;
    w.normalize(x);                                                     // S1
    w.affine(x, norms.w1, norms.b1, xn1);
    w.affine(x, norms.w2, norms.b2, xn2);
    for (int p = 0; carries_x && p < PIECES; p++) {
      axpy8(1, load16(m.layers[layer].b_out + w.column(8 * p)), w.y + 8 * p);
      axpy8(1, load16(m.layers[layer].b_down + w.column(8 * p)), w.y + 8 * p);
    }
#ifdef TAPS
    for (int i = 0; carries_x && i < COLS; i++) TAP(TAP_XN1 + w.column(i), xn1[i]), TAP(TAP_XN2 + w.column(i), xn2[i]);
#endif
    MARK(MARK_NORM);

    int unit = plan.first_unit;
    for (int h = plan.cluster; h < NH; h += plan.clusters) {
      if (h != plan.cluster) workers_sync();                            // (f)
      if (w.tid == 0) barrier_expect(&s.slice_ready, sizeof(s.slice_o) + sizeof(s.slice_ml));
      w.qkv_rows(xn1, h);                                               // S2
      MARK(MARK_QKV);
      w.units(MUTANT == 2 ? xn1 : xn2, unit, min(unit + plan.filler, plan.last_unit));  // S8, while q, k, v travel
      unit = min(unit + plan.filler, plan.last_unit);
      if (MUTANT != 9) wait(m, s, &s.qkv_ready, w.head_parity, SYNC_QKV);       // (1)
      MARK(MARK_1);
      w.rotate_and_append(layer, h, position);                          // S3, S4
      w.attend();                                                       // S5
      MARK(MARK_ATTEND);
      w.units(xn2, unit, min(unit + plan.filler, plan.last_unit));      // S8, while m, l, o travel
      unit = min(unit + plan.filler, plan.last_unit);
      if (MUTANT != 10) wait(m, s, &s.slice_ready, w.head_parity, SYNC_SLICE);  // (2)
      w.head_parity ^= 1;
      MARK(MARK_2);
      w.out_rows(h);                                                    // S6, S7
      MARK(MARK_OUT);
    }
    w.units(MUTANT == 2 ? xn1 : xn2, unit, plan.last_unit);             // S8
    MARK(MARK_UNITS);
    w.cluster_reduce();                                                 // S9, (3)
    MARK(MARK_3);
    w.add_to_residual(x_next);
    norms = w.load_norms(layer + 1);
    MARK(MARK_ADDED);
    if (layer + 1 == last_layer && !lm_head) break;                     // the end of the launch publishes x
    w.grid_barrier(s.arrivals + (step + 1) * gridDim.x);                  // (4)
#ifdef TIMELINE
    if (w.tid == 0) m.timeline[((size_t)blockIdx.x * (L + 1) + layer + 1) * MARKS + MARK_START] = global_ns();
#endif
    w.read_residual(x_next, x);
  }
  if (lm_head) {
    w.normalize(x);
    w.affine(x, norms.w1, norms.b1, xn1);
    w.lm_head(xn1);                                                     // S10
  }

  workers_sync();
  const int steps = last_layer - first_layer;
  if (w.tid == 0) {
    __threadfence();
    if (atomicAdd(&state.finished, 1) == gridDim.x - 1) {  // the last block of all makes the state ready for a launch
      __threadfence();
      state.finished = 0;
      state.rotation = (s.rotation + steps) % 3;
      state.arrivals = s.arrivals + (lm_head ? steps : steps - 1) * gridDim.x;
      if (lm_head) {
        state.token = ~(uint32_t)atomicExch(&state.best, 0ull);
        m.history[position] = state.token;
        state.position = position + 1;
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------
// 9. Host side
// ------------------------------------------------------------------------------------------------------------------

static cudaLaunchConfig_t configure(cudaLaunchAttribute (&attributes)[2], int clusters, void* stream) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {K, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;  // the driver starts all blocks at once, or refuses
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * K);
  config.blockDim = dim3(WORKERS + 32);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = (cudaStream_t)stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return config;
}

// ------------------------------------------------------------------------------------------------------------------
// 10. Binding: plain C, called through ctypes. Functions return NULL, or what went wrong.
// ------------------------------------------------------------------------------------------------------------------

// How many clusters the current device holds at once: what it can, not what it should; a grid barrier over more of
// them would wait for blocks that cannot start.
extern "C" const char* fused_prepare(int* clusters) {
  int device, multiprocessors;
  cudaLaunchAttribute attributes[2];
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (e == cudaSuccess)
    e = cudaFuncSetAttribute(fused_block, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (e == cudaSuccess) {
    cudaLaunchConfig_t config = configure(attributes, multiprocessors / K, nullptr);
    config.numAttrs = 1;
    e = cudaOccupancyMaxActiveClusters(clusters, fused_block, &config);
    if (*clusters > multiprocessors / K) *clusters = multiprocessors / K;
  }
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

extern "C" const char* fused_launch(const void* const* pointers, int clusters, int first_layer, int last_layer,
                                    int lm_head, void* stream) {
  Model m;
  memcpy(&m, pointers, sizeof(Model));
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configure(attributes, clusters, stream);
  const cudaError_t e = cudaLaunchKernelEx(&config, fused_block, m, first_layer, last_layer, lm_head);
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

// For the emulator and for --explain, on machines without a GPU: the division of work, and the derived sizes.
extern "C" void fused_plan(int block, int blocks, int position, Plan* plan) { *plan = make_plan(block, blocks, position); }
extern "C" void fused_sizes(int* workers, int* stages, int* shared_bytes) {
  *workers = WORKERS, *stages = STAGES, *shared_bytes = sizeof(Shared);
}

// ------------------------------------------------------------------------------------------------------------------
// 11. Exercises
// ------------------------------------------------------------------------------------------------------------------
//
// 1. Build with --cluster 4 for 2.8b (python bench.py --ablate does). Fewer blocks fit, so the stream is thinner; which
//    share of the slowdown is that, and which is the longer way of (1) to (3)?
// 2. Take the filler units away (filler = 0). The time of a block grows by what (1) and (2) take to travel.
// 3. Replace to_fixed and add_relaxed by a float atomicAdd. How many of 1000 launches still agree in every bit?
// 4. Let all threads poll in grid_barrier instead of one. Why is that slower, although nobody waits for (h) any more?
// 5. Drop one line of the sync table and run python test_block.py. Which test sees it, and how often?
