// The product of one to eight rows; it reads the weight once (SPEC 2).
//
//   out[b, columns[i]] = act(bias[columns[i]] + sum_j values[i, j] * x[b, indices[i, j]])
//
// Several lanes of a warp share a neuron. Each lane processes eight connections at a time, whose
// values and indices are loads of 16 bytes, and has a sum for each row; then the lanes add their
// sums. The inputs are staged in shared memory, (n_in + 1, Rows), followed by zeros to which the
// padding of `indices` points. If they do not fit, they are read from global memory. The grid is
// persistent: as many blocks as fit on the device, each of which stages x once.
//
// Block of warps; `lanes` lanes for each neuron, a power of two up to 32.
//   x        (batch, n_in)      batch <= Rows
//   values   (n_active, padded) padded a multiple of 8
//   indices  (n_active, padded) uint16 if x is staged, else uint32; n_in for padding
//   columns, bias, out: as in tile_product.cu; neurons from n_active on have no connections
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

template <class T, int Rows, template <class> class Source>
__global__ void __launch_bounds__(256, 2)
    stream_product(const T* __restrict__ x, int batch, long long n_in,
                   const Pack<T, 8>* __restrict__ values,
                   const Pack<typename Source<T>::Index, 8>* __restrict__ indices, int packs,
                   const int* __restrict__ columns, const Sum<T>* __restrict__ bias, void* out,
                   long long width, int out_type, int activation, int compact, int lanes,
                   long long n_active, long long n_neurons) {
  DYNAMIC_SHARED(memory);
  T* staged = reinterpret_cast<T*>(memory);
  if (Source<T>::in_shared) {
    for (long long i = threadIdx.x; i < (n_in + 1) * Rows; i += blockDim.x) {
      const long long b = i / (n_in + 1), c = i % (n_in + 1);
      staged[c * Rows + b] = b < batch && c < n_in ? __ldg(x + b * n_in + c) : zero<T>();
    }
    __syncthreads();
  }
  const int lane = threadIdx.x % lanes;
  const long long neurons_a_block = blockDim.x / lanes;
  const long long stride = neurons_a_block * gridDim.x;
  // All lanes of a warp take the same number of steps, since they exchange sums in each.
  const long long steps = (n_neurons + stride - 1) / stride;
  long long neuron = blockIdx.x * neurons_a_block + threadIdx.x / lanes;
  for (long long step = 0; step < steps; ++step, neuron += stride) {
    Sum<T> sums[Rows];
#pragma unroll
    for (int b = 0; b < Rows; ++b) sums[b] = 0;
    if (neuron < n_active) {
      for (int pack = lane; pack < packs; pack += lanes) {
        const Pack<T, 8> eight = values[neuron * packs + pack];
        const Pack<typename Source<T>::Index, 8> index = indices[neuron * packs + pack];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const Sum<T> value = widened(eight.at[i]);
          const long long c = index.at[i];
          if (Source<T>::in_shared) {
            const Pack<T, Rows>& inputs = reinterpret_cast<const Pack<T, Rows>*>(staged)[c];
#pragma unroll
            for (int b = 0; b < Rows; ++b)
              sums[b] = multiply_add(value, widened(inputs.at[b]), sums[b]);
          } else if (c < n_in) {
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
              activated(sums[b] + offset, activation), out_type);
  }
}
