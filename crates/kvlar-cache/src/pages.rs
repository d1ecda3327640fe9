//! Which pages are free, and how many sequences own each of the others.

/// The host's book of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageBook {
    owners: Vec<u32>,
    /// The last is given out next.
    free: Vec<u32>,
}

impl PageBook {
    pub fn new(pages: usize) -> Self {
        Self { owners: vec![0; pages], free: (0..pages as u32).rev().collect() }
    }

    pub fn capacity(&self) -> usize {
        self.owners.len()
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages with more than one owner.
    pub fn shared(&self) -> usize {
        self.owners.iter().filter(|&&n| n > 1).count()
    }

    /// A free page, now with one owner.
    pub fn take(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        self.owners[page as usize] = 1;
        Some(page)
    }

    /// One more owner.
    pub fn share(&mut self, page: u32) {
        self.owners[page as usize] += 1;
    }

    /// One owner less; the last one frees it.
    pub fn release(&mut self, page: u32) {
        let owners = &mut self.owners[page as usize];
        *owners -= 1;
        if *owners == 0 {
            self.free.push(page);
        }
    }

    pub fn owners(&self, page: u32) -> usize {
        self.owners[page as usize] as usize
    }

    pub fn is_shared(&self, page: u32) -> bool {
        self.owners[page as usize] > 1
    }
}
