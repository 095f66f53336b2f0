// The subset of CUDA that the kernels in csrc/cuda use, for g++: the .cu files compile unchanged and run on the CPU.
//
// Each CUDA thread is a fibre (simt.cpp). Blocks run one after the other. There is nothing here that synchronises the
// host with the device: a kernel file that asked for it would not compile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
// All shared memory is dynamic: simt.cpp has the one array.
#define __shared__
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

void barrier();
// Every lane of the warp hands in a word; returns the one of lane `from`.
uint64_t shuffle(uint64_t mine, unsigned from);
unsigned ballot(bool flag);
void warp_barrier();
void fence();
unsigned add(unsigned* to, unsigned x);

// The products of a warp's tensor cores (mma.sync): d (16, 8) += a (16, k) b (8, k)'; k is 8 for TF32, else 16. The sum
// is cut off after each call, as the hardware may do at the worst.
enum class MmaKind { kTf32, kBFloat16, kFloat16 };
void mma(MmaKind kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void launch(unsigned blocks, unsigned threads, size_t shared_bytes, void (*thread)(const void*), const void* context);

// What the emulated device has per block beyond 48 KB.
extern int shared_bytes_optin;
// Its compute capability, the first number.
extern int capability;
// Decides the order in which the threads of a block run.
extern uint64_t seed;

}  // namespace simt

inline void __syncthreads() { simt::barrier(); }

template <class T>
T __shfl_sync(unsigned, T x, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  memcpy(&word, &x, sizeof x);
  word = simt::shuffle(word, static_cast<unsigned>(from));
  memcpy(&x, &word, sizeof x);
  return x;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return __shfl_sync(mask, x, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

inline unsigned __ballot_sync(unsigned, bool flag) { return simt::ballot(flag); }

// A shuffle orders no memory, a barrier of the warp does; a fence orders what comes before an atomic operation.
inline void __syncwarp() { simt::warp_barrier(); }
inline void __threadfence() { simt::fence(); }
inline unsigned atomicAdd(unsigned* to, unsigned x) { return simt::add(to, x); }

struct uint4 {
  unsigned x, y, z, w;
};
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

// ---- the host's side
// -------------------------------------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNoKernelImageForDevice };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
// Whether a device would take the launch: grid, block, and no more shared memory than was asked for.
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const cudaError_t error = check_launch(*config, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
  const auto thread = [&] { kernel(arguments...); };
  simt::launch(
      config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
      [](const void* context) { (*static_cast<const decltype(thread)*>(context))(); }, &thread);
  return cudaSuccess;
}
