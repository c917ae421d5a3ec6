"""The C++ core under sanitizers: `make sanitize`."""
