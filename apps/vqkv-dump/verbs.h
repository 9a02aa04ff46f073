// The verbs of vqkv-dump. command_line.cpp parses; each verb prints its result to stdout and returns an exit code.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common/device.h"
#include "common/table.h"
#include "core/rope.h"
#include "model/text_input.h"

namespace vqkv::dump {

struct CaptureVerb {
  std::string model, out, command;
  TextSources text;
  int64_t context = 2048, query_stride = 16, query_tail = 64;
  std::string dtype = "bf16";
  DeviceChoice device;
  std::string gradients;  // of what loss; none where empty
  bool output_weight = true, dry_run = false;
  TableFormat format = TableFormat::kMarkdown;
};

struct InspectVerb {
  std::string trace;
  int64_t max_tokens = 0;  // 0: all; the first ones otherwise
  TableFormat format = TableFormat::kMarkdown;
};

struct TokensVerb {
  std::string model;
  TextSources text;
  bool ids = false;  // plain ids, one line a document
  TableFormat format = TableFormat::kMarkdown;
};

std::string rope_text(const RopeFacts& rope);  // in one line

int run_capture(const CaptureVerb& v);
int run_inspect(const InspectVerb& v);
int run_verify(const std::string& trace, TableFormat format);
int run_model(const std::string& model, TableFormat format);
int run_tokens(const TokensVerb& v);

}  // namespace vqkv::dump
