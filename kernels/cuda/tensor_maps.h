// tensor_maps.h: tensors as the copy engine of compute capability 9.0 sees them.
#pragma once

#include <cuda.h>

#include "device.h"
#include "instance.h"

namespace marlin {

// What an instance copies; each returns MARLIN_OK or a cudaError_t. `matrices`: so many of the size of `w` follow each
// other, the tensors of several experts.
int describe_weights(CUtensorMap* map, const Instance& instance, const marlin_cuda_weights_t& w, int64_t matrices);
// A: `rows` of w.in_features, lda elements apart.
int describe_activations(CUtensorMap* map, const Instance& instance, const marlin_cuda_weights_t& w, const void* A,
                         int64_t rows, int64_t lda);
// sm90_wide: scales and zero points, as far as the kernel copies them. `step_groups`: rows of them that a step meets.
int describe_scales(CUtensorMap* scales_map, CUtensorMap* zeros_map, const Instance& instance,
                    const marlin_cuda_weights_t& w, int64_t matrices, int step_groups);

}  // namespace marlin
