//! stub
#![allow(missing_docs)]
use switchover_wire::types::PageCount;
#[derive(Debug)]
pub struct AutoConverge;
impl AutoConverge {
    #[must_use]
    pub fn new(_: u8, _: u8, _: u8) -> Self {
        Self
    }
    pub fn after_round(&mut self, _: PageCount, _: PageCount) -> u8 {
        0
    }
}
