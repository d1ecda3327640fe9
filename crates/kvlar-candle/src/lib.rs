//! candle adapters for kvlar, and an engine for Llama-family checkpoints.
