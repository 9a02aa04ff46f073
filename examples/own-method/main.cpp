// vqkv's own tools, with lloyd beside the built-in methods.
#include "common/tools.h"
#include "lloyd.h"

int main(int argc, char** argv) { return vqkv::TOOL_MAIN(argc, argv, {&lloyd::vqkv_method_lloyd()}); }
