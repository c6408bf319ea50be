// The gradient of the values: one dot product along the batch for each connection (SPEC 2).
//
//   dvalues[i, j] = sum_b grad[b, columns[i]] * x[b, indices[i, j]]
//
// `sum_products` has the tiles, groups and chunks of tile_product.cu, with four lanes for each
// neuron. A lane holds the gradients of its batch rows in registers, and multiplies them by the
// same rows of each input. For four connections at a time, the lanes exchange sums until each has
// the sum of one connection. Each split of the batch adds the sums of its tiles, in order, in
// memory of its own. `add_splits` adds the splits, in order. Without atomics, results are
// reproducible bit for bit.
//
// Grid (splits of the batch, splits of the groups, splits of the segments), block of warps.
//   x (batch, n_in), grad (batch, n_columns), row-major
//   places, starts, columns: as in tile_product.cu
//   partial (splits, n_values) of the accumulator's type, n_values = all chunks * 32
#include "batch_tile.cuh"

template <class T>
__global__ void __launch_bounds__(kMostThreads<T>, 1)
    sum_products(const T* __restrict__ x, long long batch, long long n_in,
                 const T* __restrict__ grad, long long n_columns,
                 const Four<unsigned short>* __restrict__ places,
                 const long long* __restrict__ starts, const int* __restrict__ columns,
                 Sum<T>* __restrict__ partial, long long n_values, int n_segments, int tile_rows,
                 int groups, int n_neurons) {
  DYNAMIC_SHARED(memory);
  Quad<T>* tile = reinterpret_cast<Quad<T>*>(memory);
  constexpr int lanes = 4, size = Quad<T>::size, group_neurons = 32 / lanes;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int member = threadIdx.x % 32 / lanes, lane = threadIdx.x % lanes;
  const int begin = static_cast<int>(static_cast<long long>(groups) * blockIdx.y / gridDim.y);
  const int end = static_cast<int>(static_cast<long long>(groups) * (blockIdx.y + 1) / gridDim.y);
  Sum<T>* mine = partial + static_cast<long long>(blockIdx.x) * n_values;
  const long long tiles = (batch + lanes * size - 1) / (lanes * size);
  for (int segment = blockIdx.z; segment < n_segments; segment += gridDim.z) {
    for (long long own = blockIdx.x; own < tiles; own += gridDim.x) {
      const long long first = own * (lanes * size);
      const long long from = static_cast<long long>(segment) * tile_rows, left = n_in - from;
      const long long* bounds = starts + static_cast<long long>(segment) * (groups + 1);
      __syncthreads();  // all warps are done with the tile before
      stage<T, lanes>(tile, x, batch, n_in, first, from,
                      static_cast<int>(left < tile_rows ? left : tile_rows), tile_rows);
      __syncthreads();  // the tile is there
      for (int group = begin + warp; group < end; group += warps) {
        const int neuron = group * group_neurons + member;
        const int column = neuron < n_neurons ? columns[neuron] : -1;
        Sum<T> grads[size];
#pragma unroll
        for (int j = 0; j < size; ++j) {
          const long long b = first + lane * size + j;
          grads[j] = 0;
          if (column >= 0 && b < batch) grads[j] = widened(__ldg(grad + b * n_columns + column));
        }
        for (long long chunk = bounds[group]; chunk < bounds[group + 1]; ++chunk) {
          const Four<unsigned short> place = places[chunk * group_neurons + member];
          Sum<T> sums[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Quad<T> inputs = tile[place.at[i] ^ lane];
            sums[i] = 0;
#pragma unroll
            for (int j = 0; j < size; ++j)
              sums[i] = multiply_add(grads[j], widened(inputs.at[j]), sums[i]);
          }
          // Lane i gets the sum of sums[i] over the four lanes.
          const bool upper = lane & 2, odd = lane & 1;
          Sum<T> even_sum = upper ? sums[2] : sums[0], odd_sum = upper ? sums[3] : sums[1];
          even_sum += __shfl_xor_sync(0xffffffffu, upper ? sums[0] : sums[2], 2);
          odd_sum += __shfl_xor_sync(0xffffffffu, upper ? sums[1] : sums[3], 2);
          Sum<T> sum = odd ? odd_sum : even_sum;
          sum += __shfl_xor_sync(0xffffffffu, odd ? even_sum : odd_sum, 1);
          const long long at = chunk * 32 + threadIdx.x % 32;
          mine[at] = own == blockIdx.x ? sum : mine[at] + sum;
        }
      }
    }
  }
}

// out[positions[i]] = sum over splits of partial[s, i]; positions are -1 for padding.
template <class A, class Position>
__global__ void __launch_bounds__(256, 4)
    add_splits(const A* __restrict__ partial, const Position* __restrict__ positions,
               long long n_values, int splits, void* out, int out_type) {
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < n_values;
       i += stride) {
    if (positions[i] < 0) continue;
    A sum = partial[i];
    for (long long s = 1; s < splits; ++s) sum += partial[s * n_values + i];
    write(out, positions[i], sum, out_type);
  }
}
