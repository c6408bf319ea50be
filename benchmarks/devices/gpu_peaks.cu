// Peak rates of a CUDA device: multiply-adds in registers, and reads of shared memory.
//
// Each kernel is a loop with enough independent work to hide its latency. The sums are written at the
// end, so that the compiler cannot leave the loop out.
//
// Grid: enough blocks to fill the device, of THREADS threads.
//   out  (blocks * THREADS)
#define THREADS 256
#define SUMS 8
#define STEPS 16
#define READS 8
#define WINDOW 1024
#define STEP 128

// A thread does repeats * STEPS * SUMS multiply-adds.
extern "C" __global__ void __launch_bounds__(THREADS)
    multiply_adds(float* out, int repeats, float factor, float term) {
  float sums[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sums[i] = static_cast<float>(threadIdx.x + i);
  for (int repeat = 0; repeat < repeats; ++repeat) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int i = 0; i < SUMS; ++i) sums[i] = fmaf(sums[i], factor, term);
    }
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < SUMS; ++i) total += sums[i];
  out[static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x] = total;
}

// A thread reads repeats * READS times 16 bytes. The reads of a warp are adjacent, so that no two need
// the same bank. The address depends on the repeat; otherwise the compiler would read only once.
extern "C" __global__ void __launch_bounds__(THREADS) shared_reads(float* out, int repeats) {
  __shared__ float4 tile[WINDOW + (READS - 1) * STEP];
  for (int i = threadIdx.x; i < WINDOW + (READS - 1) * STEP; i += THREADS) {
    const float value = static_cast<float>(i);
    tile[i] = make_float4(value, value, value, value);
  }
  __syncthreads();
  float4 sums = make_float4(0, 0, 0, 0);
  unsigned int at = threadIdx.x;
  for (int repeat = 0; repeat < repeats; ++repeat) {
#pragma unroll
    for (int i = 0; i < READS; ++i) {
      const float4 read = tile[at + i * STEP];
      sums.x += read.x;
      sums.y += read.y;
      sums.z += read.z;
      sums.w += read.w;
    }
    at = (at + 32) % WINDOW;
  }
  out[static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x] =
      sums.x + sums.y + sums.z + sums.w;
}
