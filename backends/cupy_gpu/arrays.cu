// Passes over whole arrays: conversion, reordering, sums of columns. Grid-stride loops.
#include "numbers.cuh"

// out[i] = x[i], rounded once.
template <class T>
__global__ void __launch_bounds__(256, 4)
    convert(const T* __restrict__ x, void* out, long long n, int out_type) {
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += stride)
    write(out, i, widened(x[i]), out_type);
}

// out[i] = values[positions[i]], or 0 where positions[i] is negative: the order of a layout.
// Quantised values keep their type.
template <class T, class Position>
__global__ void __launch_bounds__(256, 4)
    arrange(const T* __restrict__ values, const Position* __restrict__ positions, void* out,
            long long n, int out_type) {
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += stride) {
    const Position position = positions[i];
    if constexpr (sizeof(T) == 1)
      static_cast<T*>(out)[i] = position < 0 ? 0 : values[position];
    else
      write(out, i, position < 0 ? Sum<T>(0) : widened(values[position]), out_type);
  }
}

// out[c] = sum over the rows of x[b, c], (batch, n). Block (32, 8): eight threads share the rows of
// a column, and their sums are added in order.
template <class T>
__global__ void __launch_bounds__(256, 4)
    sum_columns(const T* __restrict__ x, void* out, long long batch, long long n, int out_type) {
  __shared__ Sum<T> parts[8][32];
  const long long column = static_cast<long long>(blockIdx.x) * 32 + threadIdx.x;
  Sum<T> sum = 0;
  if (column < n)
    for (long long b = threadIdx.y; b < batch; b += 8) sum += widened(x[b * n + column]);
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= n) return;
  for (int i = 1; i < 8; ++i) sum += parts[i][threadIdx.x];
  write(out, column, sum, out_type);
}
