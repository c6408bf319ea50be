// A tile of the batch in shared memory: a row for each input, `size * Lanes` batch rows wide.
//
// A row is `Lanes` quads of 16 bytes, one for each lane of a neuron. Rows of fewer than 8 quads
// share the 128 bytes of a wavefront. The quads of a row are permuted so that eight lanes that
// stage neighbouring rows write to different banks: quad c of row f is at `place_of_row(f) ^ c`.
// The host packs `place_of_row(f)` for an input. The last row is followed by a row of zeros, to
// which padding points. An input that is not connected is never multiplied.
#pragma once

#include "numbers.cuh"

template <int Lanes>
__device__ __forceinline__ int place_of_row(int row) {
  constexpr int rows_a_wavefront = 8 / Lanes;
  return row * Lanes + (row / rows_a_wavefront) % Lanes;
}

// Stage inputs `begin` to `begin + n_rows` of the batch rows from `first` on. Lanes past the last
// batch row get zeros. All threads of the block call this, between barriers.
template <class T, int Lanes>
__device__ __forceinline__ void stage(Quad<T>* tile, const T* __restrict__ x, long long batch,
                                      long long n_in, long long first, long long begin, int n_rows,
                                      int tile_rows) {
  constexpr int size = Quad<T>::size;
  for (int i = threadIdx.x; i < tile_rows * Lanes; i += blockDim.x) {
    const int lane = i / tile_rows, row = i % tile_rows;
    Quad<T> quad;
#pragma unroll
    for (int j = 0; j < size; ++j) {
      const long long b = first + lane * size + j;
      quad.at[j] = row < n_rows && b < batch ? __ldg(x + b * n_in + begin + row) : zero<T>();
    }
    tile[place_of_row<Lanes>(row) ^ lane] = quad;
  }
  if (threadIdx.x < Lanes) {
    Quad<T> zeros;
#pragma unroll
    for (int j = 0; j < size; ++j) zeros.at[j] = zero<T>();
    tile[tile_rows * Lanes + threadIdx.x] = zeros;
  }
}
