// Writing a trace and reading it back: every value, every fact.
#include "core/error.h"
#include "core/thread_pool.h"
#include "io/atomic_file.h"
#include "io/hdf5.h"
#include "support/catch.h"
#include "support/nearest_even.h"
#include "trace_fixture.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <thread>

using namespace vqkv;

namespace {
float rounded(DType t, float v) {
  round_to(t, &v, 1);
  return v;
}
bool same_bits(const Matrix<float>& a, const Matrix<float>& b) {
  return a.rows == b.rows && a.cols == b.cols && std::memcmp(a.data(), b.data(), a.storage.size() * 4) == 0;
}
// Head h of the rows, rounded to what the file can hold.
Matrix<float> head_of(const Matrix<float>& rows, int h, int d, DType t) {
  Matrix<float> out(rows.rows, d);
  for (int64_t r = 0; r < rows.rows; ++r)
    for (int c = 0; c < d; ++c) out(r, c) = rounded(t, rows(r, h * d + c));
  return out;
}
}  // namespace

TEST_CASE("a trace reads back bit for bit in bf16, f16 and f32", "[trace]") {
  const TempDir dir("trace");
  for (const DType stored : {DType::kBF16, DType::kF16, DType::kF32}) {
    const std::string path = dir / (std::string(dtype_name(stored)) + ".trace.h5");
    const WrittenTrace in = write_trace(path, stored);
    REQUIRE_FALSE(std::filesystem::exists(path + ".partial"));
    const TraceReader out(path);
    const CacheShape& s = out.info().shape;
    REQUIRE(out.tokens() == 3224);
    REQUIRE(out.queries() == 9);
    REQUIRE(out.info().stored == stored);
    REQUIRE(out.info().keys_pre_rope);
    REQUIRE(out.info().hidden == 10);
    REQUIRE(out.info().model_name == "random");
    REQUIRE(out.info().model == in.info.model);
    REQUIRE(out.info().provenance == in.info.provenance);
    REQUIRE(out.info().layer_index == std::vector<int32_t>{0, 1});
    REQUIRE(s.score_scale == in.info.shape.score_scale);
    REQUIRE(s.rope.inverse_frequency == in.info.shape.rope.inverse_frequency);
    REQUIRE(out.documents().size() == 2);
    REQUIRE(out.documents()[0].name == "first.txt");
    REQUIRE(out.documents()[0].tokens == 2200);
    REQUIRE(out.documents()[1].tokens == 1024);
    REQUIRE(out.query_token() == std::vector<int32_t>{0, 16, 1499, 1503, 2199, 2200, 2201, 2202, 3223});
    REQUIRE(out.moment_count(0) == 4400);  // two query heads a KV head
    REQUIRE(out.windows().size() == 3);
    for (size_t w = 0; w < 3; ++w) {
      const TraceWindow& window = out.windows()[w];
      const TraceWindowData& want = in.windows[w];
      REQUIRE(window.document == want.document);
      REQUIRE(window.tokens == static_cast<int64_t>(want.token_id.size()));
      REQUIRE(window.queries == static_cast<int64_t>(want.query_token.size()));
      for (int64_t t = 0; t < window.tokens; ++t) {
        REQUIRE(out.token_id()[static_cast<size_t>(window.first_token + t)] == want.token_id[static_cast<size_t>(t)]);
        REQUIRE(out.position()[static_cast<size_t>(window.first_token + t)] == t);
        REQUIRE(out.document_of()[static_cast<size_t>(window.first_token + t)] == want.document);
      }
      for (int l = 0; l < s.layers; ++l) {
        const size_t li = static_cast<size_t>(l);
        for (int h = 0; h < s.kv_heads; ++h) {
          Matrix<float> k(window.tokens, s.head_dim), v(window.tokens, s.head_dim);
          out.key(l, h, window.first_token, window.tokens, k);
          out.value(l, h, window.first_token, window.tokens, v);
          REQUIRE(same_bits(k, head_of(want.key[li], h, s.head_dim, stored)));
          REQUIRE(same_bits(v, head_of(want.value[li], h, s.head_dim, stored)));
          const auto mass = out.received_mass(l, h, window.first_token, window.tokens);
          const auto mass2 = out.received_mass2(l, h, window.first_token, window.tokens);
          for (int64_t t = 0; t < window.tokens; ++t) {
            const size_t at = static_cast<size_t>(h * window.tokens + t);
            REQUIRE(mass[static_cast<size_t>(t)] == want.received_mass[li][at]);
            REQUIRE(mass2[static_cast<size_t>(t)] == want.received_mass2[li][at]);
          }
        }
        for (int h = 0; h < s.q_heads; ++h) {
          Matrix<float> q(window.queries, s.head_dim);
          out.query(l, h, window.first_query, window.queries, q);
          REQUIRE(same_bits(q, head_of(want.query[li], h, s.head_dim, stored)));
        }
      }
    }
    for (int l = 0; l < s.layers; ++l) {
      const Matrix<float> w = out.output_weight(l);
      for (int64_t r = 0; r < w.rows; ++r)
        for (int64_t c = 0; c < w.cols; ++c)
          REQUIRE(w(r, c) == rounded(stored, in.output_weight[static_cast<size_t>(l)](r, c)));
      for (int h = 0; h < s.kv_heads; ++h) {
        // Document 0 sums its two windows.
        const Matrix<double> m = out.query_moment(l, h, 0);
        const auto pairs = out.query_pair_moment(l, h, 1);
        const size_t d = static_cast<size_t>(s.head_dim), first = static_cast<size_t>(h) * d * d;
        for (size_t i = 0; i < d * d; ++i)
          REQUIRE(m.storage[i] == in.windows[0].query_moment[static_cast<size_t>(l)][first + i] +
                                      in.windows[1].query_moment[static_cast<size_t>(l)][first + i]);
        for (size_t i = 0; i < d / 2; ++i)
          REQUIRE(pairs[i] ==
                  in.windows[2].query_pair_moment[static_cast<size_t>(l)][static_cast<size_t>(h) * d / 2 + i]);
      }
    }
    REQUIRE(out.verify().empty());
  }
}

TEST_CASE("bf16 in a trace is the nearest to every half, ties to even", "[trace]") {
  // HDF5 itself would round ties away from zero: it must never convert.
  const TempDir dir("trace-bf16");
  std::vector<float> halves;
  for (uint32_t i = 0; i < 65536; ++i)
    if (const float v = to_float(f16{static_cast<uint16_t>(i)}); std::isfinite(v)) halves.push_back(v);
  REQUIRE(halves.size() == 63488);
  const TraceInfo info = trace_info(DType::kBF16, 0, 1, 1, 1, 8);
  const int64_t tokens = 63488 / 8;
  TraceWindowData window = trace_window(info, 0, tokens, {0}, 1);
  window.key[0].storage.assign(halves.begin(), halves.end());
  window.value[0].storage.assign(halves.begin(), halves.end());
  TraceWriter writer(dir / "t.h5", info, {"a"}, tokens, 1);
  writer.add(window);
  writer.finish();
  std::vector<uint16_t> raw(halves.size());
  const Hdf5File file = Hdf5File::open(dir / "t.h5");
  for (const char* name : {"/key", "/value"}) {
    file.open_dataset(name).read_all(raw.data());
    for (size_t i = 0; i < raw.size(); ++i) REQUIRE(raw[i] == test::nearest_even_bf16(halves[i]));
  }
}

TEST_CASE("rows can be read from any place into a strided buffer", "[trace]") {
  const TempDir dir("trace-rows");
  for (const DType stored : {DType::kBF16, DType::kF32}) {
    const std::string path = dir / "t.h5";
    const WrittenTrace in = write_trace(path, stored);
    const TraceReader out(path);
    Matrix<float> wide(1000, 20, -1.0f);
    out.key(1, 1, 700, 1000, wide.view().slice_cols(4, 8));  // spans a chunk and a window
    for (int64_t r = 0; r < 1000; ++r) {
      const bool second = r + 700 >= 1500;
      const Matrix<float>& rows = in.windows[second ? 1 : 0].key[1];
      for (int c = 0; c < 8; ++c) REQUIRE(wide(r, 4 + c) == rounded(stored, rows(second ? r - 800 : r + 700, 8 + c)));
      REQUIRE(wide(r, 3) == -1.0f);
      REQUIRE(wide(r, 12) == -1.0f);
    }
  }
}

TEST_CASE("the content hash is of values: capacity, time and threads don't change it", "[trace]") {
  const TempDir dir("trace-hash");
  const auto hash_of = [&](DType stored, int64_t spare) {
    write_trace(dir / "t.h5", stored, 10, spare);
    return TraceReader(dir / "t.h5").info().content_hash;
  };
  set_thread_count(1);
  const std::string one = hash_of(DType::kBF16, 2000);
  set_thread_count(2);
  REQUIRE(hash_of(DType::kBF16, 0) == one);
  REQUIRE(hash_of(DType::kF16, 0) != one);
  REQUIRE(one.size() == 32);
}

TEST_CASE("a trace without W_O says so", "[trace]") {
  const TempDir dir("trace-no-wo");
  write_trace(dir / "t.h5", DType::kBF16, 0);
  const TraceReader out(dir / "t.h5");
  REQUIRE_FALSE(out.has_output_weight());
  REQUIRE(out.verify().empty());
}

TEST_CASE("types of tokens in a trace read back and are part of the hash, without them every token is text",
          "[trace]") {
  const TempDir dir("trace-token-types");
  TraceInfo info = trace_info(DType::kF32, 0);
  std::vector<std::string> hashes;
  for (const std::vector<std::string>& types : {std::vector<std::string>{}, {"text", "image"}, {"text", "video"}}) {
    info.token_types = types;
    const TraceWindowData a = trace_window(info, 0, 40, {1, 2}, 5), b = trace_window(info, 1, 30, {29}, 6);
    {
      TraceWriter writer(dir / "t.h5", info, {"a", "b"}, 200, 9);
      writer.add(a);
      writer.add(b);
      writer.finish();
    }
    const TraceReader out(dir / "t.h5");
    CHECK(out.info().token_types == types);
    std::vector<int32_t> all = a.token_type;
    all.insert(all.end(), b.token_type.begin(), b.token_type.end());
    CHECK(out.token_type() == all);
    CHECK(all.size() == (types.empty() ? 0 : 70));
    CHECK(out.verify().empty());
    hashes.push_back(out.info().content_hash);
  }
  CHECK(hashes[0] != hashes[1]);
  CHECK(hashes[1] != hashes[2]);
}

TEST_CASE("gradients in a trace read back in bf16 whatever the rest is stored as, and are part of the hash",
          "[trace]") {
  const TempDir dir("trace-gradients");
  for (const DType stored : {DType::kBF16, DType::kF16, DType::kF32}) {
    const std::string path = dir / "t.h5";
    write_trace(path, stored);
    const std::string without = TraceReader(path).info().content_hash;
    CHECK_FALSE(TraceReader(path).has_gradients());
    const WrittenTrace in = write_trace(path, stored, 10, 0, "sampled");
    const TraceReader out(path);
    REQUIRE(out.has_gradients());
    CHECK(out.info().gradients == "sampled");
    CHECK(out.info().content_hash != without);
    CHECK(out.verify().empty());
    const CacheShape& s = out.info().shape;
    for (const GradientOf of : kGradientsOf) {
      const auto part = static_cast<size_t>(of);
      for (int l = 0; l < s.layers; ++l)
        for (int h = 0; h < s.kv_heads; ++h) {
          const auto li = static_cast<size_t>(l);
          for (size_t w = 0; w < 3; ++w) {
            const TraceWindow& window = out.windows()[w];
            Matrix<float> square(window.tokens, s.head_dim);
            out.squared_gradient(of, l, h, window.first_token, window.tokens, square);
            REQUIRE(same_bits(square, head_of(in.windows[w].squared_gradient[part][li], h, s.head_dim, DType::kBF16)));
          }
          const Matrix<double> m = out.gradient_moment(of, l, h, 0);
          const size_t d = static_cast<size_t>(s.head_dim), first = static_cast<size_t>(h) * d * d;
          for (size_t i = 0; i < d * d; ++i)
            REQUIRE(m.storage[i] == in.windows[0].gradient_moment[part][li][first + i] +
                                        in.windows[1].gradient_moment[part][li][first + i]);
        }
    }
    const auto size = static_cast<int64_t>(std::filesystem::file_size(path));
    CHECK(size <= TraceWriter::estimate_bytes(in.info, 3224, 9, 2));
    CHECK(size > TraceWriter::estimate_bytes(trace_info(stored), 3224, 9, 2));
  }
}

TEST_CASE("squares of gradients that are no squares are refused with their place", "[trace]") {
  const TempDir dir("trace-gradients-nan");
  TraceInfo info = trace_info(DType::kF32, 0);
  info.gradients = "next-token";
  TraceWindowData w = trace_window(info, 0, 40, {1, 2}, 5);
  w.squared_gradient[1][1](17, 8 + 3) = -1;
  {
    TraceWriter writer(dir / "t.h5", info, {"a"}, 40, 4);
    writer.add(w);
    writer.finish();
  }
  const TraceReader out(dir / "t.h5");
  Matrix<float> rows(20, 8);
  out.squared_gradient(GradientOf::kRotatedKey, 1, 0, 10, 20, rows);
  REQUIRE_THROWS_WITH(
      out.squared_gradient(GradientOf::kRotatedKey, 1, 1, 10, 20, rows),
      Catch::Contains("/rotated_key_gradient2") && Catch::Contains("layer 1, head 1, row 17, channel 3 holds -1"));
  w.squared_gradient[2][0](5, 1) = INFINITY;
  TraceWriter writer(dir / "u.h5", info, {"a"}, 40, 4);
  REQUIRE_THROWS_WITH(writer.add(w), Catch::Contains("/value_gradient2 at layer 0, head 0, row 5, channel 1 is inf"));
}

TEST_CASE("the estimate is what the file takes, within its headers", "[trace]") {
  const TempDir dir("trace-estimate");
  write_trace(dir / "t.h5", DType::kBF16, 10, 0);
  const auto size = static_cast<int64_t>(std::filesystem::file_size(dir / "t.h5"));
  const int64_t estimate = TraceWriter::estimate_bytes(trace_info(DType::kBF16), 3224, 9, 2);
  INFO("file " << size << ", estimate " << estimate);
  REQUIRE(size <= estimate);
  REQUIRE(size >= estimate - (512 << 10));
}

TEST_CASE("a reader serves several threads", "[trace]") {
  const TempDir dir("trace-threads");
  write_trace(dir / "t.h5", DType::kBF16);
  const TraceReader out(dir / "t.h5");
  Matrix<float> want(3224, 8);
  out.key(0, 1, 0, 3224, want);
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        Matrix<float> got(3224, 8);
        out.key(0, 1, 0, 3224, got);
        wrong[static_cast<size_t>(i)] += !same_bits(got, want);
      }
    });
  for (auto& t : threads) t.join();
  for (const int w : wrong) REQUIRE(w == 0);
}

TEST_CASE("values that a trace can't hold are refused with their place", "[trace]") {
  const TempDir dir("trace-nan");
  const auto attempt = [&](DType stored, float value) {
    const TraceInfo info = trace_info(stored, 0);
    std::string message;
    {
      TraceWriter writer(dir / "t.h5", info, {"a"}, 40, 4);
      TraceWindowData w = trace_window(info, 0, 40, {1, 2}, 5);
      w.key[1](17, 8 + 3) = value;
      try {
        writer.add(w);
      } catch (const Error& e) {
        REQUIRE(e.kind() == ErrorKind::kBadData);
        message = e.what();
      }
    }
    REQUIRE(std::filesystem::is_empty(dir.path));
    return message;
  };
  for (const DType stored : {DType::kBF16, DType::kF16, DType::kF32})
    REQUIRE_THAT(attempt(stored, NAN), Catch::Contains("/key at layer 1, head 1, row 17, channel 3 is nan"));
  REQUIRE_THAT(attempt(DType::kF16, 70000.0f), Catch::Contains("too large for f16"));
  REQUIRE(attempt(DType::kBF16, 70000.0f).empty());
}

TEST_CASE("two writers of one trace: the second is refused, the first finishes", "[trace]") {
  const TempDir dir("trace-two");
  const TraceInfo info = trace_info(DType::kBF16, 0);
  TraceWriter first(dir / "t.h5", info, {"a"}, 40, 4);
  try {
    TraceWriter second(dir / "t.h5", info, {"a"}, 40, 4);
    FAIL("a second writer was let in");
  } catch (const Error& e) {
    REQUIRE(e.kind() == ErrorKind::kBadData);
    REQUIRE_THAT(e.what(), Catch::Contains("t.h5"));
  }
  first.add(trace_window(info, 0, 40, {1, 2}, 5));
  first.finish();
  REQUIRE(TraceReader(dir / "t.h5").tokens() == 40);
}
