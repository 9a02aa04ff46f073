// `*.codec.h5`: a frozen codec set. Every kept file of a released version must load forever: docs/formats.md.
#pragma once
#include <string>

#include "codec/codec_set.h"

namespace vqkv {

inline constexpr char kCodecFormat[] = "vqkv-codec";
inline constexpr int64_t kCodecOldest = 1, kCodecVersion = 1;

// Each unit's specification, training report and parameters; a codec that units share is stored once. `facts` is the
// caller's: provenance, the cell it came from, and under "cache" the canonical `cache:` section that it was chosen
// with.
void save_codec_set(const CodecSet& set, const std::string& path, const Json& facts = Json::object());

// kBadData, with path and place, for whatever is damaged, unknown to this build, or contradicts itself. Codecs come
// back with the same bits: they code and decode as they did. Whether they fit a model is the caller's question
// (model_hash(), shape()). `facts`, where given, receives what save_codec_set was told.
CodecSet load_codec_set(const std::string& path, Json* facts = nullptr);

// Its content hash, which names the file in others.
std::string codec_archive_hash(const std::string& path);

Json cache_shape_to_json(const CacheShape& shape);
CacheShape cache_shape_from_json(const Json& j, const std::string& where);  // kBadData

}  // namespace vqkv
