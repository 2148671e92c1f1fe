// Paged key/value cache: copying or casting new tokens into their pages, and the index arithmetic around it.
// append_pages copies two tensors (keys and values, or compressed KV and rope keys) byte for byte into their caches. Token t of
// request b at position p goes to row p % page_size of page kv_indices[kv_indptr[b] + p / page_size].
// One CTA copies kThreads * kUnroll vectors of the flattened (token, tensor, head, vector) list; grid = vectors /
// (kThreads * kUnroll). The data are loaded before the page is looked up, so the look-up's latency is hidden.
// append_quantized does the same with caches of a byte an element: it divides the elements by a scale and casts them.
// Shared memory: none. Bytes moved: the appended tokens twice, and 4 indices a token. Architecture: any.
#pragma once
#include "attention/fast_div.cuh"
#include "common/segments.cuh"
#include "common/vec.cuh"
#include "ptx/pdl.cuh"
#include "quantization/formats.cuh"

namespace fi {

// Where a token goes: false for one that goes nowhere.
FI_DEVICE bool find_row(const int32_t* batch_indices, const int32_t* positions, const int32_t* kv_indices,
                        const int32_t* kv_indptr, uint32_t batch, uint32_t page_size, uint32_t token, int64_t& page,
                        uint32_t& row) {
  const int32_t request = batch_indices[token];
  const int32_t position = positions[token];
  if (request < 0 || uint32_t(request) >= batch || position < 0) return false;
  const uint32_t in_request = uint32_t(position) / page_size;
  const int32_t begin = kv_indptr[request], end = kv_indptr[request + 1];
  // A position past the request's pages would land in another request's page.
  if (int64_t(begin) + in_request >= end) return false;
  page = kv_indices[begin + in_request];
  row = uint32_t(position) - in_request * page_size;
  return true;
}

// The same for several tokens of a thread at a time: none waits for the look-ups of another. No token: 0xffffffff.
template <int kCount>
struct FoundRows {
  bool there[kCount];
  int32_t page[kCount];
  uint32_t row[kCount];
  FI_DEVICE FoundRows(const int32_t* batch_indices, const int32_t* positions, const int32_t* kv_indices, const int32_t* kv_indptr,
                      uint32_t batch, uint32_t page_size, const uint32_t (&token)[kCount]) {
    int32_t request[kCount], position[kCount], begin[kCount], end[kCount];
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      there[n] = token[n] != 0xffffffffu;
      request[n] = there[n] ? batch_indices[token[n]] : -1;
      position[n] = there[n] ? positions[token[n]] : -1;
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      there[n] = request[n] >= 0 && uint32_t(request[n]) < batch && position[n] >= 0;
      begin[n] = there[n] ? kv_indptr[request[n]] : 0;
      end[n] = there[n] ? kv_indptr[request[n] + 1] : 0;
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const uint32_t in_request = uint32_t(position[n]) / page_size;
      row[n] = uint32_t(position[n]) - in_request * page_size;
      // A position past the request's pages would land in another request's page.
      there[n] = there[n] && int64_t(begin[n]) + in_request < end[n];
      page[n] = there[n] ? kv_indices[begin[n] + in_request] : 0;
    }
  }
};

struct AppendParams {
  const void* a;  // [nnz, heads, kBytesA]
  const void* b;  // [nnz, heads, kBytesB]
  void* a_cache;
  void* b_cache;
  const int32_t* batch_indices;  // [nnz]; negative: skip the token
  const int32_t* positions;      // [nnz]
  const int32_t* kv_indices;
  const int32_t* kv_indptr;  // [batch + 1]
  int64_t a_stride_n, a_stride_h, b_stride_n, b_stride_h;  // bytes, as all strides here
  int64_t a_page, a_row, a_head;
  int64_t b_page, b_row, b_head;
  uint64_t vectors;  // nnz * heads * (kBytesA + kBytesB) / kVec
  uint32_t heads;
  uint32_t batch;
  uint32_t page_size;
};

// Config: kBytesA, kBytesB (of one head), kVec (bytes an access), kThreads, kUnroll
template <class Config>
FI_DEVICE void append_pages(const AppendParams& params) {
  constexpr int kVec = Config::kVec, kThreads = Config::kThreads, kUnroll = Config::kUnroll;
  constexpr uint32_t kVecsA = Config::kBytesA / kVec, kVecsB = Config::kBytesB / kVec;
  // A place in the list of a token's vectors: which tensor, which head, which byte of the head's row.
  struct Place {
    bool is_a;
    uint32_t head, offset;
    FI_DEVICE Place(uint32_t i, uint32_t vectors_a) {
      is_a = kVecsB == 0 || i < vectors_a;
      if (!is_a) i -= vectors_a;
      head = is_a ? i / kVecsA : i / max_of(kVecsB, 1u);
      offset = (is_a ? i - head * kVecsA : i - head * kVecsB) * kVec;
    }
  };
  using V = Vec<uint8_t, kVec>;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint64_t first = uint64_t(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  const uint32_t vectors_a = params.heads * kVecsA;
  const uint32_t token_vectors = vectors_a + params.heads * kVecsB;
  V data[kUnroll];
  constexpr uint32_t kNone = 0xffffffffu;
  uint32_t token[kUnroll], rest[kUnroll];
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    const uint64_t i = first + n * kThreads;
    token[n] = kNone;
    if (i < params.vectors) {
      if (params.vectors <= 0xffffffffu) {  // uniform; a 32-bit division is four times cheaper
        token[n] = uint32_t(i) / token_vectors;
        rest[n] = uint32_t(i) - token[n] * token_vectors;
      } else {
        token[n] = uint32_t(i / token_vectors);
        rest[n] = uint32_t(i - uint64_t(token[n]) * token_vectors);
      }
      const Place at(rest[n], vectors_a);
      const uint8_t* source = static_cast<const uint8_t*>(at.is_a ? params.a : params.b) +
                              int64_t(token[n]) * (at.is_a ? params.a_stride_n : params.b_stride_n) +
                              at.head * (at.is_a ? params.a_stride_h : params.b_stride_h) + at.offset;
      data[n] = load_streaming<V>(source);
    }
  }
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    if (token[n] != kNone) {
      int64_t page;
      uint32_t row;
      if (!find_row(params.batch_indices, params.positions, params.kv_indices, params.kv_indptr, params.batch,
                    params.page_size, token[n], page, row))
        continue;
      const Place at(rest[n], vectors_a);
      uint8_t* target = static_cast<uint8_t*>(at.is_a ? params.a_cache : params.b_cache) +
                        page * (at.is_a ? params.a_page : params.b_page) + row * (at.is_a ? params.a_row : params.b_row) +
                        at.head * (at.is_a ? params.a_head : params.b_head) + at.offset;
      data[n].store(target);
    }
  }
}

struct AppendQuantizedParams {
  AppendParams to;       // strides in bytes; vectors of kVec elements
  const float* a_scale;  // [1] or, with the head stride 1, [heads] on the device; null: a_value
  const float* b_scale;
  float a_value, b_value;
  uint32_t a_scale_head, b_scale_head;
  FastDiv token_vectors;  // of all heads of both tensors; to.vectors is below 2^31
};

// Config: T (of the tokens), O (of the caches), kDimA, kDimB (elements of one head), kVec, kThreads, kUnroll
template <class Config>
FI_DEVICE void append_quantized(const AppendQuantizedParams& params) {
  using T = typename Config::T;
  using O = typename Config::O;
  using V = Vec<T, Config::kVec>;
  constexpr int kVec = Config::kVec, kThreads = Config::kThreads, kUnroll = Config::kUnroll;
  constexpr uint32_t kVecsA = Config::kDimA / kVec, kVecsB = Config::kDimB / kVec, kNone = 0xffffffffu;
  const AppendParams& to = params.to;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint32_t vectors_a = to.heads * kVecsA;
  V data[kUnroll];
  uint32_t token[kUnroll], head[kUnroll], column[kUnroll];
  bool is_a[kUnroll];
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    const uint32_t i = blockIdx.x * (kThreads * kUnroll) + n * kThreads + threadIdx.x;
    token[n] = kNone;
    if (i < to.vectors) {
      token[n] = params.token_vectors.quotient(i);
      uint32_t rest = i - token[n] * params.token_vectors.divisor;
      is_a[n] = kVecsB == 0 || rest < vectors_a;
      if (!is_a[n]) rest -= vectors_a;
      head[n] = is_a[n] ? rest / kVecsA : rest / max_of(kVecsB, 1u);
      column[n] = (rest - head[n] * (is_a[n] ? kVecsA : kVecsB)) * kVec;
      const uint8_t* source = static_cast<const uint8_t*>(is_a[n] ? to.a : to.b) +
                              int64_t(token[n]) * (is_a[n] ? to.a_stride_n : to.b_stride_n) +
                              head[n] * (is_a[n] ? to.a_stride_h : to.b_stride_h) + column[n] * sizeof(T);
      data[n] = load_streaming<V>(source);
    }
  }
  const FoundRows<kUnroll> found(to.batch_indices, to.positions, to.kv_indices, to.kv_indptr, to.batch, to.page_size, token);
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    if (found.there[n]) {
      const int64_t page = found.page[n];
      const uint32_t row = found.row[n];
      const float* given = is_a[n] ? params.a_scale : params.b_scale;
      const float scale = given ? given[head[n] * (is_a[n] ? params.a_scale_head : params.b_scale_head)]
                                : (is_a[n] ? params.a_value : params.b_value);
      const float inverse = 1.f / scale;
      float v[kVec];
      quant::to_floats(data[n], v);
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[j] = quant::divide(v[j], scale, inverse);
      uint8_t* target = static_cast<uint8_t*>(is_a[n] ? to.a_cache : to.b_cache) +
                        page * (is_a[n] ? to.a_page : to.b_page) + row * (is_a[n] ? to.a_row : to.b_row) +
                        head[n] * (is_a[n] ? to.a_head : to.b_head) + column[n];
      quant::store<O>(v, target);
    }
  }
}

struct PositionsParams {
  const int32_t* append_indptr;  // [batch + 1]
  const int32_t* seq_lens;       // [batch], after the append
  int32_t* batch_indices;        // [nnz]
  int32_t* positions;            // [nnz]
  uint32_t nnz;
  uint32_t batch;
};

// batch_indices[t] = b and positions[t] = seq_lens[b] - append_indptr[b + 1] + t; -1 and 0 for tokens outside every
// request. One thread a token; grid = nnz / kThreads.
template <class Config>
FI_DEVICE void batch_positions(const PositionsParams& params) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const uint32_t token = blockIdx.x * Config::kThreads + threadIdx.x;
  if (token >= params.nnz) return;
  const int request = find_segment(params.append_indptr, int(params.batch), token);
  params.batch_indices[token] = request;
  params.positions[token] =
      request < 0 ? 0 : params.seq_lens[request] - params.append_indptr[request + 1] + int32_t(token);
}

struct SeqLensParams {
  const int32_t* kv_indptr;         // [batch + 1]
  const int32_t* kv_last_page_len;  // [batch]
  int32_t* seq_lens;                // [batch]
  uint32_t batch;
  int32_t page_size;
};

// seq_lens[b] = (pages - 1) * page_size + last_page_len, 0 without pages. One thread a request; grid = batch / kThreads.
template <class Config>
FI_DEVICE void page_seq_lens(const SeqLensParams& params) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const uint32_t request = blockIdx.x * Config::kThreads + threadIdx.x;
  if (request >= params.batch) return;
  const int32_t pages = params.kv_indptr[request + 1] - params.kv_indptr[request];
  params.seq_lens[request] = pages > 0 ? (pages - 1) * params.page_size + params.kv_last_page_len[request] : 0;
}

}  // namespace fi
