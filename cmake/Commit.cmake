# IPO_EXT_COMMIT: the commit that is built, "-dirty" after it if files differ; empty outside a checkout.
set(IPO_EXT_COMMIT "")
if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/.git)  # not the repository that an unpacked archive may lie in
  execute_process(COMMAND git describe --always --abbrev=12 --exclude=* --dirty
                  WORKING_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR}
                  OUTPUT_VARIABLE IPO_EXT_COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
