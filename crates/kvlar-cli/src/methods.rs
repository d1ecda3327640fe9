//! The methods that the table compares. A method is a way to make a store; adding one here is all it takes.

use kvlar::Device;
use kvlar_candle::{KvShape, KvStore, PagedStore, Result, StoreConfig};

/// A way to keep keys and values.
pub struct Method {
    /// On the command line and in the table.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// An empty store for so many tokens.
    pub store: fn(&Device, &KvShape, usize) -> Result<Box<dyn KvStore>>,
}

/// All methods; the first is what the others are compared with.
pub const METHODS: &[Method] = &[
    Method { name: "bf16", about: "full cache in bf16", store: |d, s, n| paged(d, s, StoreConfig::bf16(n)) },
    Method {
        name: "int8",
        about: "keys and values in 8 bits, a scale and zero a row",
        store: |d, s, n| paged(d, s, StoreConfig::int8(n)),
    },
];

fn paged(device: &Device, shape: &KvShape, config: StoreConfig) -> Result<Box<dyn KvStore>> {
    Ok(Box::new(PagedStore::new(device, shape, config)?))
}

/// The method of that name.
pub fn find(name: &str) -> anyhow::Result<&'static Method> {
    let names: Vec<_> = METHODS.iter().map(|m| m.name).collect();
    METHODS.iter().find(|m| m.name == name).ok_or_else(|| anyhow::anyhow!("no method {name:?} ({})", names.join(", ")))
}
