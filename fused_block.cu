#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cstdint>
#include <cstdio>
#include <cstring>

// ---------------------------------------------------------------------------------------------------------------------
// 3. Configuration
// ---------------------------------------------------------------------------------------------------------------------

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int C = HIDDEN, NH = HEADS, HS = HEAD_SIZE, F = MLP, V = VOCAB, L = LAYERS, CTX = CONTEXT;
constexpr int ROT = ROTARY;            // rotated dimensions of a head, the first quarter in Pythia
constexpr int K = CLUSTER;             // thread blocks in a cluster
constexpr float LN_EPS = 1e-5f;

constexpr int P = C < 4096 ? 1 : 2;                   // 16-byte pieces of a row that one thread owns
constexpr int TEAM = C / (8 * P);                     // threads that cover one row of C
constexpr int TEAMS = ceil_div(THREADS, TEAM);          // teams in a block; each works on rows of its own
constexpr int WORKERS = TEAMS * TEAM;                 // threads that compute
constexpr int WARPS = WORKERS / 32;
constexpr int LANES = TEAM < 32 ? TEAM : 32;          // lanes of a warp that belong to one team
constexpr int TEAM_WARPS = TEAM / LANES;              // warps in a team (1 where a team is half a warp)
constexpr int R = ROWS;                               // rows a team takes from one tile
constexpr int TILE_ROWS = R * TEAMS;                  // rows of C in one tile
constexpr int TILE_BYTES = TILE_ROWS * C * 2;
constexpr int BIAS_HALFS = (TILE_ROWS + 7) / 8 * 8 + 8;  // a tile's biases, fetched in aligned groups of 8
constexpr int QKV_ROWS = 3 * HS / K, OUT_ROWS = HS / K;  // a rank's share of one head's rows
constexpr int KV_TOKENS = TILE_BYTES / 2 / (HS * 2);     // tokens in one K/V tile: half a stage of K, half of V
constexpr int TOKEN_LANES = HS <= 32 ? 4 : HS <= 64 ? 8 : HS <= 128 ? 16 : 32;  // lanes that share one cached token
constexpr int WARP_TOKENS = 32 / TOKEN_LANES;
constexpr int OWN = C / K;                            // columns of the residual stream a rank sums at a block's end

static_assert(C % 128 == 0, "a row is split into 16-byte pieces, one a thread: C must be a multiple of 128");
static_assert(WORKERS % 32 == 0 && WORKERS <= 992, "workers must be whole warps and leave room for the producer warp");
static_assert(HS % (8 * (K > 4 ? 1 : 1)) == 0 && HS % K == 0, "ranks split a head's rows evenly");
static_assert(OWN % 8 == 0, "a rank owns whole 16-byte pieces of the residual stream");
static_assert(NH * HS == C, "the heads together are as wide as the residual stream");
static_assert((R & (R - 1)) == 0 && R <= LANES, "reduce_rows folds a power of two of rows over the lanes of a team");
static_assert(HS <= WORKERS, "one thread a dimension merges the attention partials");

// ---------------------------------------------------------------------------------------------------------------------
// 4. Memory map
// ---------------------------------------------------------------------------------------------------------------------

struct Layer {  // one block's weights, fp16, all matrices as rows of C
  const half *ln1_w, *ln1_b, *ln2_w, *ln2_b, *w_qkv, *b_qkv, *w_out, *b_out, *w_up, *b_up, *w_down, *b_down;
};

struct State {         // lives in global memory from launch to launch
  int token;           // the token this launch reads, then the one it chose
  int position;        // tokens in the cache before this launch
  unsigned rotation;   // which of the three residual buffers holds x
  unsigned arrivals;   // value of `counter` when this launch starts
  unsigned counter;    // grid barrier: one arrival a block
  unsigned ticket;     // blocks that have finished
  unsigned long long best;  // (logit, token) of the best logit so far, packed so that max() finds the winner
};

struct Failure { int sync, block, layer, seen; };  // host memory: what the launch was waiting for when it gave up

struct Model {
  Layer layers[L];
  const half *embed_in, *lnf_w, *lnf_b, *embed_out;
  const float *rope_cos, *rope_sin;   // [CTX, ROT / 2]
  half* cache;                        // [L, 2, NH, CTX, HS]
  long long* residual;                // [3, C], fixed point
  float* logits;                      // [V]
  int* history;                       // [CTX] the token chosen at each position
  State* state;
  Failure* failure;
  float* taps;                        // used by builds with -DTAPS only
  unsigned long long* timeline;       // used by builds with -DTIMELINE only
};

struct Inboxes {
  float head_inbox[3 * HS];            // q, k, v of one head, pushed by all ranks
  float part_m[WARPS], part_l[WARPS], part_o[WARPS][HS];
  float slice_o[K][OUT_ROWS], slice_ml[K][2];   // attention partials of this rank's slice of o, one a rank
  alignas(16) float x[C];
  float q[HS];
  alignas(16) half k_new[HS], v_new[HS];
  alignas(16) float sum_inbox[K * TEAMS][OWN];  // partial sums of this rank's columns of y, one a team of the cluster
  float dot_part[2][TEAMS][R][TEAM_WARPS];
  float ln_part[2][TEAMS][TEAM_WARPS][2];
  float rope_cos[ROT / 2], rope_sin[ROT / 2];
  uint64_t qkv_ready, slice_ready, sum_ready;
  int layer;
};
constexpr int STAGE_BYTES = TILE_BYTES + BIAS_HALFS * 2 + 16;  // weights, biases, the two barriers of a stage
constexpr int STAGES_THAT_FIT = (SHARED_BYTES - (int)sizeof(Inboxes) - 256) / STAGE_BYTES;
constexpr int STAGES = STAGES_THAT_FIT < 32 ? STAGES_THAT_FIT : 32;
static_assert(STAGES >= 3, "the ring needs three stages: one being read and two on their way");

struct alignas(128) Shared : Inboxes {
  alignas(128) half ring[STAGES][TILE_ROWS * C];
  alignas(16) half bias[STAGES][BIAS_HALFS];
  uint64_t full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the ring and the inboxes together exceed a block's shared memory");

// ---------------------------------------------------------------------------------------------------------------------
// 5. Toolbox
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t smem(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ uint32_t cluster_rank() { uint32_t r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }

__device__ __forceinline__ uint32_t peer(uint32_t address, uint32_t rank) {
  uint32_t a;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(address), "r"(rank));
  return a;
}

__device__ __forceinline__ void push(uint32_t to, float v, uint32_t bar) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               :: "r"(to), "r"(__float_as_uint(v)), "r"(bar) : "memory");
}
__device__ __forceinline__ void push4(uint32_t to, const float* v, uint32_t bar) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
               :: "r"(to), "r"(__float_as_uint(v[0])), "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])),
                  "r"(__float_as_uint(v[3])), "r"(bar) : "memory");
}

__device__ __forceinline__ void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(smem(b)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(smem(b)) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(smem(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool barrier_done(uint64_t* b, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(smem(b)), "r"(parity) : "memory");
  return done;
}

__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* bar, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               :: "r"(smem(to)), "l"(from), "r"(bytes), "r"(smem(bar)), "l"(policy) : "memory");
}

__device__ __forceinline__ void red_add(long long* p, long long v) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" :: "l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ void red_release(unsigned* p) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(p) : "memory");
}
__device__ __forceinline__ void red_relaxed(unsigned* p) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" :: "l"(p) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void load_fixed2(const long long* p, long long& a, long long& b) {
  asm volatile("ld.relaxed.gpu.global.v2.s64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(p) : "memory");
}
__device__ __forceinline__ uint4 load16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void workers_sync() { named_barrier(1, WORKERS); }
__device__ __forceinline__ void team_sync(int team) { named_barrier(TEAMS == 1 ? 1 : 2 + team, TEAM); }

__device__ __noinline__ void give_up(Failure* f, int sync, int layer, int seen) {
  if (atomicCAS_system(&f->sync, 0, sync) == 0) { f->block = blockIdx.x; f->layer = layer; f->seen = seen; }
  __threadfence_system();
  __trap();
}

constexpr long long PATIENCE = 6'000'000'000;  // clock cycles, about 3 s

enum Sync { FULL = 10, EMPTY = 11, QKV = 1, SLICE = 2, GRID = 3, SUM = 4 };

__device__ __forceinline__ void wait(const Model& m, Shared& s, uint64_t* bar, uint32_t parity, int sync) {
  if (barrier_done(bar, parity)) return;
  const long long start = clock64();
  while (!barrier_done(bar, parity))
    if (clock64() - start > PATIENCE) give_up(m.failure, sync, s.layer, parity);
}

// fixed point
constexpr float FIXED_ONE = 16777216.f;             // 2^24
constexpr float FIXED_LIMIT = 65536.f;              // 2^16
constexpr long long FIXED_NAN = 5ll << 46, FIXED_NAN_EDGE = 9ll << 44;
__device__ __forceinline__ long long to_fixed(float v) {
  return (fabsf(v) < FIXED_LIMIT ? __float2ll_rn(v * FIXED_ONE) : FIXED_NAN) * 256 + 1;
}
__device__ __forceinline__ float from_fixed(long long word) {
  const long long q = word >> 8;
  return q < FIXED_NAN_EDGE && q > -FIXED_NAN_EDGE ? __ll2float_rn(q) * (1.f / FIXED_ONE) : __int_as_float(0x7fffffff);
}

#ifdef TAPS
enum Tap { TAP_XN1 = 0, TAP_XN2 = TAP_XN1 + C, TAP_Q = TAP_XN2 + C, TAP_K = TAP_Q + C, TAP_V = TAP_K + C, TAP_O = TAP_V + C,
           TAP_H = TAP_O + C };
#define TAP(where, value) (m.taps[where] = (value))
#else
#define TAP(where, value) ((void)0)
#endif

enum Mark { M_START, M_NORM, M_QKV, M_GATHER, M_ATTN, M_SLICE, M_OUT, M_UNITS, M_SUM, M_ARRIVE, MARKS };
#ifdef TIMELINE
__device__ __forceinline__ unsigned long long now_ns() { unsigned long long t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t; }
#define MARK(event) do { if (threadIdx.x == 0) m.timeline[((size_t)blockIdx.x * (L + 1) + mark_layer) * MARKS + event] = now_ns(); } while (0)
#else
#define MARK(event) ((void)0)
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 6. The two inner loops
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void widen(const uint4& w, float* f) {
  const half2* h = reinterpret_cast<const half2*>(&w);
#pragma unroll
  for (int i = 0; i < 4; i++) { const float2 p = __half22float2(h[i]); f[2 * i] = p.x; f[2 * i + 1] = p.y; }
}

__device__ __forceinline__ float dot8(const uint4& w, const float* x, float a = 0) {
  float f[8];
  widen(w, f);
#pragma unroll
  for (int i = 0; i < 8; i++) a = fmaf(f[i], x[i], a);
  return a;
}

__device__ __forceinline__ void axpy8(float a, const uint4& w, float* y) {
  float f[8];
  widen(w, f);
#pragma unroll
  for (int i = 0; i < 8; i++) y[i] = fmaf(a, f[i], y[i]);
}

// Sums p[r] over the lanes of a team in this warp, for R rows at once; lane l returns row l % R.
__device__ __forceinline__ float reduce_rows(float (&p)[R], int lane) {
#pragma unroll
  for (int w = R / 2; w >= 1; w /= 2) {
    const bool upper = lane & w;
#pragma unroll
    for (int i = 0; i < w; i++) {
      const float send = upper ? p[i] : p[i + w], keep = upper ? p[i + w] : p[i];
      p[i] = keep + __shfl_xor_sync(~0u, send, w);
    }
  }
#pragma unroll
  for (int w = R; w < LANES; w *= 2) p[0] += __shfl_xor_sync(~0u, p[0], w);
  return p[0];
}

// ---------------------------------------------------------------------------------------------------------------------
// Who does what
// ---------------------------------------------------------------------------------------------------------------------

struct Plan {
  int rank, cluster, clusters;
  int first_unit, last_unit, part;   // hidden units of this block, and how many go between two attention steps
  int first_token, last_token;       // cached tokens of this rank
  int first_row, last_row;           // LM-head rows of this block
};

__device__ Plan make_plan(int position) {
  Plan p;
  p.rank = cluster_rank();
  p.cluster = blockIdx.x / K;
  p.clusters = gridDim.x / K;
  const int blocks = gridDim.x, b = blockIdx.x;
  const int few = NH / p.clusters, heavy = NH % p.clusters * K;  // `heavy` blocks have one head more than `few`
  const long long cost = 256ll * HS * (2 * C + position) / (K * C) + 256ll * HEAD_BYTES / (4 * C);  // a head's bytes a block, in 1/256 hidden units
  const long long fair = (256ll * F + cost * NH * K) / blocks;
  const long long more = heavy ? max(0ll, fair - (few + 1) * cost) : 0;
  const long long less = max(1ll, (256ll * F - more * heavy) / max(1, blocks - heavy));
  const long long all = more * heavy + less * (blocks - heavy);
  const long long before = more * min(b, heavy) + less * max(0, b - heavy);
  p.first_unit = F * before / all;
  p.last_unit = F * (before + (b < heavy ? more : less)) / all;
  const int my_heads = few + (b < heavy);
  p.part = ceil_div(ceil_div(p.last_unit - p.first_unit, 2 * my_heads + 1), TILE_ROWS) * TILE_ROWS;
  const int tokens = ceil_div(position, K);
  p.first_token = min(position, tokens * p.rank);
  p.last_token = min(position, tokens * (p.rank + 1));
  p.first_row = (long long)V * b / blocks;
  p.last_row = (long long)V * (b + 1) / blocks;
  return p;
}

struct Ring {  // position in the ring: which stage is next, and the parity of its next completion
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() { if (++stage == STAGES) { stage = 0; parity ^= 1; } }
};

// ---------------------------------------------------------------------------------------------------------------------
// The producer
// ---------------------------------------------------------------------------------------------------------------------

struct Producer {
  const Model& m;
  Shared& s;
  Ring ring;
  uint64_t policy;

  __device__ void acquire(uint32_t bytes) {
    wait(m, s, &s.empty[ring.stage], ring.parity ^ 1, EMPTY);
    barrier_expect(&s.full[ring.stage], bytes);
  }
  __device__ void copy(void* to, const void* from, uint32_t bytes) {
    bulk_copy(to, from, bytes, &s.full[ring.stage], policy);
  }
  __device__ void row_tile(const half* w, const half* bias, int row, int n) {
    const int skip = row % 8, bias_bytes = bias ? ceil_div(skip + n, 8) * 16 : 0;
    acquire(n * C * 2 + bias_bytes);
    copy(s.ring[ring.stage], w + (size_t)row * C, n * C * 2);
    if (bias) copy(s.bias[ring.stage], bias + row - skip, bias_bytes);
    ring.next();
  }
  __device__ void rows(const half* w, const half* bias, int first, int last) {
    for (int row = first; row < last; row += TILE_ROWS) row_tile(w, bias, row, min(TILE_ROWS, last - row));
  }
  __device__ void units(const Layer& w, int first, int last) {
    for (int j = first; j < last; j += TILE_ROWS) {
      const int n = min(TILE_ROWS, last - j);
      row_tile(w.w_up, w.b_up, j, n);
      row_tile(w.w_down, nullptr, j, n);
    }
  }
  __device__ void tokens(const half* k, const half* v, int first, int last) {
    for (int t = first; t < last; t += KV_TOKENS) {
      const int bytes = min(KV_TOKENS, last - t) * HS * 2;
      acquire(2 * bytes);
      copy(s.ring[ring.stage], k + (size_t)t * HS, bytes);
      copy(s.ring[ring.stage] + KV_TOKENS * HS, v + (size_t)t * HS, bytes);
      ring.next();
    }
  }
};

__device__ __forceinline__ half* cache_row(const Model& m, int layer, int kv, int head, int t) {
  return m.cache + (((size_t)(layer * 2 + kv) * NH + head) * CTX + t) * HS;
}

__device__ void produce(const Model& m, Shared& s, const Plan& plan, int first_layer, int last_layer, bool head) {
  Producer p{m, s};
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p.policy));
  for (int layer = first_layer; layer < last_layer; layer++) {
    const Layer& w = m.layers[layer];
    int unit = plan.first_unit;
    auto part = [&] { const int end = min(unit + plan.part, plan.last_unit); p.units(w, unit, end); unit = end; };
    for (int h = plan.cluster; h < NH; h += plan.clusters) {
      const int qkv = h * 3 * HS + plan.rank * QKV_ROWS, out = h * HS + plan.rank * OUT_ROWS;
      p.rows(w.w_qkv, w.b_qkv, qkv, qkv + QKV_ROWS);
      part();
      p.tokens(cache_row(m, layer, 0, h, 0), cache_row(m, layer, 1, h, 0), plan.first_token, plan.last_token);
      part();
      p.rows(w.w_out, nullptr, out, out + OUT_ROWS);
    }
    p.units(w, unit, plan.last_unit);
  }
  if (head) p.rows(m.embed_out, nullptr, plan.first_row, plan.last_row);
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. The stages
// ---------------------------------------------------------------------------------------------------------------------

struct Norms { uint4 w1[P], b1[P], w2[P], b2[P], b_out[P], b_down[P]; };

struct Worker {
  const Model& m;
  Shared& s;
  const Plan& plan;
  Ring ring;
  int tid, warp, lane, team, column, team_warp, row;  // `row`: which of a tile's rows this lane finishes
  int flip = 0;
  uint32_t head_parity = 0, sum_parity = 0;
  float y[8 * P];
  int mark_layer = 0;

  __device__ Worker(const Model& m, Shared& s, const Plan& plan) : m(m), s(s), plan(plan) {
    tid = threadIdx.x;
    warp = tid / 32;
    lane = tid % 32;
    team = tid / TEAM;
    column = tid % TEAM * 8;
    team_warp = tid % TEAM / 32;
    row = lane % R * TEAMS + team;
  }

  __device__ void wait_full() { wait(m, s, &s.full[ring.stage], ring.parity, FULL); }
  __device__ void release() {
    __syncwarp();
    if (lane == 0) barrier_arrive(&s.empty[ring.stage]);
    ring.next();
  }
  __device__ uint4 piece(int r, int p) const {  // piece p of this thread in row r of the current tile
    return *reinterpret_cast<const uint4*>(&s.ring[ring.stage][r * C + column + p * TEAM * 8]);
  }

  // dot: lane returns the finished dot product (plus bias) of tile row `row`
  __device__ float dot_tile(const float (&x)[8 * P], int n, int bias_skip) {
    wait_full();
    float sums[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
      sums[r] = 0;
#pragma unroll
      for (int p = 0; p < P; p++)
        if (r * TEAMS + team < n) sums[r] = dot8(piece(r * TEAMS + team, p), x + 8 * p, sums[r]);
    }
    const float bias = bias_skip >= 0 && row < n ? __half2float(s.bias[ring.stage][bias_skip + row]) : 0.f;
    release();
    float sum = reduce_rows(sums, lane);
    if (TEAM_WARPS > 1) {
      float(&part)[R][TEAM_WARPS] = s.dot_part[flip][team];
      if (lane < R) part[lane][team_warp] = sum;
      team_sync(team);
      sum = 0;
#pragma unroll
      for (int w = 0; w < TEAM_WARPS; w++) sum += part[lane % R][w];
      flip ^= 1;
    }
    return sum + bias;
  }

  // axpy: y += a[row] * row, where lane l % R holds a
  __device__ void axpy_tile(float a, int n) {
    wait_full();
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float ar = __shfl_sync(~0u, a, r, LANES);
#pragma unroll
      for (int p = 0; p < P; p++)
        if (r * TEAMS + team < n) axpy8(ar, piece(r * TEAMS + team, p), y + 8 * p);
    }
    release();
  }

  // S1: LayerNorm statistics; x becomes (x - mean) / std
  __device__ void normalize(float (&x)[8 * P]) {
    float mean = 0, square = 0, count = 8 * P;
#pragma unroll
    for (int i = 0; i < 8 * P; i++) mean += x[i];
    mean /= count;
#pragma unroll
    for (int i = 0; i < 8 * P; i++) square += (x[i] - mean) * (x[i] - mean);
#pragma unroll
    for (int w = 1; w < LANES; w *= 2) {
      const float other = __shfl_xor_sync(~0u, mean, w), delta = other - mean;
      square += __shfl_xor_sync(~0u, square, w) + delta * delta * (0.5f * count);
      mean = 0.5f * (mean + other);
      count *= 2;
    }
    if (TEAM_WARPS > 1) {
      float(&part)[TEAM_WARPS][2] = s.ln_part[flip][team];
      if (lane == 0) { part[team_warp][0] = mean; part[team_warp][1] = square; }
      team_sync(team);
      mean = 0;
#pragma unroll
      for (int w = 0; w < TEAM_WARPS; w++) mean += part[w][0];
      mean *= 1.f / TEAM_WARPS;
      square = 0;
#pragma unroll
      for (int w = 0; w < TEAM_WARPS; w++) square += part[w][1] + count * (part[w][0] - mean) * (part[w][0] - mean);
      flip ^= 1;
    }
    const float scale = rsqrtf(square * (1.f / C) + LN_EPS);
#pragma unroll
    for (int i = 0; i < 8 * P; i++) x[i] = (x[i] - mean) * scale;
  }

  __device__ void affine(const float (&x)[8 * P], const uint4 (&w)[P], const uint4 (&b)[P], float (&out)[8 * P]) {
#pragma unroll
    for (int p = 0; p < P; p++) {
      float fw[8], fb[8];
      widen(w[p], fw);
      widen(b[p], fb);
#pragma unroll
      for (int i = 0; i < 8; i++) out[8 * p + i] = fmaf(x[8 * p + i], fw[i], fb[i]);
    }
  }

  // S2: q, k, v of head h; pushed to all ranks
  __device__ void qkv_rows(const float (&x)[8 * P], int h) {
    if (tid == 0) barrier_expect(&s.qkv_ready, sizeof(s.head_inbox));
    const int first = plan.rank * QKV_ROWS;
    for (int i = 0; i < QKV_ROWS; i += TILE_ROWS) {
      const int n = min(TILE_ROWS, QKV_ROWS - i);
      const float value = dot_tile(x, n, (h * 3 * HS + first + i) % 8);
      cluster_gather(&s.head_inbox[first + i + row], value, row < n && team_warp == 0, &s.qkv_ready);
    }
  }

  // ClusterGather: lanes of a team's first warp copy `value` into every rank's shared memory
  __device__ void cluster_gather(float* slot, float value, bool valid, uint64_t* ready) {
    if (!valid) return;
    for (int r = lane % LANES / R; r < K; r += LANES / R) push(peer(smem(slot), r), value, peer(smem(ready), r));
  }

  // S3, S4: RoPE; k and v of the new token, rounded to what the cache holds
  __device__ void rotate_and_append(int layer, int h, int position) {
    for (int i = tid; i < 3 * HS; i += WORKERS) {
      const int d = i % HS;
      const float* v = s.head_inbox + i - d;
      float value = v[d];
      if (i < 2 * HS && d < ROT) {
        const int pair = d % (ROT / 2);
        const float other = d < ROT / 2 ? -v[d + ROT / 2] : v[d - ROT / 2];
        value = fmaf(value, s.rope_cos[pair], other * s.rope_sin[pair]);
      }
      if (i < HS) {
        s.q[d] = value * (rsqrtf((float)HS) * 1.4426950408889634f);
        TAP(TAP_Q + h * HS + d, value);
      } else {
        const int kv = i / HS - 1;
        (kv ? s.v_new : s.k_new)[d] = __float2half_rn(value);
        if (plan.rank == K - 1) cache_row(m, layer, kv, h, position)[d] = __float2half_rn(value);
        TAP((kv ? TAP_V : TAP_K) + h * HS + d, value);
      }
    }
    workers_sync();
  }

  // S5: attend over this rank's tokens; push the partials to their owners
  __device__ void attend() {
    const int chunk = lane % TOKEN_LANES * 8, sub = lane / TOKEN_LANES;
    const bool holds = chunk < HS;
    float q[8], o[8], mx = -1e30f, l = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) { q[i] = holds ? s.q[chunk + i] : 0.f; o[i] = 0; }

    if (plan.rank == K - 1 && warp == WARPS - 1) {  // the new token
      float a = holds ? dot8(*reinterpret_cast<const uint4*>(s.k_new + chunk), q) : 0.f;
#pragma unroll
      for (int w = 1; w < TOKEN_LANES; w *= 2) a += __shfl_xor_sync(~0u, a, w);
      if (sub == 0) {
        mx = a;
        l = 1;
        if (holds) widen(*reinterpret_cast<const uint4*>(s.v_new + chunk), o);
      }
    }

    constexpr int U = 4, STEP = WARPS * WARP_TOKENS;
    for (int t0 = plan.first_token; t0 < plan.last_token; t0 += KV_TOKENS) {
      const int n = min(KV_TOKENS, plan.last_token - t0);
      wait_full();
      const half *k_tile = s.ring[ring.stage], *v_tile = k_tile + KV_TOKENS * HS;
      for (int base = warp * WARP_TOKENS; base < n; base += U * STEP) {
        float a[U], top = mx;
#pragma unroll
        for (int u = 0; u < U; u++) {
          const int t = base + u * STEP + sub;
          a[u] = t < n && holds ? dot8(*reinterpret_cast<const uint4*>(k_tile + t * HS + chunk), q) : 0.f;
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
          for (int w = 1; w < TOKEN_LANES; w *= 2) a[u] += __shfl_xor_sync(~0u, a[u], w);
          if (base + u * STEP + sub < n) top = fmaxf(top, a[u]);
        }
        const float shrink = exp2f(mx - top);
        mx = top;
        l *= shrink;
#pragma unroll
        for (int i = 0; i < 8; i++) o[i] *= shrink;
#pragma unroll
        for (int u = 0; u < U; u++) {
          const int t = base + u * STEP + sub;
          if (t < n) {
            const float e = exp2f(a[u] - top);
            l += e;
            if (holds) axpy8(e, *reinterpret_cast<const uint4*>(v_tile + t * HS + chunk), o);
          }
        }
      }
      release();
    }

#pragma unroll
    for (int w = TOKEN_LANES; w < 32; w *= 2) {  // merge the tokens that share a warp
      const float top = fmaxf(mx, __shfl_xor_sync(~0u, mx, w));
      const float mine = exp2f(mx - top);
      mx = top;
      l *= mine;
      l += __shfl_xor_sync(~0u, l, w);
#pragma unroll
      for (int i = 0; i < 8; i++) { o[i] *= mine; o[i] += __shfl_xor_sync(~0u, o[i], w); }
    }
    if (sub == 0 && holds) {
#pragma unroll
      for (int i = 0; i < 8; i++) s.part_o[warp][chunk + i] = o[i];
    }
    if (lane == 0) { s.part_m[warp] = mx; s.part_l[warp] = l; }
    workers_sync();
    if (tid < HS) {  // merge the warps, push to the rank that owns this slice of o
      float top = s.part_m[0], sum = 0, out = 0;
#pragma unroll
      for (int w = 1; w < WARPS; w++) top = fmaxf(top, s.part_m[w]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float e = exp2f(s.part_m[w] - top);
        sum = fmaf(e, s.part_l[w], sum);
        out = fmaf(e, s.part_o[w][tid], out);
      }
      const int owner = tid / OUT_ROWS;
      push(peer(smem(&s.slice_o[plan.rank][tid % OUT_ROWS]), owner), out, peer(smem(&s.slice_ready), owner));
      if (tid < K) {
        const uint32_t ready = peer(smem(&s.slice_ready), tid);
        push(peer(smem(&s.slice_ml[plan.rank][0]), tid), top, ready);
        push(peer(smem(&s.slice_ml[plan.rank][1]), tid), sum, ready);
      }
    }
  }

  // S6, S7: merge the ranks' partials, add o[d] * row d for this rank's rows
  __device__ void out_rows(int h) {
    float top = s.slice_ml[0][0], weight[K], sum = 0;
#pragma unroll
    for (int r = 1; r < K; r++) top = fmaxf(top, s.slice_ml[r][0]);
#pragma unroll
    for (int r = 0; r < K; r++) { weight[r] = exp2f(s.slice_ml[r][0] - top); sum = fmaf(weight[r], s.slice_ml[r][1], sum); }
    const float inverse = 1.f / sum;
    for (int i = 0; i < OUT_ROWS; i += TILE_ROWS) {
      const int n = min(TILE_ROWS, OUT_ROWS - i);
      float o = 0;
      if (row < n) {
#pragma unroll
        for (int r = 0; r < K; r++) o = fmaf(weight[r], s.slice_o[r][i + row], o);
        o *= inverse;
        TAP(TAP_O + h * HS + plan.rank * OUT_ROWS + i + row, o);
      }
      axpy_tile(o, n);
    }
  }

  // S8: hidden units [first, last)
  __device__ void units(const float (&x)[8 * P], int first, int last) {
    for (int j = first; j < last; j += TILE_ROWS) {
      const int n = min(TILE_ROWS, last - j);
      const float a = dot_tile(x, n, j % 8);
      const float hidden = 0.5f * a * (1.f + erff(a * 0.7071067811865476f));
      if (row < n) TAP(TAP_H + j + row, hidden);
      axpy_tile(hidden, n);
    }
  }

  // S9: y over the teams, the cluster, the grid
  __device__ void cluster_reduce() {
    if (tid == 0) barrier_expect(&s.sum_ready, sizeof(s.sum_inbox));
#pragma unroll
    for (int p = 0; p < P; p++) {
      const int c = column + p * TEAM * 8, owner = c / OWN;
      const uint32_t slot = peer(smem(&s.sum_inbox[plan.rank * TEAMS + team][c % OWN]), owner);
      const uint32_t ready = peer(smem(&s.sum_ready), owner);
      push4(slot, y + 8 * p, ready);
      push4(slot + 16, y + 8 * p + 4, ready);
    }
    wait(m, s, &s.sum_ready, sum_parity, SUM);
    sum_parity ^= 1;
  }
  __device__ void add_to_residual(long long* x_next) {
    for (int i = tid; i < OWN; i += WORKERS) {
      float sum = 0;
#pragma unroll 8
      for (int p = 0; p < K * TEAMS; p++) sum += s.sum_inbox[p][i];
      red_add(x_next + plan.rank * OWN + i, to_fixed(sum));
    }
  }

  // (3) x is complete when every contribution has been counted
  __device__ void read_residual(const long long* x_now, int expected, float (&x)[8 * P]) {
#pragma unroll
    for (int i = tid; i < C / 2; i += WORKERS) {
      long long a, b;
      load_fixed2(x_now + 2 * i, a, b);
#ifdef COUNTED
      while (expected && ((a & 255) != expected || (b & 255) != expected)) load_fixed2(x_now + 2 * i, a, b);
#endif
      *reinterpret_cast<float2*>(&s.x[2 * i]) = make_float2(from_fixed(a), from_fixed(b));
    }
    workers_sync();
#pragma unroll
    for (int p = 0; p < P; p++)
#pragma unroll
      for (int j = 0; j < 8; j++) x[8 * p + j] = s.x[column + p * TEAM * 8 + j];
  }

  __device__ void grid_barrier(unsigned target) {
    workers_sync();
    if (tid == 0) {
#ifdef COUNTED
      red_relaxed(&m.state->counter);
#else
      red_release(&m.state->counter);
#endif
      if ((int)(load_acquire(&m.state->counter) - target) < 0) {
        const long long start = clock64();
        unsigned seen;
        while ((int)((seen = load_acquire(&m.state->counter)) - target) < 0)
          if (clock64() - start > PATIENCE) give_up(m.failure, GRID, s.layer, target - seen);
      }
    }
    workers_sync();
  }

  __device__ Norms load_norms(int layer) const {
    const Layer& w = m.layers[layer < L ? layer : 0];
    const half* w1 = layer < L ? w.ln1_w : m.lnf_w, *b1 = layer < L ? w.ln1_b : m.lnf_b;
    Norms n;
#pragma unroll
    for (int p = 0; p < P; p++) {
      const int c = column + p * TEAM * 8;
      n.w1[p] = load16(w1 + c);
      n.b1[p] = load16(b1 + c);
      n.w2[p] = load16(w.ln2_w + c);
      n.b2[p] = load16(w.ln2_b + c);
      if (blockIdx.x == gridDim.x - 1) { n.b_out[p] = load16(w.b_out + c); n.b_down[p] = load16(w.b_down + c); }
    }
    return n;
  }

  // S10: LM head and argmax
  __device__ void lm_head(const float (&x)[8 * P]) {
    unsigned long long best = 0;
    for (int v = plan.first_row; v < plan.last_row; v += TILE_ROWS) {
      const int n = min(TILE_ROWS, plan.last_row - v);
      const float logit = dot_tile(x, n, -1);
      if (row < n) {
        if (team_warp == 0 && lane % LANES < R) m.logits[v + row] = logit;
        const uint32_t bits = __float_as_uint(logit);
        const uint32_t order = logit != logit ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        best = max(best, (unsigned long long)order << 32 | (0xffffffffu - (v + row)));
      }
    }
#pragma unroll
    for (int w = 16; w >= 1; w /= 2) best = max(best, __shfl_xor_sync(~0u, best, w));
    if (team_warp == 0 && lane == 0) atomicMax(&m.state->best, best);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// 8. The kernel
// ---------------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(WORKERS + 32, 1)
fused_block(const __grid_constant__ Model m, const int first_layer, const int last_layer, const int head) {
  extern __shared__ uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int position = m.state->position, token = m.state->token;
  const unsigned rotation = m.state->rotation, arrivals = m.state->arrivals;
  const Plan plan = make_plan(position);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) { barrier_init(&s.full[i], 1); barrier_init(&s.empty[i], WARPS); }
    barrier_init(&s.qkv_ready, 1);
    barrier_init(&s.slice_ready, 1);
    barrier_init(&s.sum_ready, 1);
    s.layer = first_layer;
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  for (int i = threadIdx.x; i < ROT / 2; i += WORKERS + 32) {
    s.rope_cos[i] = m.rope_cos[position * (ROT / 2) + i];
    s.rope_sin[i] = m.rope_sin[position * (ROT / 2) + i];
  }
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");

  if (threadIdx.x >= WORKERS) {
    if (threadIdx.x == WORKERS) produce(m, s, plan, first_layer, last_layer, head);
    return;
  }

  Worker w(m, s, plan);
  Norms norms = w.load_norms(first_layer);
  float x[8 * P], xn1[8 * P], xn2[8 * P];
  const int steps = last_layer - first_layer;
  for (int i = 0; i <= steps; i++) {
    const int layer = first_layer + i;
    if (i == steps && !head) break;
#ifdef TIMELINE
    w.mark_layer = layer; const int mark_layer = layer;
#endif
    MARK(M_START);
    if (i == 0 && first_layer == 0) {
#pragma unroll
      for (int p = 0; p < P; p++) widen(load16(m.embed_in + (size_t)token * C + w.column + p * TEAM * 8), x + 8 * p);
    } else {
      w.read_residual(m.residual + (rotation + i) % 3 * C, i ? plan.clusters : 0, x);
    }
    if (i == steps) break;
    long long* x_next = m.residual + (rotation + i + 1) % 3 * C;
    long long* x_clear = m.residual + (rotation + i + 2) % 3 * C;
    if (w.tid == 0) s.layer = layer;

    const bool carries_x = blockIdx.x == gridDim.x - 1 && w.team == 0;
#pragma unroll
    for (int j = 0; j < 8 * P; j++) w.y[j] = carries_x ? x[j] : 0.f;
    if (carries_x) {
#pragma unroll
      for (int p = 0; p < P; p++) {
        axpy8(1.f, norms.b_out[p], w.y + 8 * p);
        axpy8(1.f, norms.b_down[p], w.y + 8 * p);
      }
    }
    w.normalize(x);
    w.affine(x, norms.w1, norms.b1, xn1);
    w.affine(x, norms.w2, norms.b2, xn2);
#ifdef TAPS
    if (blockIdx.x == 0 && w.team == 0)
      for (int j = 0; j < 8 * P; j++) {
        const int c = w.column + j / 8 * TEAM * 8 + j % 8;
        TAP(TAP_XN1 + c, xn1[j]);
        TAP(TAP_XN2 + c, xn2[j]);
      }
#endif
    MARK(M_NORM);

    const int clear = (gridDim.x - 1 - blockIdx.x) * WORKERS;
    if (clear < C) {
      for (int c = clear + w.tid; c < C; c += gridDim.x * WORKERS) x_clear[c] = 0;
      __threadfence();
    }
    int unit = plan.first_unit;
    for (int h = plan.cluster; h < NH; h += plan.clusters) {
      if (h != plan.cluster) workers_sync();
      if (w.tid == 0) barrier_expect(&s.slice_ready, sizeof(s.slice_o) + sizeof(s.slice_ml));
      w.qkv_rows(xn1, h);
      MARK(M_QKV);
      int end = min(unit + plan.part, plan.last_unit);
      w.units(xn2, unit, end);
      unit = end;
      wait(m, s, &s.qkv_ready, w.head_parity, QKV);       // (1)
      MARK(M_GATHER);
      w.rotate_and_append(layer, h, position);
      w.attend();
      MARK(M_ATTN);
      end = min(unit + plan.part, plan.last_unit);
      w.units(xn2, unit, end);
      unit = end;
      wait(m, s, &s.slice_ready, w.head_parity, SLICE);   // (2)
      MARK(M_SLICE);
      w.out_rows(h);
      w.head_parity ^= 1;
      MARK(M_OUT);
    }
    w.units(xn2, unit, plan.last_unit);
    MARK(M_UNITS);

    w.cluster_reduce();
    MARK(M_SUM);
    w.add_to_residual(x_next);
    norms = w.load_norms(layer + 1);
    MARK(M_ARRIVE);
    if (i + 1 < steps || head) w.grid_barrier(arrivals + (i + 1) * gridDim.x);   // (3)
  }
  if (head) {
    w.normalize(x);
    w.affine(x, norms.w1, norms.b1, xn1);
    w.lm_head(xn1);
  }

  workers_sync();
  if (w.tid == 0) {
    __threadfence();
    if (atomicAdd(&m.state->ticket, 1) == gridDim.x - 1) {  // the last block to finish prepares the next launch
      __threadfence();
      State& st = *m.state;
      st.ticket = 0;
      st.rotation = (rotation + steps) % 3;
      st.arrivals = arrivals + (steps - (head ? 0 : 1)) * gridDim.x;
      if (head) {
        st.token = 0xffffffffu - (unsigned)atomicExch(&st.best, 0ull);
        m.history[position] = st.token;
        st.position = position + 1;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 9. Host side
// ---------------------------------------------------------------------------------------------------------------------

static cudaLaunchConfig_t launch_config(cudaLaunchAttribute* attributes, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(WORKERS + 32);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = stream;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = K;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  config.attrs = attributes;
  return config;
}

extern "C" const char* fused_init(int* clusters, int* shared_bytes, int* stages, int* workers) {
  cudaError_t e = cudaFuncSetAttribute(fused_block, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  *shared_bytes = sizeof(Shared);
  *stages = STAGES;
  *workers = WORKERS;
  *clusters = 0;
  if (e != cudaSuccess) return cudaGetErrorString(e);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = launch_config(attributes, 0);
  config.numAttrs = 1;
  int device, sms;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  config.gridDim = dim3(sms / K * K);
  e = cudaOccupancyMaxActiveClusters(clusters, fused_block, &config);
  if (*clusters > sms / K) *clusters = sms / K;
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}

extern "C" const char* fused_launch(const void* const* pointers, int clusters, int first_layer, int last_layer, int head, void* stream) {
  Model m;
  static_assert(sizeof(Model) % sizeof(void*) == 0, "the model is a table of pointers");
  memcpy(&m, pointers, sizeof(Model));
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = launch_config(attributes, (cudaStream_t)stream);
  config.numAttrs = 2;
  config.gridDim = dim3(clusters * K);
  const cudaError_t e = cudaLaunchKernelEx(&config, fused_block, m, first_layer, last_layer, head);
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}
