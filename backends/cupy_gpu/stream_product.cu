// The product of one to eight rows; it reads the weight once (SPEC 2).
//
//   out[b, columns[i]] = act(bias[columns[i]] + sum_j values[i, j] * x[b, indices[i, j]])
//
// Several lanes of a warp share a neuron. A slice is the 32 / lanes neurons of a warp. In each step
// a lane sums for four connections; the values of a step are adjacent, 32 times four, so that the
// loads of a warp are coalesced whatever `lanes` is. Then the lanes of a neuron add their sums.
//
// The inputs are staged in shared memory, (n_in, Rows). If they do not fit, they are read from
// global memory. The grid is persistent: as many blocks as fit on the device, each of which stages x
// once. Values and indices are loaded `kAhead` steps ahead, the first ones before x is staged.
//
// Block of warps; `lanes` lanes for each neuron, a power of two up to 32.
//   x        (batch, n_in)           batch <= Rows
//   values   (slices, steps, 32, 4)  slices of the n_active neurons; lane l of a slice has neuron
//                                    l / lanes, and in step s the connections from
//                                    (s * lanes + l % lanes) * 4 on
//   indices  (slices, steps, 32, 4)  uint16 if x is staged, else uint32
//   columns, bias, scale, out: as in tile_product.cu; neurons from n_active on have no connections
#include "numbers.cuh"

template <class T>
struct Staged {
  using Index = unsigned short;
  static constexpr bool in_shared = true;
};
template <class T>
struct InPlace {
  using Index = unsigned int;
  static constexpr bool in_shared = false;
};

constexpr int kAhead = 2;

// Stage x with sixteen loads of a thread in flight. A thread has all rows of an input. Past the last
// input it loads that one, so that loads depend on no condition but the batch's.
template <class T, int Rows>
__device__ __forceinline__ void stage_rows(Pack<T, Rows>* staged, const T* __restrict__ x,
                                           int batch, int n_in) {
  constexpr int inputs_ahead = 16 / Rows;
  for (int first = threadIdx.x; first < n_in; first += inputs_ahead * blockDim.x) {
    Pack<T, Rows> inputs[inputs_ahead];
#pragma unroll
    for (int a = 0; a < inputs_ahead; ++a) {
      const int c = first + a * blockDim.x;
      const T* from = x + (c < n_in ? c : n_in - 1);
#pragma unroll
      for (int b = 0; b < Rows; ++b, from += n_in)
        inputs[a].at[b] = b < batch ? __ldg(from) : zero<T>();
    }
#pragma unroll
    for (int a = 0; a < inputs_ahead; ++a) {
      const int c = first + a * blockDim.x;
      if (c < n_in) staged[c] = inputs[a];
    }
  }
}

template <class T, int Rows, template <class> class Source, class V>
__global__ void __launch_bounds__(256, 2)
    stream_product(const T* __restrict__ x, int batch, long long n_in,
                   const Four<V>* __restrict__ values,
                   const Four<typename Source<T>::Index>* __restrict__ indices, int fan_in,
                   int steps, const int* __restrict__ columns, const Sum<T>* __restrict__ bias,
                   const float* __restrict__ scale, void* out, long long width, int out_type,
                   int activation, int compact, int lanes, long long n_active,
                   long long n_neurons) {
  DYNAMIC_SHARED(memory);
  Pack<T, Rows>* staged = reinterpret_cast<Pack<T, Rows>*>(memory);
  const int members = 32 / lanes, member = threadIdx.x % 32 / lanes, lane = threadIdx.x % lanes;
  const long long slices = (n_neurons + members - 1) / members;
  const long long connected = (n_active + members - 1) / members;  // slices that have connections
  const long long stride = static_cast<long long>(gridDim.x) * (blockDim.x / 32);
  long long slice = static_cast<long long>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  Four<V> next_values[kAhead];
  Four<typename Source<T>::Index> next_indices[kAhead];
  const auto load = [&](long long of_slice, int step) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (of_slice < connected && step + a < steps) {
        const long long at = (of_slice * steps + step + a) * 32 + threadIdx.x % 32;
        next_values[a] = values[at];
        next_indices[a] = indices[at];
      }
  };
  load(slice, 0);
  if (Source<T>::in_shared) {
    stage_rows<T, Rows>(staged, x, batch, static_cast<int>(n_in));
    __syncthreads();
  }
  // All lanes of a warp have the same slices, since they exchange sums after each.
  for (; slice < slices; slice += stride) {
    const long long neuron = slice * members + member;
    const int own_fan_in = neuron < n_active ? fan_in : 0;
    Sum<T> sums[Rows];
#pragma unroll
    for (int b = 0; b < Rows; ++b) sums[b] = 0;
    for (int step = 0; slice < connected && step < steps; step += kAhead) {
      Four<V> four[kAhead];
      Four<typename Source<T>::Index> index[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        four[a] = next_values[a];
        index[a] = next_indices[a];
      }
      const bool is_last = step + kAhead >= steps;
      load(is_last ? slice + stride : slice, is_last ? 0 : step + kAhead);
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int left = own_fan_in - ((step + a) * lanes + lane) * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i >= left) continue;
          const Sum<T> value = widened(four[a].at[i]);
          const long long c = index[a].at[i];
          if (Source<T>::in_shared) {
            const Pack<T, Rows>& inputs = staged[c];
#pragma unroll
            for (int b = 0; b < Rows; ++b)
              sums[b] = multiply_add(value, widened(inputs.at[b]), sums[b]);
          } else {
#pragma unroll
            for (int b = 0; b < Rows; ++b)
              if (b < batch)
                sums[b] = multiply_add(value, widened(__ldg(x + b * n_in + c)), sums[b]);
          }
        }
      }
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int b = 0; b < Rows; ++b) sums[b] += __shfl_xor_sync(0xffffffffu, sums[b], distance);
    }
    if (neuron >= n_neurons) continue;
    const long long column = columns[neuron];
    const Sum<T> offset = bias[column];
#pragma unroll
    for (int b = 0; b < Rows; ++b)
      if (b < batch && b % lanes == lane)
        write(out, b * width + (compact ? neuron : column),
              activated(scaled<V>(sums[b], scale, column) + offset, activation), out_type);
  }
}
