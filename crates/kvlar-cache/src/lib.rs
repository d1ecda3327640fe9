//! The KV cache of running sequences: pages, tiers, fork and truncate.
