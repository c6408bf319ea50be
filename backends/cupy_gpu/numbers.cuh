// Reading, summing and writing numbers of each value type (SPEC 2).
//
// The accumulator is float, or double for double. A result is rounded once, to the type that
// `OutputType` names. That is an argument of the kernel, so that there are fewer kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Sum = typename Accumulator<T>::type;

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(signed char x) { return x; }

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <class To, class From>
struct Rounding {
  static __device__ __forceinline__ To of(From x) { return static_cast<To>(x); }
};
template <>
struct Rounding<__half, float> {
  static __device__ __forceinline__ __half of(float x) { return __float2half_rn(x); }
};
template <>
struct Rounding<__half, double> {
  static __device__ __forceinline__ __half of(double x) { return __double2half(x); }
};
template <>
struct Rounding<__nv_bfloat16, float> {
  static __device__ __forceinline__ __nv_bfloat16 of(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Rounding<__nv_bfloat16, double> {
  static __device__ __forceinline__ __nv_bfloat16 of(double x) { return __double2bfloat16(x); }
};

enum OutputType { kFloat16, kBfloat16, kFloat32, kFloat64, kInt8 };

// out[at] = x, rounded once; of a type that is not kInt8.
template <class A>
__device__ __forceinline__ void write(void* out, long long at, A x, int type) {
  switch (type) {
    case kFloat16:
      static_cast<__half*>(out)[at] = Rounding<__half, A>::of(x);
      return;
    case kBfloat16:
      static_cast<__nv_bfloat16*>(out)[at] = Rounding<__nv_bfloat16, A>::of(x);
      return;
    case kFloat32:
      static_cast<float*>(out)[at] = Rounding<float, A>::of(x);
      return;
    default:
      static_cast<double*>(out)[at] = Rounding<double, A>::of(x);
  }
}

__device__ __forceinline__ float erf_of(float x) { return erff(x); }
__device__ __forceinline__ double erf_of(double x) { return erf(x); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// The codes of srigl_core.contract.ACTIVATIONS.
enum Activation { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

template <class A>
__device__ __forceinline__ A activated(A z, int activation) {
  switch (activation) {
    case kNone:
      return z;
    case kRelu:
      return z <= 0 ? A(0) : z;  // NaN stays NaN
    case kGelu:
      return A(0.5) * z * (1 + erf_of(z * A(0.70710678118654752440)));
    case kGeluTanh:
      return A(0.5) * z *
             (1 + tanh_of(A(0.79788456080286535588) * (z + A(0.044715) * z * z * z)));
    default:
      return z / (1 + exp_of(-z));
  }
}

// A sum of values of type V, times its neuron's scale if these are quantised (SPEC 6).
template <class V, class A>
__device__ __forceinline__ A scaled(A sum, const float* __restrict__ scale, long long column) {
  return sizeof(V) == 1 ? sum * scale[column] : sum;
}

// Adjacent numbers for one load, aligned to their size, at most 16 bytes.
template <class T, int Count>
struct alignas(Count * sizeof(T) < 16 ? Count * sizeof(T) : 16) Pack {
  static constexpr int size = Count;
  T at[Count];
};
template <class T>
using Four = Pack<T, 4>;
template <class T>
using Quad = Pack<T, 16 / static_cast<int>(sizeof(T))>;

template <class T>
__device__ __forceinline__ T zero() {
  return Rounding<T, float>::of(0.0f);
}
