"""Other libraries on a journal, one module a library. Each needs its extra: `pip install mmapwal[name]`."""
