// warp_tiles.h: kernels in which one warp does one tile of Marlin weights at a time (repack.cu, dequantize.cu). They are
// bound by memory, and shared memory is only the place where a tile is turned so that both its reads and its writes are
// whole 128-byte lines.
#pragma once

#include "device.h"

namespace marlin {

constexpr int kWarps = 8;  // per block; enough loads in flight with 16 bytes a lane
constexpr int kThreads = 32 * kWarps;

// Blocks enough to fill every SM with eight of them, or one tile for each warp.
inline int blocks_for(int64_t tiles, const Device& facts) {
  const int64_t wanted = (tiles + kWarps - 1) / kWarps;
  const int64_t most = int64_t{8} * facts.multiprocessors;
  return static_cast<int>(wanted < most ? wanted : most);
}

}  // namespace marlin
