# vqkv_layer(NAME PUBLIC layers... PRIVATE libraries...): one static library per folder of lib/.
#   Sources are the folder's own *.cpp, found by glob (methods and metrics register by one line in a .inc).
#   A file named *_avx2.cpp is compiled for x86-64-v3, *_avx512.cpp for x86-64-v4, *_vbmi.cpp adds VBMI, *_bf16.cpp adds AVX512-BF16,
#   *_amx.cpp AMX's tiles of bf16;
#   callers must ask core/cpu.h before they call into one. With VQKV_PORTABLE none of them is compiled.
function(vqkv_layer name)
  cmake_parse_arguments(A "" "" "PUBLIC;PRIVATE" ${ARGN})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${name}/*.cpp)
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${name}/*.h)
  list(FILTER sources EXCLUDE REGEX "_(device|cuda)\\.cpp$")   # cmake/VqkvKernels.cmake
  if(VQKV_PORTABLE)
    list(FILTER sources EXCLUDE REGEX "_(avx2|avx512|vbmi|bf16|amx)\\.cpp$")
  endif()
  if(sources)
    add_library(vqkv_${name} STATIC ${sources})
    set(scope PUBLIC)
    set(private PRIVATE)
  else()
    add_library(vqkv_${name} INTERFACE)
    set(scope INTERFACE)
    set(private INTERFACE)
  endif()
  target_include_directories(vqkv_${name} ${scope}
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/lib> $<BUILD_INTERFACE:${PROJECT_BINARY_DIR}/generated>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/vqkv>)
  target_link_libraries(vqkv_${name} ${scope} vqkv_options ${A_PUBLIC} ${private} ${A_PRIVATE})
  if(sources AND VQKV_SANITIZE)
    # The presets compile at -O1, at which instrumented kernels make the suites many times slower.
    target_compile_options(vqkv_${name} PRIVATE -O2)
  endif()
  set_target_properties(vqkv_${name} PROPERTIES EXPORT_NAME ${name})
  add_library(vqkv::${name} ALIAS vqkv_${name})
  foreach(s IN LISTS sources)
    # Compiles itself once for each generation of processors; where sources are compiled together, by itself.
    file(STRINGS ${s} targets REGEX "hwy/foreach_target.h" LIMIT_COUNT 1)
    if(targets)
      set_source_files_properties(${s} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    endif()
    if(s MATCHES "_avx2\\.cpp$")
      set_source_files_properties(${s} PROPERTIES COMPILE_OPTIONS "-march=x86-64-v3")
    elseif(s MATCHES "_avx512\\.cpp$")
      set_source_files_properties(${s} PROPERTIES COMPILE_OPTIONS "-march=x86-64-v4")
    elseif(s MATCHES "_vbmi\\.cpp$")
      set_source_files_properties(${s} PROPERTIES COMPILE_OPTIONS "-march=x86-64-v4;-mavx512vbmi")
    elseif(s MATCHES "_bf16\\.cpp$")
      # clang 16, which builds the fuzz targets, crashes when it optimizes these.
      set_source_files_properties(${s} PROPERTIES COMPILE_OPTIONS
        "-march=x86-64-v4;-mavx512bf16;$<$<AND:$<CXX_COMPILER_ID:Clang>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,17>>:-O0>")
    elseif(s MATCHES "_amx\\.cpp$")
      set_source_files_properties(${s} PROPERTIES COMPILE_OPTIONS "-march=x86-64-v4;-mamx-tile;-mamx-bf16")
    endif()
  endforeach()
  set_property(GLOBAL APPEND PROPERTY VQKV_LAYERS vqkv_${name})
endfunction()

# vqkv_app(NAME [DEVICE]): the tool vqkv-NAME, which is NAME_main of vqkv_tools. DEVICE: it takes --device, and where kernels are
#   compiled has those of CUDA.
function(vqkv_app name)
  add_executable(vqkv-${name} ${CMAKE_CURRENT_SOURCE_DIR}/main.cpp)
  target_compile_definitions(vqkv-${name} PRIVATE VQKV_TOOL_MAIN=${name}_main)
  target_link_libraries(vqkv-${name} PRIVATE vqkv_tools)
  if("DEVICE" IN_LIST ARGN AND VQKV_HAS_CUDA)
    target_compile_definitions(vqkv-${name} PRIVATE VQKV_TOOL_DEVICE=linked_device_forms)
    target_link_libraries(vqkv-${name} PRIVATE vqkv_generation_cuda vqkv_model_cuda vqkv_attention_cuda vqkv_device_cuda
                                               vqkv_generation)
  endif()
  set_target_properties(vqkv-${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)
  install(TARGETS vqkv-${name} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endfunction()
