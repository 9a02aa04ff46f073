# core/version.cpp reads generated/vqkv_revision.h, rewritten only when the revision changes.
file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/generated)
add_custom_target(vqkv_revision
  COMMAND ${CMAKE_COMMAND} -DSOURCE=${PROJECT_SOURCE_DIR} -DOUT=${PROJECT_BINARY_DIR}/generated/vqkv_revision.h
          -DVERSION=${PROJECT_VERSION} -DBUILD=${CMAKE_BUILD_TYPE} -P ${PROJECT_SOURCE_DIR}/cmake/revision.cmake
  BYPRODUCTS ${PROJECT_BINARY_DIR}/generated/vqkv_revision.h
  COMMENT "" VERBATIM)
