// Kernels by which the harness is tested, right ones. What a .cu file needs to run under it is
// these lines, which are the device's: the harness has defined DYNAMIC_SHARED already.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

static_assert(alignof(float2) == 8 && alignof(float4) == 16 && alignof(double2) == 16);
static_assert(alignof(int2) == 8 && alignof(int4) == 16 && alignof(uint2) == 8);
static_assert(alignof(uint4) == 16 && alignof(ushort4) == 8 && alignof(uchar4) == 4);

// C = A B. Grid (ceil(n / T), ceil(m / T)), block (T, T); static shared memory.
template <class V, int T>
__global__ void __launch_bounds__(T * T)
    tiled_product(const V* __restrict__ a, const V* __restrict__ b, V* __restrict__ c, int m, int n,
                  int k) {
  __shared__ V left[T][T], right[T][T + 1];
  const int tx = threadIdx.x, ty = threadIdx.y;
  const int row = blockIdx.y * T + ty, column = blockIdx.x * T + tx;
  V sum = 0;
  for (int start = 0; start < k; start += T) {
    left[ty][tx] = row < m && start + tx < k ? a[row * k + start + tx] : V(0);
    right[ty][tx] = column < n && start + ty < k ? b[(start + ty) * n + column] : V(0);
    __syncthreads();  // the tile is there
#pragma unroll
    for (int i = 0; i < T; ++i) sum += left[ty][i] * right[i][tx];
    __syncthreads();  // the tile is used up
  }
  if (row < m && column < n) c[row * n + column] = sum;
}

template <class V>
__device__ __forceinline__ V warp_sum(V value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  return value;
}

// out += sum of x. Dynamic shared memory: one value for each warp.
template <class V>
__global__ void block_sum(const V* __restrict__ x, V* __restrict__ out, long long n) {
  DYNAMIC_SHARED(raw);
  V* partial = reinterpret_cast<V*>(raw);
  const unsigned warps = blockDim.x / warpSize;
  V sum = 0;
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += stride)
    sum += __ldg(x + i);
  sum = warp_sum(sum);
  if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = sum;
  __syncthreads();
  if (threadIdx.x >= warpSize) return;
  sum = warp_sum(threadIdx.x < warps ? partial[threadIdx.x] : V(0));
  if (threadIdx.x == 0) atomicAdd(out, sum);
}

// A row for each shuffle: by index, up, down, xor. One warp.
template <class V>
__global__ void shuffles(const V* x, V* out, int operand, int width) {
  const int lane = threadIdx.x;
  const V value = x[lane];
  out[lane] = __shfl_sync(~0u, value, operand, width);
  out[32 + lane] = __shfl_up_sync(~0u, value, operand, width);
  out[64 + lane] = __shfl_down_sync(~0u, value, operand, width);
  out[96 + lane] = __shfl_xor_sync(~0u, value, operand, width);
}

// The two halves of a warp go different ways, each through votes and shuffles of its own.
__global__ void votes(const int* x, unsigned* out) {
  const int lane = threadIdx.x % 32, value = x[threadIdx.x];
  const bool is_low = lane < 16;
  const unsigned mask = is_low ? 0x0000ffffu : 0xffff0000u;
  unsigned ballot;
  int next;
  if (is_low) {
    ballot = __ballot_sync(mask, value > 0);
    next = __shfl_sync(mask, value, lane + 1, 16);
  } else {
    next = __shfl_xor_sync(mask, value, 1);
    ballot = __ballot_sync(mask, value > 0);
  }
  __syncwarp();
  const int any = __any_sync(~0u, value > 0), all = __all_sync(~0u, value > 0);
  const int some = __syncthreads_or(value > 0), every = __syncthreads_and(value > 0);
  const int count = __syncthreads_count(value > 0);
  unsigned* mine = out + 7 * threadIdx.x;
  mine[0] = ballot;
  mine[1] = next;
  mine[2] = any;
  mine[3] = all;
  mine[4] = some;
  mine[5] = every;
  mine[6] = count;
}

// Rounds floats to 16 bits, singly and in pairs, and widens 16-bit numbers.
__global__ void round_to_16_bits(const float* x, __half* half, __nv_bfloat16* bfloat,
                                 __half2* halves, __nv_bfloat162* bfloats, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  half[i] = __float2half_rn(x[i]);
  bfloat[i] = __float2bfloat16_rn(x[i]);
  if (i % 2) return;
  const float2 pair = make_float2(x[i], x[i + 1]);
  halves[i / 2] = __float22half2_rn(pair);
  bfloats[i / 2] = __float22bfloat162_rn(pair);
}
__global__ void widen_from_16_bits(const __half* half, const __nv_bfloat16* bfloat, float* singly,
                                   float2* in_pairs, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  singly[i] = __half2float(half[i]);
  singly[n + i] = __bfloat162float(bfloat[i]);
  if (i % 2) return;
  const __half2 halves = reinterpret_cast<const __half2*>(half)[i / 2];
  const __nv_bfloat162 bfloats = reinterpret_cast<const __nv_bfloat162*>(bfloat)[i / 2];
  in_pairs[i / 2] = __half22float2(halves);
  in_pairs[(n + i) / 2] = __bfloat1622float2(bfloats);
}

// A histogram, first of the block, then of all; the largest and smallest bin number; bits.
__global__ void histogram(const unsigned* bins, unsigned long long* counts, int* extremes,
                          unsigned* bits, unsigned n, unsigned n_bins) {
  DYNAMIC_SHARED(raw);
  unsigned* of_block = reinterpret_cast<unsigned*>(raw);
  for (unsigned i = threadIdx.x; i < n_bins; i += blockDim.x) of_block[i] = 0;
  __syncthreads();
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    const unsigned bin = bins[i];
    atomicAdd(&of_block[bin], 1);
    atomicMax(&extremes[0], static_cast<int>(bin));
    atomicMin(&extremes[1], static_cast<int>(bin));
    bits[i] = __popc(bin) | __clz(bin) << 8 | __ffs(bin) << 16 | (__brev(bin) >> 31) << 24;
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < n_bins; i += blockDim.x)
    atomicAdd(&counts[i], static_cast<unsigned long long>(of_block[i]));
}

// What each thread is told of its place.
extern "C" __global__ void places(int* out) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* mine = out + 6ll * (block * threads + thread);
  mine[0] = threadIdx.x, mine[1] = threadIdx.y, mine[2] = threadIdx.z;
  mine[3] = blockIdx.x, mine[4] = blockIdx.y, mine[5] = blockIdx.z;
}

// One argument of each kind.
__global__ void scalars(double* out, const double* absent, short a, unsigned b, long long c,
                        float d, double e, __half f, bool g) {
  if (absent != nullptr) return;
  out[0] = a, out[1] = b, out[2] = c, out[3] = d, out[4] = e, out[5] = __half2float(f), out[6] = g;
}

// The order in which threads and blocks come.
__global__ void arrivals(unsigned* next, unsigned* order) {
  order[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
  __syncthreads();
  order[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}
