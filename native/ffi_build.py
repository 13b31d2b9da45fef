"""What cffi needs to know: the declarations of api.h, and the calls back into Python."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "api.h").read_text())
ffibuilder.cdef(
    """
    extern "Python" {
        int mw_py_write(void *ctx, uint64_t offset, const void *data, uint64_t bytes);
        int mw_py_write_sync(void *ctx, uint64_t offset, const void *data, uint64_t bytes);
        int mw_py_sync(void *ctx);
        void mw_py_errand(void *errand);
    }
    """
)
ffibuilder.set_source("mmapwal._native", '#include "mmapwal.h"', py_limited_api=True)
