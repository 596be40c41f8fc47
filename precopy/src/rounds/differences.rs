//! What pages that were written again would take, before they are sent.

use switchover_pager::ram::Ram;
use switchover_wire::encoding::{ENTRY_LEN, Page, PageEncoder};
use switchover_wire::types::{PAGE_SIZE, PAGE_SIZE_U64};

use crate::bitmap::PageBitmap;
use crate::pack::SentVersions;

/// Measures differences of a sample of pages.
#[derive(Debug)]
pub struct DifferenceMeter {
    encoder: PageEncoder,
    page: Box<Page>,
    body: Vec<u8>,
}

impl Default for DifferenceMeter {
    fn default() -> Self {
        Self { encoder: PageEncoder::new(1), page: Box::new([0; PAGE_SIZE]), body: Vec::with_capacity(PAGE_SIZE) }
    }
}

impl DifferenceMeter {
    /// Wire bytes that a page of `among` would take, on average of about `most` of them, those as they are of which no version
    /// is kept. `None` where none of those looked at is kept.
    pub(super) fn bytes_per_page(
        &mut self,
        ram: &Ram,
        versions: &SentVersions,
        among: &PageBitmap,
        most: u64,
    ) -> Option<f64> {
        let step = among.count().0.div_ceil(most.max(1)).max(1);
        let step = usize::try_from(step).unwrap_or(usize::MAX);
        let (mut looked_at, mut kept, mut bytes) = (0_u64, 0_u64, 0_u64);
        // From the middle of the first stretch on.
        for page in among.iter().skip(step / 2).step_by(step) {
            if !ram.copy_page(page, &mut self.page) {
                continue;
            }
            let length = versions.difference(page, &self.page, &mut self.encoder, &mut self.body);
            looked_at += 1;
            kept += u64::from(length.is_some());
            bytes += length.map_or(PAGE_SIZE_U64, |length| (length + ENTRY_LEN) as u64);
        }
        (kept > 0).then(|| bytes as f64 / looked_at as f64)
    }
}
