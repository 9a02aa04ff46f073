#include "codec/query_form.h"

#include <algorithm>
#include <cmath>

#include "core/dtype.h"
#include "core/error.h"

namespace vqkv {
namespace {

void multiply(float* x, const std::vector<float>& factor) {
  for (size_t c = 0; c < factor.size(); ++c) x[c] *= factor[c];
}

}  // namespace

CodedQueries::CodedQueries(const DecodePlan& plan, int head, int head_dim) : form_(plan.query), head_dim_(head_dim) {
  if (exact()) return;
  MapSlice part = columns_of(plan.map, plan.code_channels, head * head_dim, head_dim);
  VQKV_CHECK(part.row == head * head_dim && part.rows == head_dim);
  if (auto* hadamard = std::get_if<HadamardMap>(&part.map)) {
    block_ = hadamard->block;
    before_ = std::move(hadamard->before);
    after_ = std::move(hadamard->after);
  } else {
    VQKV_CHECK(is_identity(part.map));
  }
}

void CodedQueries::in_codes(const float* q, float* y) const {
  VQKV_CHECK(!exact());
  std::copy_n(q, head_dim_, y);
  multiply(y, after_);
  for (int c = 0; block_ > 1 && c < head_dim_; c += block_) walsh_hadamard(y + c, block_);
  multiply(y, before_);
  round_q8_0(y, head_dim_);
}

void CodedQueries::in_keys(const float* q, float* x) const {
  in_codes(q, x);
  multiply(x, before_);
  for (int c = 0; block_ > 1 && c < head_dim_; c += block_) walsh_hadamard(x + c, block_);
  multiply(x, after_);
}

void round_q8_0(float* x, int n) {
  constexpr int kBlock = 32;
  VQKV_CHECK(n % kBlock == 0);
  for (float* end = x + n; x < end; x += kBlock) {
    float most = 0;
    for (int i = 0; i < kBlock; ++i) most = std::max(most, std::abs(x[i]));
    const float d = most / 127.0f, inverse = d > 0 ? 1.0f / d : 0.0f;
    const float factor = std::isfinite(inverse) ? inverse : 0.0f, scale = round_to_f16(d);
    for (int i = 0; i < kBlock; ++i) x[i] = std::round(x[i] * factor) * scale;
  }
}

}  // namespace vqkv
