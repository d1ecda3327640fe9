//! Safe launchers for the kvlar kernels: what inference engines link.
