// Rows [n, A] to and from scratch in L1: as lanes (sixteen rows transposed, for small A) or in chunks of one row.
#pragma once

namespace pf {
namespace PF_ISA {

constexpr int64_t kRowTile = 256;     // most rows that a row function takes
constexpr int64_t kRowsInLanes = 64;  // up to this width sixteen rows lie side by side in the lanes
constexpr int64_t kChunk = 1024;      // elements of a long row that stay in L1

// Rows of a tile, so that a tile's logits stay in L2 between forward and backward: whole vectors of rows, if it can.
inline int64_t rows_per_tile(int64_t width) {
  const int64_t rows = std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(width, 1));
  return rows < kLanes ? rows : std::min(kRowTile, rows / kLanes * kLanes);
}

// Columns [first, first + width).
inline Rows columns(Rows x, int64_t first, int64_t width) {
  if (x.lead.data) x.lead.data = static_cast<const char*>(x.lead.data) + first * x.stride * size_of(x.lead.dtype);
  x.width = width;
  return x;
}

// Of what the blocks found, in their order.
inline Offence first_of(const Offence* offences) {
  for (int64_t b = 0; b < kMaxRowBlocks; ++b) {
    if (offences[b].where >= 0) return offences[b];
  }
  return {};
}

// Runs f(block, first, n) over tiles of rows; blocks of tiles, which depend on rows and width only, run in parallel.
template <class F>
inline void over_row_tiles(int64_t rows, int64_t width, int threads, F&& f) {
  const int64_t tile = rows_per_tile(width);
  const int64_t least = (int64_t{1} << 15) / std::max<int64_t>(width, 1);
  const int64_t size = (std::max((rows + kMaxRowBlocks - 1) / kMaxRowBlocks, least) + tile - 1) / tile * tile;
  for_blocks((rows + size - 1) / size, threads, [&](int64_t b) {
    const int64_t end = std::min(rows, (b + 1) * size);
    for (int64_t i = b * size; i < end; i += tile) f(b, i, std::min(tile, end - i));
  });
}

// Adds the blocks' sums [kMaxRowBlocks, D] in order, into one row.
inline void merge_row_sums(double* sums, const Rows& out) {
  with_float_type(out.lead.dtype, [&](auto* type) {
    using To = std::remove_pointer_t<decltype(type)>;
    auto* to = static_cast<To*>(const_cast<void*>(out.lead.data));
    for (int64_t j = 0; j < out.width; ++j) {
      double total = 0;
      for (int64_t b = 0; b < kMaxRowBlocks; ++b) total += sums[b * out.width + j];
      to[j * out.stride] = static_cast<To>(total);
    }
  });
}

// --- sixteen rows in the lanes: to[j * kLanes + i] is element j of row i ---------------------------------------------

template <class T>
struct Quads {
  typedef T Type __attribute__((vector_size(4 * sizeof(T))));
  typedef T Loose __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T>
using Quad = typename Quads<T>::Type;

template <class T>
PF_INLINE void transpose4(Quad<T>& a, Quad<T>& b, Quad<T>& c, Quad<T>& d) {
  const Quad<T> ac0 = __builtin_shufflevector(a, c, 0, 4, 1, 5), ac1 = __builtin_shufflevector(a, c, 2, 6, 3, 7);
  const Quad<T> bd0 = __builtin_shufflevector(b, d, 0, 4, 1, 5), bd1 = __builtin_shufflevector(b, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ac0, bd0, 0, 4, 1, 5), b = __builtin_shufflevector(ac0, bd0, 2, 6, 3, 7);
  c = __builtin_shufflevector(ac1, bd1, 0, 4, 1, 5), d = __builtin_shufflevector(ac1, bd1, 2, 6, 3, 7);
}

template <class T>
PF_INLINE Quad<T> load_quad(const T* p) {
  return *reinterpret_cast<const typename Quads<T>::Loose*>(p);
}
template <class T>
PF_INLINE void store_quad(const Quad<T>& q, T* p) {
  *reinterpret_cast<typename Quads<T>::Loose*>(p) = q;
}

// Four by four; the last columns are done twice rather than one by one.
template <class T>
inline void rows_to_lanes(const T* const* row, int64_t width, T* to) {
  if (width < 4) {
    for (int i = 0; i < kLanes; ++i) {
      for (int64_t j = 0; j < width; ++j) to[j * kLanes + i] = row[i][j];
    }
    return;
  }
  for (int i = 0; i < kLanes; i += 4) {
    const T *r0 = row[i], *r1 = row[i + 1], *r2 = row[i + 2], *r3 = row[i + 3];
    for (int64_t j = 0; j < width; j += 4) {
      const int64_t at = std::min(j, width - 4);
      Quad<T> a = load_quad(r0 + at), b = load_quad(r1 + at), c = load_quad(r2 + at), d = load_quad(r3 + at);
      transpose4<T>(a, b, c, d);
      T* lane = to + at * kLanes + i;
      store_quad(a, lane), store_quad(b, lane + kLanes), store_quad(c, lane + 2 * kLanes);
      store_quad(d, lane + 3 * kLanes);
    }
  }
}
template <class T>
inline void lanes_to_rows(const T* from, int64_t width, T* const* row) {
  if (width < 4) {
    for (int i = 0; i < kLanes; ++i) {
      for (int64_t j = 0; j < width; ++j) row[i][j] = from[j * kLanes + i];
    }
    return;
  }
  for (int i = 0; i < kLanes; i += 4) {
    T *r0 = row[i], *r1 = row[i + 1], *r2 = row[i + 2], *r3 = row[i + 3];
    for (int64_t j = 0; j < width; j += 4) {
      const int64_t at = std::min(j, width - 4);
      const T* lane = from + at * kLanes + i;
      Quad<T> a = load_quad(lane), b = load_quad(lane + kLanes), c = load_quad(lane + 2 * kLanes);
      Quad<T> d = load_quad(lane + 3 * kLanes);
      transpose4<T>(a, b, c, d);
      store_quad(a, r0 + at), store_quad(b, r1 + at), store_quad(c, r2 + at), store_quad(d, r3 + at);
    }
  }
}

// Rows [first, first + n), or those that `row` names; where `skip` is set, and past the last, nothing is read: 0.
template <class T>
inline void read_lanes(const Rows& x, int64_t first, const int64_t* row, int64_t n, const bool* skip, T* to) {
  const int64_t width = x.width, stride = x.stride;
  const int64_t step = x.lead.ndim == 1 ? x.lead.stride[0] : 0;
  const auto offset = [&](int64_t i) {
    const int64_t at = row ? row[i] : first + i;
    return x.lead.ndim <= 1 ? at * step : offset_of(x.lead, at);
  };
  with_float_type(x.lead.dtype, [&](auto* type) {
    using From = std::remove_pointer_t<decltype(type)>;
    auto* data = static_cast<const From*>(x.lead.data);
    if (stride == 1 && n == kLanes && !skip) {
      const T* rows[kLanes];
      alignas(64) T converted[kRowsInLanes * kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const From* from = data + offset(i);
        if constexpr (std::is_same_v<T, From>) {
          rows[i] = from;
        } else {
          rows[i] = converted + i * width;
          convert_in(from, width, converted + i * width);
        }
      }
      return rows_to_lanes(rows, width, to);
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      if (i >= n || (skip && skip[i])) {
        for (int64_t j = 0; j < width; ++j) to[j * kLanes + i] = T(0);
        continue;
      }
      const auto* from = data + offset(i);
      for (int64_t j = 0; j < width; ++j) to[j * kLanes + i] = static_cast<T>(from[j * stride]);
    }
  });
}

template <class T>
inline void write_lanes(const Rows& x, int64_t first, int64_t n, const T* from) {
  const int64_t width = x.width, stride = x.stride, step = x.lead.ndim == 1 ? x.lead.stride[0] : 0;
  const auto offset = [&](int64_t i) { return x.lead.ndim <= 1 ? (first + i) * step : offset_of(x.lead, first + i); };
  with_float_type(x.lead.dtype, [&](auto* type) {
    using To = std::remove_pointer_t<decltype(type)>;
    auto* data = static_cast<To*>(const_cast<void*>(x.lead.data));
    if (stride == 1 && n == kLanes) {
      T* row[kLanes];
      alignas(64) T unconverted[kRowsInLanes * kLanes];
      for (int i = 0; i < kLanes; ++i) {
        row[i] = unconverted + i * width;
        if constexpr (std::is_same_v<T, To>) row[i] = data + offset(i);
      }
      lanes_to_rows(from, width, row);
      if constexpr (!std::is_same_v<T, To>) {
        for (int i = 0; i < kLanes; ++i) convert_out(row[i], width, data + offset(i));
      }
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      auto* to = data + offset(i);
      for (int64_t j = 0; j < width; ++j) to[j * stride] = static_cast<To>(from[j * kLanes + i]);
    }
  });
}

// 1 where an element, of any dtype, is not 0, else 0; and 1 where nothing is read.
template <class T>
inline void read_flag_lanes(const Rows& mask, int64_t first, const int64_t* row, int64_t n, const bool* skip, T* to) {
  with_type(mask.lead.dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(mask.lead.data);
    for (int64_t i = 0; i < kLanes; ++i) {
      const bool none = i >= n || (skip && skip[i]);
      const auto* from = none ? data : data + offset_of(mask.lead, row ? row[i] : first + i);
      for (int64_t j = 0; j < mask.width; ++j) {
        to[j * kLanes + i] = none || from[j * mask.stride] != 0 ? T(1) : T(0);
      }
    }
  });
}

// n elements of sixteen, in one store where all are there.
template <class T>
PF_INLINE void store_part(const Vec<T>& v, T* to, int64_t n) {
  if (n == kLanes) return v.store(to);
  alignas(64) T x[kLanes];
  v.store(x);
  for (int64_t i = 0; i < n; ++i) to[i] = x[i];
}
template <class T>
PF_INLINE Vec<T> load_part(const T* from, int64_t n) {
  if (n == kLanes) return Vec<T>::load(from);
  alignas(64) T x[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) x[i] = from[i];
  return Vec<T>::load(x);
}

// --- one long row, chunk by chunk ------------------------------------------------------------------------------------

// Elements [offset, offset + n) as T, whatever they are.
template <class T>
inline void read_chunk_to(const Rows& x, int64_t offset, int64_t n, T* to) {
  with_float_type(x.lead.dtype, [&](auto* type) {
    auto* from = static_cast<const std::remove_pointer_t<decltype(type)>*>(x.lead.data) + offset;
    if (x.stride == 1) return convert_in(from, n, to);
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<T>(from[j * x.stride]);
  });
}

// Elements [first, first + n) of a row at `offset`: in place where they lie as T, else in scratch; past n up to a whole
// vector `pad`.
template <class T>
inline const T* read_chunk(const Rows& x, int64_t offset, int64_t first, int64_t n, T pad, T* scratch) {
  if (x.stride == 1 && x.lead.dtype == dtype_of<T>() && n % kLanes == 0) {
    return static_cast<const T*>(x.lead.data) + offset + first;
  }
  read_chunk_to(x, offset + first * x.stride, n, scratch);
  for (int64_t j = n; j < padded(n); ++j) scratch[j] = pad;
  return scratch;
}

template <class T>
inline void read_mask_chunk(const Rows& mask, int64_t offset, int64_t first, int64_t n, T* to) {
  with_type(mask.lead.dtype, [&](auto* type) {
    auto* from = static_cast<decltype(type)>(mask.lead.data) + offset + first * mask.stride;
    for (int64_t j = 0; j < n; ++j) to[j] = from[j * mask.stride] != 0 ? T(1) : T(0);
  });
  for (int64_t j = n; j < padded(n); ++j) to[j] = T(0);
}

template <class T>
inline void write_chunk(const Rows& x, int64_t offset, int64_t first, int64_t n, bool past_cache, const T* from) {
  with_float_type(x.lead.dtype, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(const_cast<void*>(x.lead.data)) + offset + first * x.stride;
    using To = std::remove_reference_t<decltype(*to)>;
    if (x.stride != 1) {
      for (int64_t j = 0; j < n; ++j) to[j * x.stride] = static_cast<To>(from[j]);
    } else if (!past_cache) {
      convert_out(from, n, to);
    } else if constexpr (std::is_same_v<T, To>) {
      store_past_cache(to, from, n * sizeof(To));
    } else {
      alignas(64) To converted[kChunk];
      convert_out(from, n, converted);
      store_past_cache(to, converted, n * sizeof(To));
    }
  });
}

}  // namespace PF_ISA
}  // namespace pf
