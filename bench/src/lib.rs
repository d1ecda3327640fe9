//! Microbenchmarks of the kvlar kernels.
