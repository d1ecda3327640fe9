//! The work list: which CTA takes which rows.

use super::AttendPlan;
use crate::attend_lowrank::ScheduleKey;
use crate::{Buffer, Device, Error, Result, ScanPlan};

/// Which CTA takes which rows: built on the device by [`AttendPlan::schedule`] (or
/// [`crate::LowrankPlan::schedule`], [`ScanPlan::schedule`]) once a step, and read by the launches of
/// all layers whose rows have the same lengths and positions.
#[derive(Debug)]
pub struct WorkList {
    buffer: Buffer,
    /// What the list was last built for.
    pub(super) built_for: Option<BuiltFor>,
}

/// What a list can be built for.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "a list seldom moves; a box would be allocated at every step")]
pub(super) enum BuiltFor {
    Attend(AttendPlan, PositionSources),
    Lowrank(ScheduleKey, PositionSources),
    Scan(ScanPlan),
}

/// Which segments (a bit each) have stored positions, and whether queries' positions are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PositionSources {
    pub stored: u32,
    pub queries: bool,
}

/// Bytes of a list: a record a CTA, then one a unit, which is four words shorter.
pub(crate) fn work_list_bytes(record: u32, ctas: u32, units: usize) -> usize {
    4 * (record as usize * ctas as usize + (record as usize - 4) * units)
}

impl WorkList {
    pub(crate) fn new(device: &Device, bytes: usize) -> Result<Self> {
        Ok(Self { buffer: device.alloc(bytes)?, built_for: None })
    }

    pub(crate) fn fits(&self, need: usize) -> Result<()> {
        if need > self.buffer.len() {
            return Err(Error::Bounds { arg: "work list", need, have: self.buffer.len() });
        }
        Ok(())
    }

    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }

    pub(crate) fn built_for_lowrank(&mut self, key: ScheduleKey, sources: PositionSources) {
        self.built_for = Some(BuiltFor::Lowrank(key, sources));
    }

    pub(crate) fn is_built_for_lowrank(&self, key: ScheduleKey, sources: PositionSources) -> bool {
        self.built_for == Some(BuiltFor::Lowrank(key, sources))
    }

    pub(crate) fn built_for_scan(&mut self, plan: ScanPlan) {
        self.built_for = Some(BuiltFor::Scan(plan));
    }

    pub(crate) fn is_built_for_scan(&self, plan: &ScanPlan) -> bool {
        self.built_for == Some(BuiltFor::Scan(*plan))
    }
}
