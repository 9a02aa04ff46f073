// Of every tool; VQKV_TOOL_MAIN is its function.
#include "common/tools.h"

int main(int argc, char** argv) { return vqkv::VQKV_TOOL_MAIN(argc, argv); }
