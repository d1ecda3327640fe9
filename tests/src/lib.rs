//! Parity, contract, golden and end-to-end tests of kvlar.
