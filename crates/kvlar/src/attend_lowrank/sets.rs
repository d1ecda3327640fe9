//! Which kv heads read which latents.

use super::SetsShape;
use crate::error::invalid;
use crate::{Buffer, Device, Result, Stream};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Which key latents and value latents each kv head reads, as the kernels want it: made once a layer.
///
/// kv heads with the same key group and the same value group are served together; two partitions that cut across each
/// other therefore cost reads of latents by more CTAs, not results.
#[derive(Debug)]
pub struct HeadSets {
    pub(super) buffer: Buffer,
    pub(super) shape: SetsShape,
}

impl HeadSets {
    /// `group_k[h]`: the key latents that kv head h reads; `group_v[h]`: the value latents, `None` for dense values.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for a negative group, or lists of different lengths; what the device refuses.
    pub fn new(device: &Device, stream: &Stream, group_k: &[i32], group_v: Option<&[i32]>) -> Result<Self> {
        if group_v.is_some_and(|v| v.len() != group_k.len()) {
            return invalid("group_v", "it names another number of kv heads than group_k");
        }
        if let Some(bad) = group_k.iter().chain(group_v.unwrap_or_default()).find(|&&g| g < 0) {
            return invalid("group", format!("{bad} is negative"));
        }
        let mut sets = BTreeMap::<(i32, i32), Vec<i32>>::new();
        for (h, &k) in group_k.iter().enumerate() {
            sets.entry((k, group_v.map_or(0, |v| v[h]))).or_default().push(h as i32);
        }
        let (mut table, mut heads) = (Vec::<i32>::new(), Vec::<i32>::new());
        for ((k, v), members) in &sets {
            table.extend([*k, *v, members.len() as i32, heads.len() as i32]);
            heads.extend(members);
        }
        let mut hasher = DefaultHasher::new();
        sets.values().for_each(|members| members.len().hash(&mut hasher));
        let groups = |g: &[i32]| g.iter().max().map_or(0, |&m| m as usize + 1);
        let shape = SetsShape {
            count: sets.len(),
            largest: sets.values().map(Vec::len).max().unwrap_or(0),
            kv_heads: group_k.len(),
            key_groups: groups(group_k),
            value_groups: group_v.map_or(0, groups),
            sizes_hash: hasher.finish(),
        };
        table.extend(heads);
        let mut buffer = device.alloc(4 * table.len())?;
        stream.upload(&mut buffer, 0, bytemuck::cast_slice(&table))?;
        Ok(Self { buffer, shape })
    }

    /// What plans know of it.
    pub fn shape(&self) -> SetsShape {
        self.shape
    }
}
