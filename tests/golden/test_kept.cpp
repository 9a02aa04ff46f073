// Files of released formats: every one loads in every later release, and means what it meant. tests/golden/kept/v1
// holds format_version 1 of traces and codec archives as make_kept wrote it; a failure here is mended in the reader,
// never by making the files again.
#include <cmath>
#include <filesystem>

#include "codec/codec_archive.h"
#include "core/json.h"
#include "experiment/cost.h"
#include "golden/kept/kept_trace.h"
#include "io/atomic_file.h"
#include "support/catch.h"
#include "support/sweep_trace.h"

using namespace vqkv;

namespace {

const std::filesystem::path kFolder = VQKV_SOURCE_DIR "/tests/golden/kept/v1";

Json expected() {
  const std::string path = (kFolder / "expected.json").string();
  return parse_json(read_file(path), path);
}

}  // namespace

TEST_CASE("a version 1 trace loads, with the values it was written with", "[kept]") {
  const TraceReader trace((kFolder / "small.trace.h5").string());
  CHECK(trace.verify() == std::vector<std::string>{});
  CHECK(trace.info().content_hash == expected().at("content_xxh3").get<std::string>());
  CHECK(trace.info().content_hash == "f581b064e4493088278bf80412013e3b");
  const TraceInfo want = kept::info();
  CHECK(trace.info().stored == DType::kBF16);
  CHECK(trace.info().keys_pre_rope);
  CHECK(trace.info().model_name == "kept");
  CHECK(trace.info().model_hash == want.model_hash);
  CHECK(trace.info().layer_index == std::vector<int32_t>{5});
  CHECK(trace.info().hidden == 6);
  const CacheShape& shape = trace.info().shape;
  CHECK((shape.layers == 1 && shape.q_heads == 4 && shape.kv_heads == 2 && shape.head_dim == 16));
  CHECK(shape.score_scale == 0.25f);
  CHECK(shape.rope.inverse_frequency == want.shape.rope.inverse_frequency);
  REQUIRE(trace.documents().size() == 2);
  CHECK((trace.documents()[0].name == "first.txt" && trace.documents()[0].tokens == 64));
  CHECK((trace.documents()[1].name == "second.txt" && trace.documents()[1].tokens == 64));
  REQUIRE(trace.windows().size() == 3);
  CHECK((trace.windows()[1].document == 0 && trace.windows()[1].first_token == 40 && trace.windows()[1].tokens == 24 &&
         trace.windows()[1].first_query == 2 && trace.windows()[1].queries == 2));
  CHECK(trace.query_token() == std::vector<int32_t>{0, 39, 43, 63, 64, 95, 127});
  REQUIRE((trace.tokens() == 128 && trace.queries() == 7));
  CHECK((trace.token_id()[127] == 127 * 7 % 100 && trace.position()[63] == 23 && trace.document_of()[64] == 1));

  const auto check_rows = [&](kept::What what, int heads, int64_t rows, auto read) {
    Matrix<float> m(rows, 16);
    for (int h = 0; h < heads; ++h) {
      read(h, m);
      bool same = true;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < 16; ++c) same &= m(r, c) == kept::value_at(what, 0, h, r, c);
      INFO("dataset " << what << ", head " << h);
      CHECK(same);
    }
  };
  check_rows(kept::kKey, 2, 128, [&](int h, Matrix<float>& m) { trace.key(0, h, 0, 128, m); });
  check_rows(kept::kValue, 2, 128, [&](int h, Matrix<float>& m) { trace.value(0, h, 0, 128, m); });
  check_rows(kept::kQuery, 4, 7, [&](int h, Matrix<float>& m) { trace.query(0, h, 0, 7, m); });
  for (int d = 0; d < 2; ++d)
    for (int h = 0; h < 2; ++h) {
      const Matrix<double> moment = trace.query_moment(0, h, d);
      CHECK((moment(3, 3) == kept::moment_at(d, h, 3, 3) && moment(3, 4) == 0.125 && moment(3, 5) == 0));
      CHECK(trace.query_pair_moment(0, h, d)[7] == 7 + h);
    }
  CHECK(trace.moment_count(0) == 128);
  const float v = kept::value_at(kept::kMass, 0, 1, 100, 0);
  CHECK(trace.received_mass(0, 1, 100, 1) == std::vector<float>{v * v});
  CHECK(trace.received_mass2(0, 1, 100, 1) == std::vector<float>{v * v / 2});
  REQUIRE(trace.has_output_weight());
  const Matrix<float> output = trace.output_weight(0);
  CHECK((output.rows == 6 && output.cols == 64 && output(5, 63) == kept::value_at(kept::kOutputWeight, 0, 0, 5, 63)));
}

TEST_CASE("the content hash of a trace does not depend on the release that writes it", "[kept]") {
  const TestFolder dir;
  CHECK(kept::write_trace(dir / "now.trace.h5") == expected().at("content_xxh3").get<std::string>());
}

TEST_CASE("version 1 codec archives load, and their codes decode to what they meant", "[kept]") {
  const Json codecs = expected().at("codecs");
  for (const Method* method : all_methods()) {
    INFO(method->describe().name << ": build/release/tests/make_kept tests/golden/kept/v1 adds it");
    CHECK(codecs.contains(method->describe().name));
  }
  for (const auto& [name, units] : codecs.items()) {
    INFO(name);
    Json facts;
    const CodecSet set = load_codec_set((kFolder / (name + ".codec.h5")).string(), &facts);
    CHECK(facts == Json{{"made_by", "make_kept"}});
    CHECK(set.model_hash() == kept::info().model_hash);
    REQUIRE(set.units().size() == units.size());
    for (size_t i = 0; i < units.size(); ++i) {
      INFO("unit " << i);
      const TrainedUnit& u = set.units()[i];
      const Json& want = units[i];
      CHECK(u.spec.method == name);
      CHECK(role_name(u.spec.unit.role) == want.at("role").get<std::string>());
      CHECK(u.spec.unit.first_head == want.at("first_head").get<int>());
      CodeBlock code;
      code.blocks = want.at("blocks");
      want.at("fields").get_to(code.fields);
      want.at("sides").get_to(code.sides);
      for (const Json& e : want.value("overlay", Json::array())) code.overlay.push_back({e[0], e[1], e[2], e[3]});
      const Matrix<float> x = kept::rows_of(u);
      const auto state = kept::state_of(*u.codec, x);
      // Other codes of the same rows are another version of the method, and its number rises.
      if (want.value("version", 1) == find_method(name).describe().version) {
        CodeBlock now;
        u.codec->encode(x, now, state.get());
        CHECK(now.fields == code.fields);
        CHECK(now.sides == code.sides);
        CHECK(now.overlay == code.overlay);
      }
      Matrix<float> y(code.blocks * u.codec->layout().block_tokens, u.codec->channels());
      u.codec->decode(code, y, {.state = state.get()});
      // Not bit for bit: what a code decodes to is a sum, whose last bits depend on the processor.
      for (const auto& [key, row] : {std::pair("first_row", int64_t{0}), std::pair("last_row", y.rows - 1)}) {
        const auto values = want.at(key).get<std::vector<float>>();
        REQUIRE(static_cast<int64_t>(values.size()) == y.cols);
        float largest = 0, difference = 0;
        for (int64_t c = 0; c < y.cols; ++c) {
          const float v = values[static_cast<size_t>(c)];
          largest = std::max(largest, std::abs(v));
          difference = std::max(difference, std::abs(v - y(row, c)));
        }
        CHECK(largest > 0.1f);
        CHECK(difference <= 1e-5f * largest);
      }
    }
  }
}

TEST_CASE("what the kept codecs cost changes with the ledger's version alone", "[kept]") {
  const std::string path = (kFolder / "ledger.json").string();
  const Json ledger = parse_json(read_file(path), path);
  INFO("other bytes are another kLedgerVersion; build/release/tests/make_kept tests/golden/kept/v1 writes them down");
  REQUIRE(ledger.at("version") == kLedgerVersion);
  for (const auto& [name, want] : ledger.at("codecs").items()) {
    INFO(name);
    CHECK(kept::ledger_of(load_codec_set((kFolder / (name + ".codec.h5")).string())) == want);
  }
}
