//! The work list: which CTA takes which rows.

use super::AttendPlan;
use crate::{Buffer, Device, Error, Result};

/// Which CTA takes which rows: built on the device by [`AttendPlan::schedule`] once a step, and read by the launches of
/// all layers whose rows have the same lengths.
#[derive(Debug)]
pub struct WorkList {
    pub(super) buffer: Buffer,
    /// What the list was last built for.
    pub(super) built_for: Option<AttendPlan>,
}

impl WorkList {
    pub(super) fn new(device: &Device, bytes: usize) -> Result<Self> {
        Ok(Self { buffer: device.alloc(bytes)?, built_for: None })
    }

    pub(super) fn fits(&self, plan: &AttendPlan) -> Result<()> {
        let need = plan.work_list_bytes();
        if need > self.buffer.len() {
            return Err(Error::Bounds { arg: "work list", need, have: self.buffer.len() });
        }
        Ok(())
    }
}
