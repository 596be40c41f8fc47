//! Some pages of RAM, compared with what they were.

use std::io;
use std::os::unix::fs::FileExt;

use switchover_pager::ram::Ram;
use switchover_wire::types::{PAGE_SIZE, PageCount, PageIndex};

/// An odd multiplier of 64 bits (the golden ratio): its multiples are spread evenly, in an order that no guest has.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Pages spread over RAM, and their checksums.
///
/// They are read from RAM's file: a hole is not filled by that, and a page that is watched wakes nobody.
pub struct Samples {
    ram: Ram,
    pages: Vec<(PageIndex, u32)>,
}

impl Samples {
    /// So many pages per GiB of `ram`, at least one, none taken twice.
    pub fn of(ram: &Ram, per_gib: u64) -> Self {
        let total = ram.pages().0;
        let wanted = (u128::from(ram.pages().bytes()) * u128::from(per_gib)) >> 30;
        let wanted = u64::try_from(wanted).unwrap_or(u64::MAX).clamp(1, total.max(1));
        // One from each of as many stretches of equal length, so that none is taken twice.
        let pages = (0..wanted).map(|index| {
            let (start, end) = (share(total, index, wanted), share(total, index + 1, wanted));
            (PageIndex(start + index.wrapping_mul(SPREAD) % (end - start).max(1)), 0)
        });
        Self { ram: ram.clone(), pages: pages.collect() }
    }

    /// Notes what they are now.
    pub fn take(&mut self) -> io::Result<()> {
        for (page, sum) in &mut self.pages {
            *sum = checksum(&self.ram, *page)?;
        }
        Ok(())
    }

    /// How many pages of all RAM have changed since, judging by these.
    pub fn changed(&self) -> io::Result<PageCount> {
        let mut changed = 0_u64;
        for (page, sum) in &self.pages {
            changed += u64::from(checksum(&self.ram, *page)? != *sum);
        }
        Ok(PageCount(share(self.ram.pages().0, changed, self.pages.len() as u64)))
    }
}

/// `part` of `of` parts of `total`.
fn share(total: u64, part: u64, of: u64) -> u64 {
    u64::try_from(u128::from(total) * u128::from(part) / u128::from(of.max(1))).unwrap_or(u64::MAX)
}

fn checksum(ram: &Ram, page: PageIndex) -> io::Result<u32> {
    let mut bytes = [0; PAGE_SIZE];
    ram.file().read_exact_at(&mut bytes, page.offset())?;
    Ok(crc32fast::hash(&bytes))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn samples_are_spread_over_ram_and_none_is_taken_twice() {
        let ram = Ram::new(PageCount(32 << 8)).unwrap();
        let samples = Samples::of(&ram, 16_384);
        let pages: BTreeSet<u64> = samples.pages.iter().map(|(page, _)| page.0).collect();
        assert_eq!(pages.len(), 512);
        for eighth in 0..8 {
            assert_eq!(pages.range(eighth * 1024..(eighth + 1) * 1024).count(), 64);
        }
        assert_eq!(Samples::of(&Ram::new(PageCount(4)).unwrap(), 128).pages.len(), 1);
        assert_eq!(Samples::of(&Ram::new(PageCount(4)).unwrap(), u64::MAX).pages.len(), 4);
    }

    #[test]
    fn what_changes_is_extrapolated_to_all_of_ram() {
        let ram = Ram::new(PageCount(1024)).unwrap();
        let mut samples = Samples::of(&ram, 16_384);
        samples.take().unwrap();
        assert_eq!(samples.changed().unwrap(), PageCount(0));
        let half: Vec<_> = samples.pages.iter().step_by(2).map(|(page, _)| page.offset()).collect();
        for offset in half {
            ram.file().write_all_at(&[1], offset + 77).unwrap();
        }
        assert_eq!(samples.changed().unwrap(), PageCount(512));
    }
}
