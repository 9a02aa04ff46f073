// Runs the cells of a plan that a store lacks. Running again is resuming.
#pragma once
#include <functional>
#include <string>

#include "codec/codec_set.h"
#include "experiment/plan.h"
#include "io/trace.h"

namespace vqkv {

struct RunOptions {
  std::string folder;
  std::string writer = "main";  // results/<writer>.jsonl; one run a name at a time
  int shard = 0, shards = 1;    // cells with index % shards == shard
  int jobs = 1;                 // cells at once, each on one thread; 1: one cell on all threads
  double time_budget = 0;       // seconds after which no new cell is taken; 0: none
  bool retry_failed = false;
  bool fail_fast = false;    // the first failed cell ends the run
  bool keep_codecs = false;  // FOLDER/codecs/<train_id>.codec.h5, which export and a later run read instead of training
  bool trust_trace = false;  // skip open_verified_trace; rows are flagged "trusted-trace"
  std::string command;       // for provenance
  std::function<bool()> stop;  // asked between layers and codecs: drop what is unfinished and return
};

inline constexpr size_t kTrainingsKept = 4;  // codec sets in memory for cells that share them, or one a job

struct RunSummary {
  int64_t ok = 0, failed = 0, skipped = 0;  // by this run
  int64_t before = 0;                       // already in the store
  int64_t left = 0;                         // of this shard, still to do
  bool out_of_time = false;
};

// FOLDER gets plan.jsonl (a store of another plan is refused, kUsage, with the difference), results/. A trace whose
// values are no longer those it was written with is refused (kBadData) before any cell runs.
RunSummary run_plan(const Plan& plan, const RunOptions& options);

// "2/8", or "auto": SLURM_ARRAY_TASK_ID and _COUNT (counted from _MIN), else SLURM_PROCID and SLURM_NTASKS, else
// OMPI_COMM_WORLD_RANK and _SIZE, else PMI_RANK and PMI_SIZE. Counted from 0; kUsage when out of range or not there.
void parse_shard(const std::string& text, int& shard, int& shards);

// The codecs of a cell: those that a run kept in `folder`, else (or with no folder) trained again on its trace, which
// gives the same bits. Null when `stop` said so.
std::shared_ptr<const CodecSet> codecs_of_cell(const Json& cell, const std::function<bool()>& stop,
                                               const std::string& folder = "");

// Trains and measures the first layer of a cell, for an estimate of its time: the reason if the cell fails there, as
// its record would give it, else "". Nothing is kept.
std::string run_first_layer(const Json& cell, const TraceReader& reader, const std::function<bool()>& stop);

// " codec.bits=4 seed=1": the values of a cell on the axes of its sweep, each behind a space.
std::string axes_text(const Json& cell);

// A record without what differs between two runs of the same cell: times, provenance, attempt.
Json comparable(Json record);

}  // namespace vqkv
