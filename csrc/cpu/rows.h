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

template <class T, int N>
struct Group {
  typedef T Type __attribute__((vector_size(N * sizeof(T))));
  typedef T Loose __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
  static PF_INLINE Type load(const T* p) { return *reinterpret_cast<const Loose*>(p); }
  static PF_INLINE void store(const Type& x, T* p) { *reinterpret_cast<Loose*>(p) = x; }
};
// As many lanes as a register has, at least four: quads, each of which is transposed by itself.
template <class T>
constexpr int kQuadLanes = std::max(4, Registers<T>::kPer);

// Of each quad: a[kFirst], b[kFirst], a[kFirst + 1], b[kFirst + 1].
template <int kFirst, class B, size_t... I>
PF_INLINE B interleave(const B& a, const B& b, std::index_sequence<I...>) {
  constexpr int kLanesHere = sizeof...(I);
  return __builtin_shufflevector(a, b, (int(I / 4 * 4 + kFirst + I % 4 / 2) + int(I % 2) * kLanesHere)...);
}
template <class B, class Index>
PF_INLINE void transpose_quads(B& a, B& b, B& c, B& d, Index index) {
  const B ac0 = interleave<0>(a, c, index), ac1 = interleave<2>(a, c, index);
  const B bd0 = interleave<0>(b, d, index), bd1 = interleave<2>(b, d, index);
  a = interleave<0>(ac0, bd0, index), b = interleave<2>(ac0, bd0, index);
  c = interleave<0>(ac1, bd1, index), d = interleave<2>(ac1, bd1, index);
}
// Columns [at, at + 4) of every fourth row, side by side.
template <class T, int N>
PF_INLINE typename Group<T, N>::Type load_quads(const T* const* row, int64_t at) {
  if constexpr (N == 4) {
    return Group<T, 4>::load(row[0] + at);
  } else {
    const auto low = load_quads<T, N / 2>(row, at), high = load_quads<T, N / 2>(row + N / 2, at);
    return [&]<size_t... I>(std::index_sequence<I...>) PF_INLINE_LAMBDA {
      return __builtin_shufflevector(low, high, int(I)...);
    }(std::make_index_sequence<N>{});
  }
}
template <class T, int N>
PF_INLINE void store_quads(const typename Group<T, N>::Type& x, T* const* row, int64_t at) {
  if constexpr (N == 4) {
    Group<T, 4>::store(x, row[0] + at);
  } else {
    [&]<size_t... I>(std::index_sequence<I...>) PF_INLINE_LAMBDA {
      store_quads<T, N / 2>(__builtin_shufflevector(x, x, int(I)...), row, at);
      store_quads<T, N / 2>(__builtin_shufflevector(x, x, int(I + N / 2)...), row + N / 2, at);
    }(std::make_index_sequence<N / 2>{});
  }
}

// Four columns at a time; the last ones are done twice rather than one by one.
template <class T>
inline void rows_to_lanes(const T* const* row, int64_t width, T* to) {
  if (width < 4) {
    for (int i = 0; i < kLanes; ++i) {
      for (int64_t j = 0; j < width; ++j) to[j * kLanes + i] = row[i][j];
    }
    return;
  }
  constexpr int N = kQuadLanes<T>;
  for (int i = 0; i < kLanes; i += N) {
    for (int64_t j = 0; j < width; j += 4) {
      const int64_t at = std::min(j, width - 4);
      auto a = load_quads<T, N>(row + i, at), b = load_quads<T, N>(row + i + 1, at);
      auto c = load_quads<T, N>(row + i + 2, at), d = load_quads<T, N>(row + i + 3, at);
      transpose_quads(a, b, c, d, std::make_index_sequence<N>{});
      T* lane = to + at * kLanes + i;
      Group<T, N>::store(a, lane), Group<T, N>::store(b, lane + kLanes);
      Group<T, N>::store(c, lane + 2 * kLanes), Group<T, N>::store(d, lane + 3 * kLanes);
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
  constexpr int N = kQuadLanes<T>;
  for (int i = 0; i < kLanes; i += N) {
    for (int64_t j = 0; j < width; j += 4) {
      const int64_t at = std::min(j, width - 4);
      const T* lane = from + at * kLanes + i;
      auto a = Group<T, N>::load(lane), b = Group<T, N>::load(lane + kLanes);
      auto c = Group<T, N>::load(lane + 2 * kLanes), d = Group<T, N>::load(lane + 3 * kLanes);
      transpose_quads(a, b, c, d, std::make_index_sequence<N>{});
      store_quads<T, N>(a, row + i, at), store_quads<T, N>(b, row + i + 1, at);
      store_quads<T, N>(c, row + i + 2, at), store_quads<T, N>(d, row + i + 3, at);
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
      if (!row && step == width) ask_ahead<0>(data + offset(0), kLanes * width * sizeof(From));
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
      if (step == width) ask_ahead<1>(data + offset(0), kLanes * width * sizeof(To));
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
