// device.h: what the launchers need to know about a device, and the guard that makes it current.
#pragma once

#include <cuda_runtime.h>

#include "../marlin_cuda.h"

namespace marlin {

struct Device {
  int multiprocessors;
  int shared_bytes_per_block;
  int capability;  // 10 major + minor
  double clock;    // cycles per us
  double memory;   // bytes per us, the most
};

// Facts about `device`, asked for once. MARLIN_OK, MARLIN_CUDA_ERROR_DEVICE or a cudaError_t.
int find_device(int device, Device* facts);

constexpr int kMaxDevices = 64;

// Whether sizes, groups and types of `weights` are what they may be: MARLIN_OK or a negative code. Pointers are not
// looked at.
int check_weights(const marlin_cuda_weights_t* weights);

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Makes `device` current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      restore_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int error() const { return error_; }

 private:
  cudaError_t error_;
  int previous_ = 0;
  bool restore_ = false;
};

}  // namespace marlin

#define MARLIN_RETURN_IF_ERROR(call)          \
  do {                                        \
    const int code_ = static_cast<int>(call); \
    if (code_ != MARLIN_OK) return code_;     \
  } while (0)
