// A tile of the batch in shared memory: a row for each input, `size * Lanes` batch rows wide.
//
// A row is `Lanes` quads of 16 bytes, one for each lane of a neuron. Rows of fewer than 8 quads
// share the 128 bytes of a wavefront. The quads of a row are permuted so that eight lanes that
// stage neighbouring rows write to different banks: quad c of row f is at `place_of_row(f) ^ c`.
// The host packs `place_of_row(f)` for an input. The last row is followed by a row of zeros, to
// which padding points. An input that is not connected is never multiplied.
#pragma once

#include "numbers.cuh"

// Most threads of a block: as many as have registers enough.
template <class T>
constexpr int kMostThreads = sizeof(T) == 8 ? 512 : 1024;

template <int Lanes>
__device__ __forceinline__ int place_of_row(int row) {
  constexpr int rows_a_wavefront = 8 / Lanes;
  return row * Lanes + (row / rows_a_wavefront) % Lanes;
}

// Quads of a thread that are loaded together: sixteen loads are in flight, and two of double, of
// which more would need registers that there are not.
template <class T>
constexpr int kQuadsAhead = sizeof(T) == 8 ? 1 : sizeof(T);

// Stage inputs `begin` to `begin + n_rows` of the batch rows from `first` on. Lanes past the last
// batch row get zeros. All threads of the block call this, between barriers; the number of its warps
// is a multiple of `Lanes`.
//
// A warp has one quad of each row that it stages, and a thread has rows of the same `row % 32`. So
// loads are coalesced, and the place of a quad advances with the row: nothing is divided. The
// pointer to a batch row is that to the one before plus `n_in`, since a product in 64 bits for each
// load would take more instructions than the loads. The last rows of a thread are staged one by one,
// so that the loop has no conditions on rows.
template <class T, int Lanes>
__device__ __forceinline__ void stage(Quad<T>* tile, const T* __restrict__ x, long long batch,
                                      long long n_in, long long first, long long begin, int n_rows,
                                      int tile_rows) {
  constexpr int size = Quad<T>::size, ahead = kQuadsAhead<T>;
  const int quad_of = threadIdx.x / 32 % Lanes, stride = blockDim.x / Lanes;
  const int own_row = threadIdx.x / 32 / Lanes * 32 + threadIdx.x % 32;
  const long long b = first + quad_of * size, left = batch - b;
  const int there = left < size ? static_cast<int>(left < 0 ? 0 : left) : size;
  const T* from = x + (there > 0 ? b : 0) * n_in + begin + own_row;
  Quad<T>* to = tile + (place_of_row<Lanes>(own_row) ^ quad_of);
  int row = own_row;
  for (; row + (ahead - 1) * stride < n_rows; row += ahead * stride) {
    Quad<T> quads[ahead];
    const T* next = from;
#pragma unroll
    for (int j = 0; j < size; ++j, next += n_in)
#pragma unroll
      for (int a = 0; a < ahead; ++a)
        quads[a].at[j] = j < there ? __ldg(next + a * stride) : zero<T>();
#pragma unroll
    for (int a = 0; a < ahead; ++a) to[a * stride * Lanes] = quads[a];
    from += ahead * stride;
    to += ahead * stride * Lanes;
  }
  for (; row < n_rows; row += stride) {
    Quad<T> quad;
#pragma unroll
    for (int j = 0; j < size; ++j) quad.at[j] = j < there ? __ldg(from + j * n_in) : zero<T>();
    *to = quad;
    from += stride;
    to += stride * Lanes;
  }
  if (threadIdx.x < Lanes) {
    Quad<T> zeros;
#pragma unroll
    for (int j = 0; j < size; ++j) zeros.at[j] = zero<T>();
    tile[tile_rows * Lanes + threadIdx.x] = zeros;
  }
}
