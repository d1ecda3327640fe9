//! Which kv heads a latent is made of.

use crate::error::invalid;
use crate::{Buffer, Device, Result, Stream};

/// The kv heads of each latent group, in the order in which an encoder has their dimensions: made once a layer.
///
/// It is checked here, on the host, so that no kernel meets a head that does not exist.
#[derive(Debug)]
pub struct HeadGroups {
    buffer: Buffer,
    kv_heads: usize,
    size: usize,
    groups: usize,
}

impl HeadGroups {
    /// `members` is `[groups, size]`.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for a list that is no whole number of groups, a member that is none of `kv_heads`, or one
    /// that a group has twice; what the device refuses.
    pub fn new(device: &Device, stream: &Stream, kv_heads: usize, size: usize, members: &[i32]) -> Result<Self> {
        if size == 0 || members.is_empty() || !members.len().is_multiple_of(size) {
            return invalid("groups", format!("{} members are no whole number of groups of {size}", members.len()));
        }
        for (n, group) in members.chunks(size).enumerate() {
            for (i, &head) in group.iter().enumerate() {
                if usize::try_from(head).map_or(true, |h| h >= kv_heads) {
                    return invalid("groups", format!("group {n} has kv head {head}, there are 0..{kv_heads}"));
                }
                if group[..i].contains(&head) {
                    return invalid("groups", format!("group {n} has kv head {head} twice"));
                }
            }
        }
        let mut buffer = device.alloc(4 * members.len())?;
        stream.upload(&mut buffer, 0, bytemuck::cast_slice(members))?;
        Ok(Self { buffer, kv_heads, size, groups: members.len() / size })
    }

    /// Hk.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// kv heads a group.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Groups.
    pub fn groups(&self) -> usize {
        self.groups
    }

    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }
}
