# Every third-party library, found once. Debian 12 packages by default; nothing is downloaded.
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED)          # before faiss: its config names OpenMP::OpenMP_CXX without finding it
find_package(fmt REQUIRED)
find_package(nlohmann_json 3.11 REQUIRED)
find_package(OpenSSL REQUIRED COMPONENTS Crypto)   # SHA-256
find_package(PkgConfig REQUIRED)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
find_package(Eigen3 3.4 REQUIRED NO_MODULE)
find_package(faiss REQUIRED)
find_package(yaml-cpp REQUIRED)
if(NOT TARGET yaml-cpp::yaml-cpp)      # 0.7 exports the name without a namespace
  add_library(yaml-cpp::yaml-cpp INTERFACE IMPORTED)
  target_link_libraries(yaml-cpp::yaml-cpp INTERFACE yaml-cpp)
endif()
find_package(HDF5 REQUIRED COMPONENTS C HL)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(SENTENCEPIECE REQUIRED IMPORTED_TARGET sentencepiece)
pkg_check_modules(HWY REQUIRED IMPORTED_TARGET libhwy)
find_package(SQLite3 REQUIRED)
find_package(CLI11 REQUIRED)
# Debian's dnnl config asks for OpenCL headers that its CPU build does not need: find the library itself.
find_path(DNNL_INCLUDE_DIR oneapi/dnnl/dnnl.hpp REQUIRED)
find_library(DNNL_LIBRARY dnnl REQUIRED)
add_library(vqkv_dnnl INTERFACE IMPORTED)
target_include_directories(vqkv_dnnl SYSTEM INTERFACE ${DNNL_INCLUDE_DIR})
target_link_libraries(vqkv_dnnl INTERFACE ${DNNL_LIBRARY})
