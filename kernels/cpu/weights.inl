// weights.inl: tiles of weights as numbers, for one instruction set. weights.cpp includes it once for each, inside a
// namespace of its own, after defining
//
//     MARLIN_TARGET         the target attribute of every function here
//     MARLIN_VECTOR_BYTES   16, 32 or 64
//     MARLIN_ROUND(v)       the floats of a vector rounded to fp16 values
//
// gcc and clang turn the vector types below into whatever registers the target has.

typedef float Floats __attribute__((vector_size(MARLIN_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(MARLIN_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(MARLIN_VECTOR_BYTES)));

constexpr int kWidth = MARLIN_VECTOR_BYTES / 4;  // columns in a vector: 4, 8 or 16

MARLIN_TARGET static inline Floats load_floats(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

MARLIN_TARGET static inline Words load_words(const void* p) {
  Words v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

MARLIN_TARGET static inline void store_floats(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

#ifndef MARLIN_ROUND
// Round to the nearest fp16 value, ties to even, in integer arithmetic.
MARLIN_TARGET static inline Floats round_to_half(Floats v) {
  const Ints bits = (Ints)v;
  const Ints magnitude = bits & 0x7fffffff;
  // Normal fp16 values keep 10 of the 23 fraction bits; what rounds to 65536 or more is infinite.
  Ints normal = (magnitude + 0xfff + ((magnitude >> 13) & 1)) & ~0x1fff;
  normal = normal >= 0x47800000 ? Ints{} + 0x7f800000 : normal;
  normal = magnitude > 0x7f800000 ? Ints{} + 0x7fc00000 : normal;
  // Below 2^-14 they are multiples of 2^-24, the distance of neighbouring floats at 0.5: the addition rounds.
  const Ints subnormal = (Ints)(((Floats)magnitude + 0.5f) - 0.5f);
  const Ints rounded = magnitude < 0x38800000 ? subnormal : normal;
  return (Floats)(rounded | (bits & (Ints{} + INT32_MIN)));
}
#define MARLIN_ROUND(v) round_to_half(v)
#define MARLIN_ROUND_IS_OURS
#endif

// Round to the nearest bf16 value, ties to even.
MARLIN_TARGET static inline Floats round_to_bfloat(Floats v) {
  const Words bits = (Words)v, magnitude = bits & 0x7fffffffu;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return (Floats)(magnitude > 0x7f800000u ? Words{} + 0x7fc00000u : rounded);
}

// What a weight is made of besides its code, for the 64 columns of a tile, in their own order.
struct Columns {
  const float *scales, *zeros;
};

// The weights of kWidth columns: codes in the lowest bits of `words >> shift`. The product of an integer below 256 and an
// fp16 or bf16 value is exact in fp32, so that the weight is rounded once.
template <int bits, bool bf16>
MARLIN_TARGET static inline void put_weights(Words words, int shift, Floats scale, Floats zero, float* w) {
  const Ints codes = (Ints)((words >> shift) & (Words{} + ((1u << bits) - 1)));
  const Floats product = (__builtin_convertvector(codes, Floats) - zero) * scale;
  store_floats(w, bf16 ? round_to_bfloat(product) : MARLIN_ROUND(product));
}

// One tile -> weights w [16][64]. `in` is the tile's first word of its first row in qweight, `n` the words in a row.
template <int bits, bool bf16>
MARLIN_TARGET static void tile_gptq(const int32_t* in, int64_t n, const Columns& columns, float* w) {
  constexpr int kCodes = 32 / bits;  // in a word, neighbours along K
  for (int row = 0; row < MARLIN_TILE_K / kCodes; ++row) {
    for (int c = 0; c < kTileN; c += kWidth) {
      const Words words = load_words(in + row * n + c);
      const Floats s = load_floats(columns.scales + c), z = load_floats(columns.zeros + c);
      for (int i = 0; i < kCodes; ++i) {
        put_weights<bits, bf16>(words, bits * i, s, z, w + (kCodes * row + i) * kTileN + c);
      }
    }
  }
}

// The same from the tile's words in `B`. Written from the table of layout.py, and deliberately not by way of unpack(), so
// that comparing the two products checks the format and not only that unpack() undoes pack().
template <int bits, bool bf16>
MARLIN_TARGET static void tile_marlin(const int32_t* in, const Columns& columns, float* w) {
  uint32_t words[4][4][16];  // [t][j][column in the sub-tile], with this column's codes lowest
  for (int g = 0; g < 8; ++g) {
    for (int t = 0; t < 4; ++t) {
      for (int j = 0; j < 4; ++j) {
        const int lane = 4 * g + t;
        if (bits == 4) {
          uint32_t word;
          std::memcpy(&word, in + 4 * lane + j, sizeof word);
          words[t][j][g] = word;           // nibbles 0, 1, 4, 5
          words[t][j][g + 8] = word >> 8;  // nibbles 2, 3, 6, 7
        } else {
          std::memcpy(&words[t][j][g], in + 8 * lane + 2 * j, sizeof(uint32_t));
          std::memcpy(&words[t][j][g + 8], in + 8 * lane + 2 * j + 1, sizeof(uint32_t));
        }
      }
    }
  }
  constexpr int kShift[2][4] = {{0, 4, 16, 20}, {0, 8, 16, 24}};  // of rows 2t, 2t + 8, 2t + 1, 2t + 9
  for (int t = 0; t < 4; ++t) {
    for (int c = 0; c < kTileN; c += kWidth) {
      const Words v = load_words(&words[t][c / 16][c % 16]);
      const Floats s = load_floats(columns.scales + c), z = load_floats(columns.zeros + c);
      for (int p = 0; p < 4; ++p) {
        put_weights<bits, bf16>(v, kShift[bits / 8][p], s, z, w + (2 * t + 8 * (p % 2) + p / 2) * kTileN + c);
      }
    }
  }
}

// y[rows][64] += x[rows][16] @ w [16][64], for `rows` rows of a matrix each.
template <int rows>
MARLIN_TARGET static void multiply_tile(const float* x, int64_t x_stride, const float* w, float* y, int64_t y_stride) {
  for (int c = 0; c < kTileN; c += 2 * kWidth) {
    Floats sum[rows][2];
    for (int m = 0; m < rows; ++m) {
      sum[m][0] = load_floats(y + m * y_stride + c);
      sum[m][1] = load_floats(y + m * y_stride + c + kWidth);
    }
    for (int k = 0; k < MARLIN_TILE_K; ++k) {
      const Floats w0 = load_floats(w + k * kTileN + c), w1 = load_floats(w + k * kTileN + c + kWidth);
      for (int m = 0; m < rows; ++m) {
        float a;
        std::memcpy(&a, x + m * x_stride + k, sizeof a);
        sum[m][0] += a * w0;
        sum[m][1] += a * w1;
      }
    }
    for (int m = 0; m < rows; ++m) {
      store_floats(y + m * y_stride + c, sum[m][0]);
      store_floats(y + m * y_stride + c + kWidth, sum[m][1]);
    }
  }
}

template <Format format, int bits, bool bf16>
MARLIN_TARGET static inline void tile_weights(const Layer& layer, int64_t tile_row, int64_t tile_column,
                                              const Columns& columns, float* w) {
  const int32_t* row = layer.weights + tile_row * layer.n * (MARLIN_TILE_K * bits / 32);
  if (format == Format::kGptq) {
    tile_gptq<bits, bf16>(row + kTileN * tile_column, layer.n, columns, w);
  } else {
    tile_marlin<bits, bf16>(row + kTileN * tile_column * (MARLIN_TILE_K * bits / 32), columns, w);
  }
}

template <Format format, int bits, bool bf16>
MARLIN_TARGET static void matmul(const Layer& layer, const Product& p, int64_t begin, int64_t end) {
  float w[MARLIN_TILE_K * kTileN];
  GroupRow<format> groups(layer, begin, end);
  for (int64_t row = 0; row < layer.k / MARLIN_TILE_K; ++row) {
    const int64_t k = layer.k0 + MARLIN_TILE_K * row;
    groups.load(k / layer.rows_per_group);
    for (int64_t column = begin; column < end; ++column) {
      tile_weights<format, bits, bf16>(layer, row, column, {groups.scales(column), groups.zeros(column)}, w);
      const float* x = p.x + k;
      float* y = p.y + kTileN * column;
      int64_t m = 0;
      for (; m + 4 <= p.m; m += 4) multiply_tile<4>(x + m * p.x_columns, p.x_columns, w, y + m * layer.n, layer.n);
      for (; m < p.m; ++m) multiply_tile<1>(x + m * p.x_columns, p.x_columns, w, y + m * layer.n, layer.n);
    }
  }
}

template <Format format, int bits, bool bf16>
MARLIN_TARGET static void dequantize(const Layer& layer, uint16_t* out, int64_t begin, int64_t end) {
  float w[MARLIN_TILE_K * kTileN];
  GroupRow<format> groups(layer, begin, end);
  for (int64_t row = 0; row < layer.k / MARLIN_TILE_K; ++row) {
    groups.load((layer.k0 + MARLIN_TILE_K * row) / layer.rows_per_group);
    for (int64_t column = begin; column < end; ++column) {
      tile_weights<format, bits, bf16>(layer, row, column, {groups.scales(column), groups.zeros(column)}, w);
      for (int k = 0; k < MARLIN_TILE_K; ++k) {
        uint16_t values[kTileN];
        for (int c = 0; c < kTileN; ++c)
          values[c] = bf16 ? bfloat_bits(w[k * kTileN + c]) : half_bits(w[k * kTileN + c]);
        std::memcpy(out + (MARLIN_TILE_K * row + k) * layer.n + kTileN * column, values, sizeof values);
      }
    }
  }
}

#ifdef MARLIN_ROUND_IS_OURS
#undef MARLIN_ROUND_IS_OURS
#endif
#undef MARLIN_ROUND
#undef MARLIN_TARGET
#undef MARLIN_VECTOR_BYTES
