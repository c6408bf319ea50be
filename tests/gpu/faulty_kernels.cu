// Kernels with one mistake each, which the harness must find.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// Right if n is the size of both.
__global__ void copy(const float* x, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i];
}
__global__ void write_before(float* out) { out[-1] = 0.f; }

// Right if there are as many floats of shared memory as threads.
__global__ void reverse_in_shared(float* x) {
  DYNAMIC_SHARED(raw);
  float* values = reinterpret_cast<float*>(raw);
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// Right if the block has 64 threads. What `store` is given is not known where it is compiled.
template <class V>
__device__ __noinline__ void store(V* values, int i, V value) {
  values[i] = value;
}
template <class V>
__global__ void reverse_in_array(V* x) {
  __shared__ V values[64], others[64];
  store(others, 0, V(0));
  store(values, threadIdx.x, x[threadIdx.x]);
  __syncthreads();
  x[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x] + others[0];
}

// Right if x is aligned to 16 bytes.
__global__ void load_four(const float* x, float* out) {
  const float4 four = *reinterpret_cast<const float4*>(x);
  out[0] = four.x + four.y + four.z + four.w;
}

// Right while row * stride is less than 2^31.
__global__ void load_row(const float* x, float* out, int row, int stride) {
  const int at = row * stride;
  if (at < 0) return;
  out[0] = x[at % 2];
}

// The second block reads what only the first has written.
__global__ void read_unwritten(float* out) {
  DYNAMIC_SHARED(raw);
  __shared__ float array[32];
  float* dynamic = reinterpret_cast<float*>(raw);
  if (blockIdx.x == 0) array[threadIdx.x] = dynamic[threadIdx.x] = 1.f;
  __syncthreads();
  out[2 * blockIdx.x] = array[5];
  out[2 * blockIdx.x + 1] = dynamic[5];
}

__global__ void barrier_in_branch(int threads) {
  if (static_cast<int>(threadIdx.x) < threads) __syncthreads();
}
__global__ void return_before_barrier(int threads) {
  if (static_cast<int>(threadIdx.x) >= threads) return;
  __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void barrier_against_shuffle(int* out) {
  if (threadIdx.x == 0)
    __syncthreads();
  else
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}
__global__ void shuffle_with_mask(int* out, unsigned mask, int lanes) {
  if (static_cast<int>(threadIdx.x) < lanes)
    out[threadIdx.x] = __shfl_sync(mask, int(threadIdx.x), lanes);
}
__global__ void shuffle_of_width(int* out, int width) {
  out[threadIdx.x] = __shfl_sync(~0u, 1, 1, width);
}
