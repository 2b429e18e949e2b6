# torch's stable ABI as two targets: stable_torch (headers and the oldest version they promise) and stable_torch_libraries.
# Avoids find_package(Torch), which takes over the CUDA architecture flags and wants a CUDA torch for a CUDA build.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import os, torch; print(torch.__version__, os.path.dirname(torch.__file__), sep=';')"
  OUTPUT_VARIABLE torch_facts OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_VARIABLE torch_error RESULT_VARIABLE torch_missing)
if(torch_missing)
  message(FATAL_ERROR "ipo_ext needs torch (2.11 or newer) to build, and ${Python_EXECUTABLE} cannot import it:\n"
                      "${torch_error}\nInstall torch first, or build with isolation: pip install .")
endif()
list(GET torch_facts 0 TORCH_VERSION)
list(GET torch_facts 1 TORCH_ROOT)
if(TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "ipo_ext needs the headers of torch 2.11 or newer, found torch ${TORCH_VERSION} in ${TORCH_ROOT}")
endif()
message(STATUS "torch ${TORCH_VERSION} in ${TORCH_ROOT}")

add_library(stable_torch INTERFACE)
target_include_directories(stable_torch SYSTEM INTERFACE ${TORCH_ROOT}/include)
target_compile_definitions(stable_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)  # 2.11

# --no-as-needed: torch resolves these symbols lazily, so the linker would think that nobody needs the libraries.
add_library(stable_torch_libraries INTERFACE)
target_link_directories(stable_torch_libraries INTERFACE ${TORCH_ROOT}/lib)
target_link_options(stable_torch_libraries INTERFACE LINKER:--no-as-needed)
target_link_libraries(stable_torch_libraries INTERFACE torch torch_cpu)
