//! Plain CPU reference of every kvlar op: the oracle.
