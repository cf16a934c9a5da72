# Cross-compiles for AArch64 with Debian's gcc-aarch64-linux-gnu; programs run through qemu-user.
# SPDX-License-Identifier: Apache-2.0
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64;-L;/usr/aarch64-linux-gnu)

# dlpack.h alone: the folder it lies in holds the build machine's own libc headers beside it.
find_path(host_dlpack dlpack/dlpack.h NO_CMAKE_FIND_ROOT_PATH)
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/host_include)
file(CREATE_LINK ${host_dlpack}/dlpack ${CMAKE_BINARY_DIR}/host_include/dlpack SYMBOLIC)
set(DLPACK_INCLUDE_DIR ${CMAKE_BINARY_DIR}/host_include)
