// Tiles of a [T, N] grid in L1 for the backward scans: inputs as T or as one byte a flag, outputs on their way to
// memory. A tile is `major` runs of `minor` elements with `ld` elements between runs; a tile that already lies so is
// not copied. Vectors may read up to a whole number of lanes past a run: never past the grid, and never used.
#pragma once
#include "../math/advantage.h"

namespace pf {
namespace PF_ISA {

constexpr int64_t kScanTile = 4096;  // elements

template <class T>
struct TileView {
  const T* data = nullptr;
  int64_t ld = 0;
  explicit operator bool() const { return data != nullptr; }
  PF_INLINE const T* at(int64_t major, int64_t minor) const { return data + major * ld + minor; }
};

// Where a tile lies in its grid, in the walker's order: runs go along `minor`.
struct TileShape {
  int64_t major0, majors, minor0, minors, grid_majors, grid_minors;
  int64_t multiple;  // runs are read in multiples of so many elements
  int64_t ld() const { return (minors + multiple - 1) / multiple * multiple; }
};

// The grid's strides in the walker's order.
struct Strides {
  int64_t major, minor;
};

// Sixteen lanes of any dtype to one byte a flag.
template <class From>
inline void flags_in(const From* from, int64_t n, uint8_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) to[i + k] = from[i + k] != From{};
  for (; i < n; ++i) to[i] = from[i] != From{};
}

template <class To, class From>
inline void copy_tile(const From* from, Strides s, const TileShape& tile, To* __restrict to) {
  constexpr bool kFlag = sizeof(To) == 1;
  const int64_t ld = tile.ld();
  from += tile.major0 * s.major + tile.minor0 * s.minor;
  if (s.minor == 1) {
    for (int64_t a = 0; a < tile.majors; ++a) {
      if constexpr (kFlag) {
        flags_in(from + a * s.major, tile.minors, to + a * ld);
      } else {
        convert_in(from + a * s.major, tile.minors, to + a * ld);
      }
    }
    return;
  }
  const auto put = [&](int64_t a, int64_t b) {
    const From x = from[a * s.major + b * s.minor];
    if constexpr (kFlag) {
      to[a * ld + b] = x != From{};
    } else {
      to[a * ld + b] = static_cast<To>(x);
    }
  };
  if (tile.minors > tile.majors) {
    for (int64_t a = 0; a < tile.majors; ++a)
      for (int64_t b = 0; b < tile.minors; ++b) put(a, b);
  } else {
    for (int64_t b = 0; b < tile.minors; ++b)
      for (int64_t a = 0; a < tile.majors; ++a) put(a, b);
  }
}

// `native`: the dtypes that may be read where they lie.
template <class To>
inline TileView<To> open_tile(const Grid& g, Strides s, const TileShape& tile, bool native, To* scratch) {
  if (!g.data) return {};
  const int64_t ld = tile.ld(), last = (tile.major0 + tile.majors - 1) * s.major + tile.minor0 + ld;
  const int64_t end = (tile.grid_majors - 1) * s.major + tile.grid_minors;
  if (native && s.minor == 1 && s.major >= 0 && (ld == tile.minors || last <= end)) {
    return {static_cast<const To*>(g.data) + tile.major0 * s.major + tile.minor0, s.major};
  }
  with_type(g.dtype, [&](auto* type) { copy_tile(static_cast<decltype(type)>(g.data), s, tile, scratch); });
  return {scratch, ld};
}

template <class T>
inline TileView<T> open_values(const Grid& g, Strides s, const TileShape& tile, T* scratch) {
  return open_tile<T>(g, s, tile, g.dtype == dtype_of<T>(), scratch);
}
inline TileView<uint8_t> open_flags(const Grid& g, Strides s, const TileShape& tile, uint8_t* scratch) {
  return open_tile<uint8_t>(g, s, tile, g.dtype == DType::boolean || g.dtype == DType::u8, scratch);
}

// Flags to lanes: sixteen bytes that follow each other. GCC 12 takes __builtin_convertvector apart byte by byte.
template <class T>
PF_INLINE Mask<T> load_flags(const uint8_t* p) {
  using R = Registers<T>;
  constexpr bool kFloat = sizeof(T) == 4;
  Mask<T> m;
#if PF_LEVEL == 4
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  PF_EACH(i) {
    if constexpr (kFloat) {
      m.r[i] = __builtin_bit_cast(typename R::Bits, _mm512_maskz_cvtepu8_epi32(0xffff, bytes)) != 0;
    } else {
      const __m128i half = i == 0 ? bytes : _mm_unpackhi_epi64(bytes, bytes);
      m.r[i] = __builtin_bit_cast(typename R::Bits, _mm512_maskz_cvtepu8_epi64(0xff, half)) != 0;
    }
  }
#elif PF_LEVEL == 3
  PF_EACH(i) {
    if constexpr (kFloat) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i));
      m.r[i] = __builtin_bit_cast(typename R::Bits, _mm256_cvtepu8_epi32(bytes)) != 0;
    } else {
      int four;
      std::memcpy(&four, p + 4 * i, 4);
      m.r[i] = __builtin_bit_cast(typename R::Bits, _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four))) != 0;
    }
  }
#elif PF_X86
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i off = _mm_cmpeq_epi8(bytes, _mm_setzero_si128());  // each byte doubled to the width of a lane
  const __m128i off16[2] = {_mm_unpacklo_epi8(off, off), _mm_unpackhi_epi8(off, off)};
  PF_EACH(i) {
    const __m128i wide = off16[i * 2 / R::kCount];
    constexpr int kPerWide = R::kCount / 2;
    __m128i lanes = (i % kPerWide) * 2 / kPerWide ? _mm_unpackhi_epi16(wide, wide) : _mm_unpacklo_epi16(wide, wide);
    if constexpr (!kFloat) lanes = i % 2 ? _mm_unpackhi_epi32(lanes, lanes) : _mm_unpacklo_epi32(lanes, lanes);
    m.r[i] = ~__builtin_bit_cast(typename R::Bits, lanes);
  }
#else
  typedef uint8_t Bytes __attribute__((vector_size(R::kPer)));
  PF_EACH(i) {
    Bytes bytes;
    std::memcpy(&bytes, p + i * R::kPer, R::kPer);
    m.r[i] = __builtin_convertvector(bytes, typename R::Bits) != 0;
  }
  (void)kFloat;
#endif
  return m;
}

// n < kLanes elements in at most two moves, which may overlap.
template <class T>
PF_INLINE void store_lanes(const Vec<T>& v, T* to, int64_t n) {
  alignas(64) T lanes[kLanes];
  v.store(lanes);
  const auto move = [&](auto width) {
    constexpr int64_t w = decltype(width)::value;
    std::memcpy(to, lanes, w * sizeof(T));
    std::memcpy(to + n - w, lanes + n - w, w * sizeof(T));
  };
  if (n >= 8) return move(std::integral_constant<int, 8>{});
  if (n >= 4) return move(std::integral_constant<int, 4>{});
  if (n >= 2) return move(std::integral_constant<int, 2>{});
  if (n == 1) *to = lanes[0];
}

// --- sixteen places of one column -----------------------------------------------------------------------------------

// Lane l holds steps 4·group_of(l) ... + 3 of 64 that follow each other. The 64 elements are transposed in quads that
// never leave their register, so the lanes come permuted.

template <class T>
constexpr int group_of(int lane) {
  constexpr int per = Registers<T>::kPer, quads = per / 4;
  if constexpr (quads == 0)
    return lane;
  else
    return lane / per * per + (lane % 4) * quads + lane % per / 4;
}

template <class T>
constexpr int lane_of(int group) {
  constexpr int per = Registers<T>::kPer, quads = per / 4;
  if constexpr (quads == 0)
    return group;
  else
    return group / per * per + group % per % quads * 4 + group % per / quads;
}
template <class T>
PF_INLINE Vec<T> first_steps() {  // of each lane's group
  alignas(64) T steps[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) steps[lane] = static_cast<T>(kGroup * group_of<T>(lane));
  return Vec<T>::load(steps);
}

template <class T, class F, int... I>
PF_INLINE auto shuffle_by(typename Registers<T>::Float a, typename Registers<T>::Float b,
                          std::integer_sequence<int, I...>, F) {
  return __builtin_shufflevector(a, b, F::at(I)...);
}
template <class T, bool kHigh>
struct Unpack {  // a0 b0 a1 b1 of each quad, or the higher half
  static constexpr int at(int l) { return (l & 1) * Registers<T>::kPer + l / 4 * 4 + l % 4 / 2 + 2 * kHigh; }
};
template <class T, bool kHigh>
struct Pairs {  // a0 a1 b0 b1 of each quad, or the higher half
  static constexpr int at(int l) { return (l % 4 >= 2) * Registers<T>::kPer + l / 4 * 4 + l % 2 + 2 * kHigh; }
};

// 4 × 4 transposes of the quads of four registers; its own inverse.
template <class T>
PF_INLINE void transpose_quads(typename Registers<T>::Float (&r)[4]) {
  using Lanes = std::make_integer_sequence<int, Registers<T>::kPer>;
  const auto ab_low = shuffle_by<T>(r[0], r[1], Lanes{}, Unpack<T, false>{});
  const auto ab_high = shuffle_by<T>(r[0], r[1], Lanes{}, Unpack<T, true>{});
  const auto cd_low = shuffle_by<T>(r[2], r[3], Lanes{}, Unpack<T, false>{});
  const auto cd_high = shuffle_by<T>(r[2], r[3], Lanes{}, Unpack<T, true>{});
  r[0] = shuffle_by<T>(ab_low, cd_low, Lanes{}, Pairs<T, false>{});
  r[1] = shuffle_by<T>(ab_low, cd_low, Lanes{}, Pairs<T, true>{});
  r[2] = shuffle_by<T>(ab_high, cd_high, Lanes{}, Pairs<T, false>{});
  r[3] = shuffle_by<T>(ab_high, cd_high, Lanes{}, Pairs<T, true>{});
}

constexpr int64_t kSpan = kGroup * kLanes;

template <class T>
PF_INLINE void load_groups(const T* p, Vec<T>* step) {
  using R = Registers<T>;
  if constexpr (R::kPer < 4) {
    alignas(64) T lanes[kGroup][kLanes];
    for (int l = 0; l < kLanes; ++l)
      for (int j = 0; j < kGroup; ++j) lanes[j][l] = p[kGroup * l + j];
    for (int j = 0; j < kGroup; ++j) step[j] = Vec<T>::load(lanes[j]);
  } else {
    PF_EACH(i) {
      typename R::Float r[4];
      for (int k = 0; k < 4; ++k) r[k] = *reinterpret_cast<const typename R::LooseFloat*>(p + (4 * i + k) * R::kPer);
      transpose_quads<T>(r);
      for (int j = 0; j < 4; ++j) step[j].r[i] = r[j];
    }
  }
}

template <class T>
PF_INLINE void store_groups(const Vec<T>* step, T* p) {
  using R = Registers<T>;
  if constexpr (R::kPer < 4) {
    alignas(64) T lanes[kGroup][kLanes];
    for (int j = 0; j < kGroup; ++j) step[j].store(lanes[j]);
    for (int l = 0; l < kLanes; ++l)
      for (int j = 0; j < kGroup; ++j) p[kGroup * l + j] = lanes[j][l];
  } else {
    PF_EACH(i) {
      typename R::Float r[4];
      for (int j = 0; j < 4; ++j) r[j] = step[j].r[i];
      transpose_quads<T>(r);
      for (int k = 0; k < 4; ++k) *reinterpret_cast<typename R::LooseFloat*>(p + (4 * i + k) * R::kPer) = r[k];
    }
  }
}

template <class T, int kBy>
struct ShiftDown {  // a's lanes from kBy on, then b's first
  static constexpr int at(int l) { return l + kBy; }
};
template <class T, int kBy, class V>
PF_INLINE V shift_down(const V& a, const V& b) {
  const auto shift = [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, ShiftDown<T, kBy>::at(I)...);
  };
  return shift(std::make_integer_sequence<int, Registers<T>::kPer>{});
}

// Whether all, or none, of kSpan flags are set.
PF_INLINE void uniform_flags(const uint8_t* p, bool& all, bool& none) {
  uint64_t any = 0, zero = 0;
  for (int64_t i = 0; i < kSpan; i += 8) {
    uint64_t w;
    std::memcpy(&w, p + i, 8);
    any |= w;
    zero |= (w - 0x0101010101010101u) & ~w & 0x8080808080808080u;  // not 0 where a byte is 0
  }
  all = zero == 0, none = any == 0;
}

// V of the state after each of `length` steps of a column that has a mask: that of the next step which is kept
// (kCarry), or of the next step, 0 where it is not kept. `next` is V after the last one. Returns V of the first: what
// comes before it in time is told so. Reads and writes whole spans. Masks of tokens are long runs; others are filled
// without a branch.
template <bool kCarry, class T>
PF_INLINE T values_after(const T* value, const uint8_t* mask, int64_t length, T next, T* after) {
  using R = Registers<T>;
  alignas(64) T lane[kLanes];
  for (int l = 0; l < kLanes; ++l) lane[l] = static_cast<T>(l);
  for (int64_t span = (length - 1) / kSpan * kSpan; span >= 0; span -= kSpan) {
    bool all = false, none = false;
    if (length - span >= kSpan) uniform_flags(mask + span, all, none);
    if (all) {
      std::memcpy(after + span, value + span + 1, (kSpan - 1) * sizeof(T));
      after[span + kSpan - 1] = next;
      next = value[span];
      continue;
    }
    if (none) {
      std::fill(after + span, after + span + kSpan, kCarry ? next : T(0));
      after[span + kSpan - 1] = next;
      next = kCarry ? next : T(0);
      continue;
    }
    for (int64_t t = std::min(span + kSpan - kLanes, (length - 1) / kLanes * kLanes); t >= span; t -= kLanes) {
      const Mask<T> kept = load_flags<T>(mask + t);
      const Mask<T> inside = Vec<T>::load(lane) < Vec<T>(static_cast<T>(length - t));
      const Vec<T> values = Vec<T>::load(value + t);
      for (int i = R::kCount - 1; i >= 0; --i) {
        const typename R::Float later = next - typename R::Float{};
        typename R::Bits known = inside.r[i] & kept.r[i];
        typename R::Float x = known ? values.r[i] : typename R::Float{};
        if constexpr (kCarry) {  // each lane takes the nearest known one above it, from twice as far each time
          const auto fill = [&](auto by) __attribute__((always_inline)) {
            if constexpr (by < R::kPer) {
              x = known ? x : shift_down<T, by>(x, x);
              known |= shift_down<T, by>(known, typename R::Bits{});
            }
          };
          fill(std::integral_constant<int, 1>{});
          fill(std::integral_constant<int, 2>{});
          fill(std::integral_constant<int, 4>{});
          fill(std::integral_constant<int, 8>{});
          x = known ? x : later;
        } else {
          x = inside.r[i] ? x : later;
        }
        *reinterpret_cast<typename R::LooseFloat*>(after + t + i * R::kPer) = shift_down<T, 1>(x, later);
        next = x[0];
      }
    }
  }
  return next;
}

// A group of four flags is one 32-bit word.
template <class T>
struct FlagWords {
  using R = Registers<T>;
  typedef uint32_t Words __attribute__((vector_size(R::kPer * 4)));
  typename R::Bits word[R::kCount];

  template <int... I>
  static PF_INLINE Words in_lane_order(Words w, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(w, w, group_of<T>(I)...);
  }
  PF_INLINE explicit FlagWords(const uint8_t* p) {
    PF_EACH(i) {
      Words w;
      std::memcpy(&w, p + i * sizeof(Words), sizeof(Words));
      w = in_lane_order(w, std::make_integer_sequence<int, R::kPer>{});
      word[i] = __builtin_convertvector(w, typename R::Bits);
    }
  }
  PF_INLINE Mask<T> step(int j) const {
    Mask<T> m;
    PF_EACH(i) m.r[i] = (word[i] & typename R::Int(0xffu << (8 * j))) != 0;
    return m;
  }
};

}  // namespace PF_ISA
}  // namespace pf
