// RoPE of a Hugging Face configuration, in all the places where such files say it; private to lib/model.
#pragma once
#include <cstdint>
#include <span>
#include <string>

#include "core/rope.h"
#include "model/model_files_config.h"

namespace vqkv::model_files {

// rope_theta and the scaling stand at the top (files before transformers 5), in rope_scaling or in rope_parameters, and
// may stand in several: equal facts pass, contradictions are kBadData naming both, and so is a kind that isn't default,
// linear, llama3 or yarn, wherever it stands.
RopeFacts rope_of(const Config& config, int head_dim, int64_t context_length);

// kBadData where the frequencies that a file stores (rotary_emb.inv_freq of files of 2023) are neither those of `rope`
// nor those before its scaling. `precision` is half the spacing of the stored type relative to a value of 1.
void check_stored_frequencies(const std::string& where, std::span<const float> stored, double precision,
                              const RopeFacts& rope);

}  // namespace vqkv::model_files
