// The product of a batch: x in shared memory, one group of neurons for each warp (SPEC 2).
//
//   out[b, columns[i]] = act(bias[columns[i]] + sum_j values[i, j] * x[b, indices[i, j]])
//
// Values of type `signed char` are quantised: a finished sum is multiplied by the neuron's scale
// (SPEC 6). Other values have the type of x.
//
// A block processes a tile of the batch (`batch_tile.cuh`) and a range of neuron groups. Each
// neuron has `Lanes` lanes of a warp. Each lane sums, in registers, for the batch rows in its 16
// bytes of the tile. A group is 32 / Lanes neurons. Their connections are packed in chunks of four,
// side by side, so that a warp loads 4 * (32 / Lanes) values at once, and as many places.
//
// If the inputs do not fit in shared memory, they are split into segments of `tile_rows`. The sums
// stay in registers across segments, and a warp processes one group at a time.
//
// Grid (batch tiles, splits of the groups), block of warps, shared memory: tile_rows + 1 rows.
//   x        (batch, n_in)          row-major
//   values   (chunks, 32 / Lanes, 4)
//   places   (chunks, 32 / Lanes, 4) uint16: position of an input's row in the tile, in quads
//   starts   (segments, groups + 1) first chunk of each; neurons past the groups have no chunks
//   columns  (n_neurons) index of a neuron's bias, and its column of the result. If `compact`, the
//            column is the neuron's number instead
//   bias     of the accumulator's type
//   scale    of quantised values, at the index of the bias; else null
//   out      (batch, width) of `out_type`
#include "batch_tile.cuh"

template <class T, int Lanes, class V>
__global__ void __launch_bounds__(kMostThreads<T>, 1)
    tile_product(const T* __restrict__ x, long long batch, long long n_in,
                 const Four<V>* __restrict__ values, const Four<unsigned short>* __restrict__ places,
                 const long long* __restrict__ starts, const int* __restrict__ columns,
                 const Sum<T>* __restrict__ bias, const float* __restrict__ scale, void* out,
                 long long width, int out_type, int activation, int compact, int n_segments,
                 int tile_rows, int groups, int n_neurons) {
  DYNAMIC_SHARED(memory);
  Quad<T>* tile = reinterpret_cast<Quad<T>*>(memory);
  constexpr int size = Quad<T>::size, group_neurons = 32 / Lanes;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int member = threadIdx.x % 32 / Lanes, lane = threadIdx.x % Lanes;
  const long long first = static_cast<long long>(blockIdx.x) * (Lanes * size);
  const int all_groups = (n_neurons + group_neurons - 1) / group_neurons;
  const int begin = static_cast<int>(static_cast<long long>(all_groups) * blockIdx.y / gridDim.y);
  const int end =
      static_cast<int>(static_cast<long long>(all_groups) * (blockIdx.y + 1) / gridDim.y);

  for (int pass = begin; pass < end; pass += warps) {
    const int group = pass + warp;
    Sum<T> sums[size];
#pragma unroll
    for (int j = 0; j < size; ++j) sums[j] = 0;
    for (int segment = 0; segment < n_segments; ++segment) {
      if (n_segments > 1 || pass == begin) {
        const long long from = static_cast<long long>(segment) * tile_rows;
        const long long left = n_in - from;
        if (n_segments > 1) __syncthreads();  // all warps are done with the segment before
        stage<T, Lanes>(tile, x, batch, n_in, first, from,
                        static_cast<int>(left < tile_rows ? left : tile_rows), tile_rows);
        __syncthreads();  // the tile is there
      }
      if (group >= end || group >= groups) continue;
      const long long* bounds = starts + static_cast<long long>(segment) * (groups + 1) + group;
      const long long stop = bounds[1];
      for (long long chunk = bounds[0]; chunk < stop; ++chunk) {
        const long long at = chunk * group_neurons + member;
        const Four<V> four = values[at];
        const Four<unsigned short> place = places[at];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Quad<T> inputs = tile[place.at[i] ^ lane];
          const Sum<T> value = widened(four.at[i]);
#pragma unroll
          for (int j = 0; j < size; ++j)
            sums[j] = multiply_add(value, widened(inputs.at[j]), sums[j]);
        }
      }
    }
    const int neuron = group * group_neurons + member;
    if (group >= end || neuron >= n_neurons) continue;
    const int column = columns[neuron];
    const Sum<T> offset = bias[column];
#pragma unroll
    for (int j = 0; j < size; ++j) {
      const long long b = first + lane * size + j;
      if (b < batch)
        write(out, b * width + (compact ? neuron : column),
              activated(scaled<V>(sums[j], scale, column) + offset, activation), out_type);
    }
  }
}
