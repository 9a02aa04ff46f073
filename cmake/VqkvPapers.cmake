# The tables of papers, data/papers/*.yaml, are part of the experiment layer: tools find them wherever they are installed.
file(GLOB papers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/data/papers/*.yaml)
set(paper_files ${PROJECT_BINARY_DIR}/generated/vqkv_paper_files.cpp)
add_custom_command(OUTPUT ${paper_files}
  COMMAND ${CMAKE_COMMAND} -DOUT=${paper_files} "-DFILES=${papers}" -P ${PROJECT_SOURCE_DIR}/cmake/paper_files.cmake
  DEPENDS ${papers} ${PROJECT_SOURCE_DIR}/cmake/paper_files.cmake
  COMMENT "" VERBATIM)
target_sources(vqkv_experiment PRIVATE ${paper_files})
