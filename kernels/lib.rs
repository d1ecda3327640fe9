//! Device code of kvlar.
