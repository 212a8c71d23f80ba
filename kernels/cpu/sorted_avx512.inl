// sorted_avx512.inl: act-order with AVX-512, 4 bits; a part of sorted.cpp.
//
// A gathered word takes eight loads for the eight codes in it: loads are what this waits for. Here a strip is first
// turned into rows of 32 bytes: byte b of a row holds the codes of columns b (low nibble) and b + 32 (high). With rows
// 2t, 2t + 1 of a tile in X, and 2t + 8, 2t + 9 in Y, step 1 of tiles.h, between X and Y, gives E with the bytes of
// columns 0 .. 31 of the tile and O with those of 32 .. 63:
//
//     E, byte b: (2t, b) | (2t + 8, b) << 4      byte 32 + b: (2t + 1, b) | (2t + 9, b) << 4      O: column b + 32
//
// Word (g, t, j) is made of bytes 16j + g, 16j + g + 8, 32 + 16j + g, 32 + 16j + g + 8 of E; for j = 2, 3 of O, with
// j - 2.

constexpr int64_t kRowBytes = kTileN / 2;

// Eight rows come out of their words in the order 0, 2, 4, 6, 1, 3, 5, 7.
inline int64_t row_offset(int64_t row) { return (row / 8 * 8 + row % 8 / 2 + row % 2 * 4) * kRowBytes; }

struct RowIndices {
  alignas(64) uint8_t rows[2][64];     // two rows of bytes out of the words of columns 0 .. 15 and 16 .. 31
  alignas(64) uint8_t columns[2][64];  // and back, from four rows: the words of 16 columns
  alignas(64) uint8_t pack[2][64];     // [g / 4]: lane g % 4 holds the words j = 0 .. 3, from (E, O)
  alignas(64) uint8_t unpack[2][64];   // [E or O], from the registers of g = 0 .. 3 and g = 4 .. 7
};

constexpr RowIndices row_indices() {
  RowIndices indices{};
  for (int t = 0; t < 4; ++t) {
    for (int c = 0; c < 32; ++c) {
      const int in_words = 64 * (c / 16) + 4 * (c % 16) + t;  // byte t of column c
      const int in_rows = 32 * t + c;
      indices.rows[t / 2][in_rows % 64] = static_cast<uint8_t>(in_words);
      indices.columns[c / 16][in_words % 64] = static_cast<uint8_t>(in_rows);
    }
  }
  for (int g = 0; g < 8; ++g) {
    for (int j = 0; j < 4; ++j) {
      for (int byte = 0; byte < 4; ++byte) {
        const int in_words = 16 * (g % 4) + 4 * j + byte;
        const int in_rows = 32 * (byte / 2) + 16 * (j % 2) + g + 8 * (byte % 2);
        indices.pack[g / 4][in_words] = static_cast<uint8_t>(64 * (j / 2) + in_rows);
        indices.unpack[j / 2][in_rows] = static_cast<uint8_t>(64 * (g / 4) + in_words);
      }
    }
  }
  return indices;
}

constexpr RowIndices kRows = row_indices();

// The 4 x 4 transposition of the 128-bit lanes of v[0..3].
MARLIN_AVX512 inline void transpose_lanes(__m512i v[4]) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(v[0], v[1], 0xee), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  v[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  v[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// A row of 64 words -> eight rows of bytes.
MARLIN_AVX512 inline void words_to_rows(const int32_t* words, uint8_t* rows) {
  __m512i low[2], high[2];  // [columns / 16 % 2]
  for (int i = 0; i < 2; ++i) mix_nibbles(load512(words + 16 * i), load512(words + 32 + 16 * i), &low[i], &high[i]);
  for (int i = 0; i < 2; ++i) {
    const __m512i index = _mm512_load_si512(kRows.rows[i]);
    _mm512_storeu_si512(rows + 64 * i, _mm512_permutex2var_epi8(low[0], index, low[1]));
    _mm512_storeu_si512(rows + 128 + 64 * i, _mm512_permutex2var_epi8(high[0], index, high[1]));
  }
}

MARLIN_AVX512 inline __m512i two_rows(const uint8_t* first, const uint8_t* second) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

MARLIN_AVX512 inline void store_two_rows(__m512i rows, uint8_t* first, uint8_t* second) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(rows));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64(rows, 1));
}

MARLIN_AVX512 void pack_sorted_rows(const Sorting& a, int32_t* B, int64_t begin, int64_t end) {
  std::vector<uint8_t> strip((a.k / 8 + 1) * 8 * kRowBytes);
  std::vector<const uint8_t*> from(a.rows, strip.data() + row_offset(a.k));  // of each stored row; padding at the end
  for (int64_t k = 0; k < a.k; ++k) from[k] = strip.data() + row_offset(a.perm[k]);
  const __m512i index[2] = {_mm512_load_si512(kRows.pack[0]), _mm512_load_si512(kRows.pack[1])};
  for (int64_t column = begin; column < end; ++column) {
    const int64_t c0 = kTileN * column, own = own_columns(a, c0);
    int32_t padded[kTileN];
    padding_words<4>(a, c0, reinterpret_cast<uint32_t*>(padded));
    words_to_rows(padded, strip.data() + a.k * kRowBytes);
    for (int64_t row = 0; row < a.k / 8; ++row) {
      const int32_t* words = a.qweight + row * a.stride + c0;
      if (own < kTileN) words = static_cast<const int32_t*>(std::memcpy(padded, words, sizeof(int32_t) * own));
      words_to_rows(words, strip.data() + row * 8 * kRowBytes);
    }
    for (int64_t k0 = 0; k0 < a.rows; k0 += MARLIN_TILE_K) {
      __m512i v[2][4];
      for (int t = 0; t < 4; ++t) {
        const uint8_t* const* rows = from.data() + k0 + 2 * t;
        __m512i even, odd;
        mix_nibbles(two_rows(rows[0], rows[1]), two_rows(rows[8], rows[9]), &even, &odd);
        for (int half = 0; half < 2; ++half) v[half][t] = _mm512_permutex2var_epi8(even, index[half], odd);
      }
      int32_t* tile = B + k0 / MARLIN_TILE_K * a.b_stride + column * MARLIN_TILE_WORDS;
      for (int half = 0; half < 2; ++half) {
        transpose_lanes(v[half]);
        for (int g = 0; g < 4; ++g) store512(tile + 16 * (4 * half + g), v[half][g]);
      }
    }
  }
}

// As compare_sorted: from tiles to stored rows, then eight of them, as the source has them, to its row of words.
MARLIN_AVX512 int64_t compare_sorted_rows(const Sorting& a, const int32_t* inverse, const int32_t* B, int64_t begin,
                                          int64_t end) {
  std::vector<uint8_t> strip(a.rows * kRowBytes);  // in stored order, one after the other
  const __m512i unpack[2] = {_mm512_load_si512(kRows.unpack[0]), _mm512_load_si512(kRows.unpack[1])};
  const __m512i columns[2] = {_mm512_load_si512(kRows.columns[0]), _mm512_load_si512(kRows.columns[1])};
  int64_t first = -1;
  for (int64_t column = begin; column < end; ++column) {
    for (int64_t k0 = 0; k0 < a.rows; k0 += MARLIN_TILE_K) {
      const int32_t* tile = B + k0 / MARLIN_TILE_K * a.b_stride + column * MARLIN_TILE_WORDS;
      uint8_t* to = strip.data() + k0 * kRowBytes;
      __m512i v[2][4];
      for (int half = 0; half < 2; ++half) {
        for (int g = 0; g < 4; ++g) v[half][g] = load512(tile + 16 * (4 * half + g));
        transpose_lanes(v[half]);
      }
      for (int t = 0; t < 4; ++t) {
        const __m512i even = _mm512_permutex2var_epi8(v[0][t], unpack[0], v[1][t]);
        const __m512i odd = _mm512_permutex2var_epi8(v[0][t], unpack[1], v[1][t]);
        __m512i x, y;
        mix_nibbles(even, odd, &x, &y);
        store_two_rows(x, to + 2 * t * kRowBytes, to + (2 * t + 1) * kRowBytes);
        store_two_rows(y, to + (2 * t + 8) * kRowBytes, to + (2 * t + 9) * kRowBytes);
      }
    }
    const int64_t c0 = kTileN * column, own = own_columns(a, c0);
    int32_t padded[kTileN];
    padding_words<4>(a, c0, reinterpret_cast<uint32_t*>(padded));
    uint8_t padding[8 * kRowBytes];
    words_to_rows(padded, padding);
    bool equal = true;
    for (int64_t k = a.k; k < a.rows; ++k) equal &= std::memcmp(strip.data() + k * kRowBytes, padding, kRowBytes) == 0;
    __m512i different = _mm512_setzero_si512();
    for (int64_t row = 0; row < a.k / 8; ++row) {
      const int32_t* words = a.qweight + row * a.stride + c0;
      if (own < kTileN) words = static_cast<const int32_t*>(std::memcpy(padded, words, sizeof(int32_t) * own));
      const uint8_t* from[8];
      for (int i = 0; i < 8; ++i) from[i] = strip.data() + inverse[row * 8 + i] * kRowBytes;
      const __m512i low[2] = {two_rows(from[0], from[2]), two_rows(from[4], from[6])};
      const __m512i high[2] = {two_rows(from[1], from[3]), two_rows(from[5], from[7])};
      for (int i = 0; i < 2; ++i) {
        __m512i x, y;
        mix_nibbles(_mm512_permutex2var_epi8(low[0], columns[i], low[1]),
                    _mm512_permutex2var_epi8(high[0], columns[i], high[1]), &x, &y);
        different = _mm512_or_si512(different, _mm512_xor_si512(x, load512(words + 16 * i)));
        different = _mm512_or_si512(different, _mm512_xor_si512(y, load512(words + 32 + 16 * i)));
      }
    }
    if (equal && _mm512_test_epi32_mask(different, different) == 0) continue;
    const int64_t place = locate_difference<4>(a, B, column);
    if (first < 0 || place < first) first = place;
  }
  return first;
}
