# Every kernel source is compiled once per instruction set, into its own namespace; dispatch.cpp chooses at load time.
set(SK_KERNELS tokens.cpp product.cpp product_many.cpp rows.cpp round.cpp
    prepare.cpp fp32.cpp bf16.cpp int8.cpp int4.cpp q8_0.cpp q4_0.cpp q4_1.cpp
    uniform.cpp ternary.cpp tritplanes.cpp binary.cpp exponents.cpp sparse.cpp dictionary.cpp
    elementwise.cpp attention.cpp)
list(TRANSFORM SK_KERNELS PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
# Scores never become codes, so there products may join sums.
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/attention.cpp PROPERTIES COMPILE_OPTIONS -ffp-contract=fast)

function(sk_isa name)
  add_library(sk_${name} OBJECT ${SK_KERNELS})
  target_compile_definitions(sk_${name} PRIVATE ISA=${name})
  # No contraction: a product and a sum round the same way at every level, so activations get the same codes everywhere.
  target_compile_options(sk_${name} PRIVATE -O3 -ffp-contract=off -fno-math-errno -fno-exceptions -fno-rtti ${ARGN})
  target_sources(_kernels PRIVATE $<TARGET_OBJECTS:sk_${name}>)
endfunction()

sk_isa(base)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  sk_isa(avx2 -march=x86-64-v3)
  sk_isa(avx512vnni -march=x86-64-v4 -mavx512vnni -mprefer-vector-width=512)
  sk_isa(avx512bf16 -march=x86-64-v4 -mavx512vnni -mavx512bf16 -mprefer-vector-width=512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  sk_isa(neondot -march=armv8.2-a+dotprod+i8mm)
endif()
