// rvq, kumar, simvq and commvq: golden facts of the papers and what must hold for every trained table.
#include <array>
#include <cmath>
#include <vector>

#include "codec/train/simvq.h"
#include "codec/vq_support.h"
#include "core/thread_pool.h"
#include "support/catch.h"

using namespace vqkv;
using namespace vqkv::test;

namespace {

double bits_a_value(const std::string& method, const Json& knobs, const UnitShape& unit) {
  const auto codec = find_method(method).make(knobs, unit);
  return codec->layout().bits_per_token() / unit.channels();
}

const std::vector<std::pair<std::string, Json>>& small_configurations() {
  static const std::vector<std::pair<std::string, Json>> all = {
      {"pq", {{"codebooks", 4}, {"bits", 5}, {"iterations", 8}}},
      {"rvq", {{"codebooks", 3}, {"bits", 5}, {"iterations", 8}}},
      {"rvq", {{"codebooks", 2}, {"bits", 5}, {"group", 8}, {"grouping", "strided"}, {"iterations", 8}}},
      {"kumar", {{"codebooks", 3}, {"bits", 5}, {"group", 8}, {"ema_steps", 5}, {"ema_batch", 512}}},
      {"simvq", {{"codebooks", 3}, {"bits", 5}, {"rounds", 10}}},
      {"commvq", {{"codebooks", 3}, {"bits", 4}, {"steps", 4}, {"points", 1000}, {"start_points", 100}}},
      {"simvq", {{"codebooks", 3}, {"bits", 5}, {"trainer", "sgd"}, {"steps", 5}, {"batch", 512}}}};
  return all;
}

}  // namespace

TEST_CASE("published rates follow from the knobs", "[vq]") {
  // VQKV: 1 - (N_k log2 S_k + N_v log2 S_v) / (16 * 256) is 0.828125 and, with 10 x 65536 values, 0.82421875.
  const Json keys = {{"codebooks", 56}, {"bits", 10}};
  const double k = bits_a_value("simvq", keys, unit_of(128)),
               v = bits_a_value("simvq", {{"codebooks", 16}, {"bits", 9}}, unit_of(128));
  CHECK(k == 4.375);
  CHECK(v == 1.125);
  CHECK(1 - (k + v) / 32 == 0.828125);
  CHECK(1 - (k + bits_a_value("simvq", {{"codebooks", 10}, {"bits", 16}}, unit_of(128))) / 32 == 0.82421875);
  // Effective bits with 1028 exact tokens.
  const std::array<std::pair<double, double>, 3> effective = {{{8192, 4.413}, {32768, 3.166}, {131072, 2.854}}};
  for (const auto& [n, bits] : effective)
    CHECK(((n - 1028) * (k + v) / 2 + 1028 * 16) / n == Approx(bits).margin(6e-4));
  // At head_dim 64 half the stages keep the rate.
  CHECK(bits_a_value("simvq", {{"codebooks", 28}, {"bits", 10}}, unit_of(64)) == 4.375);
  CHECK(bits_a_value("simvq", {{"codebooks", 8}, {"bits", 9}}, unit_of(64)) == 1.125);
  // Kumar: 16 / (8 * 11 / 32 + 16 / 128) = 5.565.
  CHECK(16 / bits_a_value("kumar", Json::object(), unit_of(128)) == Approx(5.565).margin(5e-4));
  CHECK(bits_a_value("kumar", Json::object(), unit_of(64)) == 3.0);
  CHECK(bits_a_value("kumar", {{"scale_type", "f8e5m2"}}, unit_of(64)) == 2.875);
}

TEST_CASE("a prefix of greedy stages is the code of fewer stages", "[vq]") {
  const auto unit = unit_of(16);
  const auto x = gaussian(3000, 16, 1), test = gaussian(300, 16, 2);
  for (const std::string method : {"rvq", "simvq"}) {
    Json knobs = {{"codebooks", 5}, {"bits", 5}, {"encoding", "greedy"}};
    if (method == "rvq") knobs["refine"] = 0;
    const auto whole = trained(method, knobs, unit, x);
    double last = 2;
    for (int s = 1; s <= 5; ++s) {
      knobs["codebooks"] = s;
      const double shorter = round_trip_mse(*trained(method, knobs, unit, x), test);
      CHECK(round_trip_mse(*whole, test, s - 1) == shorter);
      CHECK(shorter < last);
      last = shorter;
    }
    CHECK(round_trip_mse(*whole, test) == last);
    CHECK(whole->levels() == 5);
  }
}

TEST_CASE("codebooks that can hold every vector lose nothing but storage rounding", "[vq]") {
  const auto unit = unit_of(16);
  auto x = gaussian(40, 16, 3);
  for (auto& v : x.storage) v = round_to_f16(v);
  CHECK(round_trip_mse(*trained("rvq", {{"codebooks", 1}, {"bits", 6}}, unit, x), x) == 0.0);
  CHECK(round_trip_mse(*trained("rvq", {{"codebooks", 2}, {"bits", 6}, {"stored_as", "f32"}}, unit, x), x) == 0.0);
  // Kumar's scale is divided and multiplied in fp32, and its averages move lossless books by rounding alone.
  CHECK(round_trip_mse(*trained("kumar", {{"codebooks", 2}, {"bits", 7}, {"group", 8}, {"stored_as", "f32"}}, unit, x),
                       x) < 1e-10);
}

TEST_CASE("kumar: strided keys, contiguous values, one set of books, unbiased scale", "[vq]") {
  const Json knobs = {{"codebooks", 2}, {"bits", 4}, {"group", 8}, {"ema_steps", 3}};
  const auto x = gaussian(800, 32, 4);
  for (const Role role : {Role::kKey, Role::kValue}) {
    const auto codec = trained("kumar", knobs, unit_of(16, 2, role), x);
    const DecodePlan plan = codec->plan();
    const auto& term = std::get<TableTerm>(plan.terms.at(0));
    CHECK(term.slots == 8);
    CHECK(term.books == 2);
    CHECK(term.book_of_slot == std::vector<int32_t>{0, 0, 0, 0, 1, 1, 1, 1});
    CHECK(term.channel[8] == 8);    // in both: every second of x_0, y_0, x_1, ... are all y, which lie together here
    CHECK(term.channel[16] == 16);  // third group: the second head
    CHECK(plan.token_scale_side == 0);
    CHECK(codec->constant_bytes() == 2 * 16 * 8 * 2);
  }
  // Four groups a head: the authors' models interleave RoPE's pairs, so a group has x or y of every second pair.
  const auto channels = [&](const Json& grouping, Role role) {
    Json four = knobs;
    four["grouping"] = grouping;
    return std::get<TableTerm>(trained("kumar", four, unit_of(32, 1, role), x)->plan().terms.at(0)).channel;
  };
  const auto published = channels("published", Role::kKey), strided = channels("strided", Role::kKey);
  CHECK(std::vector(published.begin(), published.begin() + 32) ==
        std::vector<int32_t>{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                             1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
  CHECK(std::vector(strided.begin(), strided.begin() + 8) == std::vector<int32_t>{0, 4, 8, 12, 16, 20, 24, 28});
  CHECK(channels("published", Role::kValue) == channels("contiguous", Role::kKey));

  const auto codec = trained("kumar", knobs, unit_of(16, 2), x);
  Matrix<float> two(2, 32, 3.0f);  // a constant head has no deviation: scale 1
  for (int64_t c = 0; c < 16; ++c) two(1, c) = static_cast<float>(c);
  CodeBlock block;
  codec->encode(two, block);
  CHECK(block.sides[0][0] == 1.0f);
  CHECK(block.sides[0][2] == round_to_f16(std::sqrt(68.0f * 5 / 15)));  // sum of squares 340, 15 degrees of freedom
  CHECK(block.sides[0][3] == 1.0f);
}

TEST_CASE("kumar's moving averages approach the mean of what a codeword codes", "[vq]") {
  // A skewed sample for the start, then averages over everything: the error must come down.
  const auto x = gaussian(6000, 16, 5);
  const Json base = {{"codebooks", 2},  {"bits", 6},         {"group", 16},     {"points", 1},
                     {"iterations", 1}, {"ema_batch", 4096}, {"ema_decay", 0.9}};
  Json start = base, moved = base;
  start["ema_steps"] = 0;
  moved["ema_steps"] = 40;
  const auto unit = unit_of(16);
  const double before = round_trip_mse(*trained("kumar", start, unit, x), x),
               after = round_trip_mse(*trained("kumar", moved, unit, x), x);
  INFO(before << " " << after);
  CHECK(after < 0.8 * before);
}

TEST_CASE("simvq: the frozen codebook has variance 1 / width and the layer explains the codewords", "[vq]") {
  const auto base = simvq_base(0x0123456789abcdef, 1024, 64);
  double sum = 0, square = 0;
  for (const float v : base.storage) {
    sum += v;
    square += double{v} * v;
  }
  CHECK(sum / 65536 == Approx(0.0).margin(2e-3));
  CHECK(square / 65536 == Approx(1.0 / 64).epsilon(0.02));
  CHECK(simvq_base(0x0123456789abcdef, 4, 64)(3, 5) ==
        base(3, 5));  // a prefix of the entries is a prefix of the stream

  SimVqOptions options;
  options.stages = 2;
  options.entries = 64;
  options.stored_as = DType::kF32;
  const auto t = train_simvq(gaussian(3000, 16, 6), {}, options, Rng(1));
  for (size_t i = 0; i < 2; ++i) {
    CHECK(t.quantizer.books()[i].storage == simvq_codewords(t.stages[i], 64).storage);
    CHECK(t.stages[i].seed == Rng(1).split(1 + i).key());
  }
  CHECK(t.curve.size() == 2);
  CHECK(t.curve[1] < t.curve[0]);
}

TEST_CASE("simvq by least squares comes near k-means, and descent improves on its start", "[vq]") {
  const auto unit = unit_of(16);
  const auto x = gaussian(16000, 16, 7), test = gaussian(2000, 16, 8);
  const Json shape = {{"codebooks", 4}, {"bits", 6}, {"encoding", "greedy"}};
  Json kmeans = shape, als = shape, sgd = shape, untrained = shape;
  kmeans["refine"] = 0;
  als["points"] = 1000;
  sgd.update({{"trainer", "sgd"}, {"steps", 60}, {"batch", 8192}, {"learning_rate", 0.02}, {"points", 1000}});
  untrained.update({{"trainer", "sgd"}, {"steps", 1}, {"batch", 8192}, {"learning_rate", 1e-6}, {"points", 1000}});
  const double k = round_trip_mse(*trained("rvq", kmeans, unit, x), test),
               a = round_trip_mse(*trained("simvq", als, unit, x), test);
  const double s = round_trip_mse(*trained("simvq", sgd, unit, x), test),
               u = round_trip_mse(*trained("simvq", untrained, unit, x), test);
  INFO("k-means " << k << " als " << a << " sgd " << s << " start " << u);
  CHECK(a < 1.15 * k);
  CHECK(a > 0.9 * k);
  CHECK(s < u);
}

TEST_CASE("beam search lowers the error of rvq and simvq without another format", "[vq]") {
  const auto unit = unit_of(16);
  const auto x = gaussian(8000, 16, 9), test = gaussian(1000, 16, 10);
  for (const std::string method : {"rvq", "simvq"}) {
    Json knobs = {{"codebooks", 4}, {"bits", 6}, {"encoding", "greedy"}};
    if (method == "rvq") knobs["refine"] = 0;
    const auto greedy = trained(method, knobs, unit, x);
    knobs["encoding"] = "beam";
    knobs["beam"] = 4;
    const auto beam = trained(method, knobs, unit, x);
    CHECK(beam->layout().code_bits_per_block() == greedy->layout().code_bits_per_block());
    CHECK(round_trip_mse(*beam, test) < 0.92 * round_trip_mse(*greedy, test));
  }
}

TEST_CASE("trained methods: the same books and codes at 1 and 2 threads and after storage", "[vq]") {
  const auto unit = unit_of(16);
  const auto x = gaussian(1500, 16, 11);
  for (const auto& [method, knobs] : small_configurations()) {
    INFO(method << " " << knobs.dump());
    const int before = thread_count();
    set_thread_count(1);
    const auto one = trained(method, knobs, unit, x);
    CodeBlock a, b, c;
    one->encode(x, a);
    set_thread_count(2);
    const auto two = trained(method, knobs, unit, x);
    two->encode(x, b);
    set_thread_count(before);
    CHECK(a.fields == b.fields);
    CHECK(a.sides == b.sides);
    Archive first, second;
    one->save(first);
    two->save(second);
    CHECK(first.tensors == second.tensors);
    CHECK(first.json == second.json);

    const auto loaded = find_method(method).make(knobs, unit);
    loaded->load(first);
    loaded->encode(x, c);
    CHECK(a.fields == c.fields);
    CHECK(a.sides == c.sides);
    Archive again;
    loaded->save(again);
    CHECK(again.tensors == first.tensors);
  }
}

TEST_CASE("trained methods survive one row, constant rows and huge rows", "[vq]") {
  const auto unit = unit_of(16);
  for (const auto& [method, knobs] : small_configurations()) {
    INFO(method << " " << knobs.dump());
    const auto one = gaussian(1, 16, 12);
    CHECK(std::isfinite(round_trip_mse(*trained(method, knobs, unit, one), one)));
    Matrix<float> same(300, 16, 2.5f);
    CHECK(round_trip_mse(*trained(method, knobs, unit, same), same) < 1e-6);
    Matrix<float> huge(300, 16, 1e30f);
    // Where rows are divided by what is stored beside their codes, they are never too large.
    if (method != "kumar" && method != "commvq") {
      CHECK_THROWS_WITH(trained(method, knobs, unit, huge), Catch::Contains("stored_as"));
    }
  }
}

TEST_CASE("what does not divide is refused with the reason", "[vq]") {
  const auto unit = unit_of(64);
  CHECK(find_method("rvq").check({{"group", 24}}, unit) == "sub-vectors of 24 channels don't divide 64");
  CHECK(find_method("rvq").check({{"group", 16}}, unit) == "");
  CHECK(find_method("kumar").check({{"group", 48}}, unit) == "groups of 48 channels don't divide a head of 64");
  CHECK(find_method("pq").check({{"codebooks", 48}}, unit) != "");
  CHECK_THROWS_AS(find_method("rvq").canonical({{"bits", 17}}, "codec"), Error);
}
